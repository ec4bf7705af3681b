"""What a checkpoint's config.json may ask for: refused for parts that there are none of, not for leftovers."""

import json
import shutil

import pytest

from llava.config import resolve
from llava.config.asked_parts import check_asked_parts
from llava.errors import LlavaError
from llava.model.builder import load_pretrained_model
from tests.model.golden import GOLDEN

SOURCE = GOLDEN / "qwen_clip_anyres_unpad"
ASKED = {
    "mm_resampler_type": ["perceiver", "qformer", "masked_drop", "spatial_pool"],
    "mm_vision_resampler": ["perceiver"],
    "tune_mm_vision_resampler": [True],
    "add_faster_video": [True],
    "use_pos_skipping": [True],
    "image_aspect_ratio": ["highres", "crop_split", "overlap"],
    "mm_patch_merge_type": ["unpad_spatial"],
    "mm_projector_type": ["cabstractor"],
    "mm_vision_tower_type": ["eva_clip"],
    "mm_newline_position": ["middle"],
    "mm_spatial_pool_mode": ["conv"],
    "image_grid_pinpoints": ["all of them"],
}
# of published checkpoints: llava-v1.5/1.6, llava-next, llava-onevision, LLaVA-Video, LLaVA-NeXT-Video
LEFTOVERS = [
    {"freeze_mm_mlp_adapter": False, "freeze_mm_vision_resampler": False, "mm_resampler_type": None}
    | {"tune_mm_mlp_adapter": False, "tune_mm_vision_resampler": False, "unfreeze_mm_vision_tower": True}
    | {"mm_vision_select_feature": "patch", "mm_vision_tower_lr": 2e-6, "pretraining_tp": 1},
    {"image_crop_resolution": None, "image_split_resolution": None, "image_aspect_ratio": "anyres_max_9"}
    | {"vision_tower_pretrained": None, "mm_spatial_pool_mode": "bilinear", "mm_spatial_pool_stride": None}
    | {"mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model", "pos_skipping_range": 4096}
    | {"use_pos_skipping": False, "mm_patch_merge_type": "spatial_unpad", "mm_newline_position": "one_token"},
    {"add_faster_video": False, "add_time_instruction": True, "faster_token_stride": 10, "force_sample": True}
    | {"mm_newline_position": "grid", "mm_spatial_pool_stride": 4, "mm_perceiver_depth": 6, "mm_qformer_depth": 3},
    {"mm_resampler_type": "spatial_pool", "mm_spatial_pool_mode": "average", "mm_spatial_pool_stride": 2}
    | {"mm_spatial_pool_out_channels": 1024, "mm_resampler_location": "before", "mm_pooling_position": "before"},
]


def checkpoint(folder, **values):
    folder.mkdir()
    for path in SOURCE.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "config.json").unlink()
    config = json.loads((SOURCE / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


def load(folder, **options):
    return load_pretrained_model(str(folder), None, "llava_qwen", device_map="cpu", torch_dtype="float32", **options)


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in ASKED.items() for value in values])
def test_parts_that_do_not_exist_are_refused_when_loading_as_when_training(tmp_path, key, value):
    folder = checkpoint(tmp_path / "model", **{key: value})
    with pytest.raises(LlavaError) as fault:
        load(folder)
    said = str(fault.value)
    assert key in said and (repr(value) in said or key == "image_grid_pinpoints") and "\n" not in said
    with pytest.raises(LlavaError, match=key):
        run = resolve(["--model_name_or_path", str(folder), "--version", "qwen_1_5"])
        from llava.families import get_family

        get_family("llava").check(run)
        get_family("llava").check_fit(run)


@pytest.mark.parametrize("values", LEFTOVERS)
def test_leftovers_of_published_checkpoints_load(tmp_path, values):
    folder = checkpoint(tmp_path / "model", **values)
    assert load(folder)[1].get_vision_tower().is_loaded
    resolve(["--model_name_or_path", str(folder)])


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [("mm_resampler_type", "perceiver", None), ("add_faster_video", True, False), ("use_pos_skipping", True, False)],
)
def test_the_way_out_that_is_named(tmp_path, key, value, instead):
    folder = checkpoint(tmp_path / "model", **{key: value})
    with pytest.raises(LlavaError) as fault:
        load(folder)
    assert f"overwrite_config={{{key!r}: {instead!r}}}" in str(fault.value)
    assert load(folder, overwrite_config={key: instead})[1] is not None
    with pytest.raises(LlavaError, match=key):  # what is asked for here goes by the same rules
        load(SOURCE, overwrite_config={key: value})


def test_a_pooling_that_is_not_by_two_is_a_resampler():
    pooled = {"mm_resampler_type": "spatial_pool", "mm_spatial_pool_mode": "average", "mm_spatial_pool_stride": 2}
    check_asked_parts(pooled, "here")
    for changed in ({"mm_spatial_pool_stride": 4}, {"mm_spatial_pool_mode": "conv"}, {"mm_spatial_pool_mode": None}):
        with pytest.raises(LlavaError, match="here: mm_resampler_type is 'spatial_pool'"):
            check_asked_parts(pooled | changed, "here")


def test_a_language_model_without_vision_is_not_asked(tmp_path):
    folder = tmp_path / "text"
    shutil.copytree(SOURCE, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"mm_vision_tower": None, "mm_resampler_type": "perceiver"}
    (folder / "config.json").write_text(json.dumps(config))
    assert load(folder)[1].get_vision_tower() is None
