"""Runs that differ in data, grouping, tower, tokenizer and language model."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from tests import tiny

ALL = {"mm_vision_tower", "mm_mlp_adapter", "mm_language_model"}


@pytest.mark.parametrize(
    "flags",
    [
        dict(group_by_modality_length=True),
        dict(group_by_modality_length_auto=True),
        dict(group_by_varlen=True),
        dict(group_by_modality_length=True, group_lengths="tokens"),
        dict(group_by_length=True, train_sampling_strategy=None),
    ],
)
def test_groupings_see_every_record_once(kit, tmp_path, monkeypatch, flags):
    from llava.data.dataset import LazySupervisedDataset

    drawn = []
    get = LazySupervisedDataset.__getitem__
    monkeypatch.setattr(
        LazySupervisedDataset, "__getitem__", lambda self, index: drawn.append(index) or get(self, index)
    )
    steps = tiny.history(kit.run(tmp_path / "out", **flags))
    assert len(steps) == 3
    assert sorted(drawn[:12]) == list(range(12)) and drawn[:12] != list(range(12))
    if any("modality" in flag for flag in flags):  # eight records with an image, four without
        kinds = ["iitiittiiiti"[index] for index in drawn[:12]]
        assert sorted("".join(kinds[at : at + 4]) for at in (0, 4, 8)) == ["iiii", "iiii", "tttt"]


@pytest.mark.parametrize("grouped", [True, False])
def test_every_epoch_has_an_order_of_its_own(kit, tmp_path, monkeypatch, grouped):
    from llava.data.dataset import LazySupervisedDataset

    drawn = []
    get = LazySupervisedDataset.__getitem__
    monkeypatch.setattr(
        LazySupervisedDataset, "__getitem__", lambda self, index: drawn.append(index) or get(self, index)
    )
    kinds = "iitiittiiiti"
    kit.run(tmp_path / "out", kinds, group_by_modality_length=grouped, train_sampling_strategy="random", max_steps=6)
    assert len(drawn) == 24 and sorted(drawn[:12]) == sorted(drawn[12:]) == list(range(12))
    assert drawn[:12] != drawn[12:]


def test_siglip(kit, tmp_path, spy):
    out = kit.run(tmp_path / "out", vision_tower=kit.siglip, max_steps=2)
    assert spy.moved_parts() == ALL
    names = load_file(out / "model.safetensors").keys()
    prefix = "model.vision_tower.vision_tower.vision_model.encoder.layers."
    assert f"{prefix}1.mlp.fc1.weight" in names and f"{prefix}2.mlp.fc1.weight" not in names
    from llava.model.builder import load_pretrained_model

    model = load_pretrained_model(str(out), None, "llava_qwen", device_map="cpu", torch_dtype="float32")[1]
    assert model.get_vision_tower().num_patches == 4
    assert model.state_dict()["lm_head.weight"].equal(spy.trainer.model.state_dict()["lm_head.weight"])


def test_several_images_in_a_record(kit, tmp_path, spy):
    steps = tiny.history(kit.run(tmp_path / "out", "mmimtmmimtmm"))
    assert spy.moved_parts() == ALL and steps[-1]["loss"] < steps[0]["loss"]


def test_text_alone_with_a_tower(kit, tmp_path, spy):
    steps = tiny.history(kit.run(tmp_path / "out", "tttttttttttt"))
    assert spy.moved_parts() == {"mm_language_model"}
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_a_video_as_a_folder_of_frames(kit, tmp_path, spy):
    rng = np.random.default_rng(3)
    for clip in range(2):
        (tmp_path / f"videos/clip{clip}").mkdir(parents=True)
        for at in range(3):
            pixels = rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"videos/clip{clip}/{at}.png")
    turns = [{"from": "human", "value": "<image>\nWhat happens?"}, {"from": "gpt", "value": "A temple in China."}]
    records = [{"id": f"v{at}", "video": f"clip{at % 2}", "conversations": turns} for at in range(2)]
    images = json.loads(Path(kit.records("iitiittiiiti")).read_text())[:2]
    (tmp_path / "mixed.json").write_text(json.dumps([records[0], *images, records[1]]))
    kit.run(
        tmp_path / "out",
        None,
        data_path=tmp_path / "mixed.json",
        image_folder=Path(kit.records("iitiittiiiti")).parent / "images",
        video_folder=tmp_path / "videos",
        mm_newline_position="frame",
        mm_spatial_pool_stride=2,
        add_time_instruction=True,
        max_steps=2,
    )
    assert spy.moved_parts() == ALL
    sample = spy.trainer.train_dataset[0]
    assert sample["images"][0].shape == (3, 3, 28, 28) and sample["modalities"] == ["video"]
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["mm_newline_position"] == "frame" and config["mm_spatial_pool_stride"] == 2
    assert config["add_time_instruction"] is True


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_rope_scaling(kit, tmp_path, spy, kind):
    plain = tiny.history(kit.run(tmp_path / "plain", max_steps=1))
    steps = tiny.history(
        kit.run(tmp_path / "out", max_steps=1, rope_scaling_type=kind, rope_scaling_factor=2.0, model_max_length=1024)
    )
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == kind and config["rope_parameters"]["factor"] == 2.0
    assert config["rope_parameters"]["rope_theta"] == spy.trainer.model.config.rope_parameters["rope_theta"]
    # linear scaling halves every angle; dynamic scaling changes nothing within the original length
    assert (steps[0]["loss"] != plain[0]["loss"]) is (kind == "linear")


def test_image_tokens_in_the_tokenizer(kit, tmp_path, spy):
    """<im_patch>, <im_start> and <im_end> are added, trained where they are used, saved and loaded."""
    from llava.model.builder import load_pretrained_model

    out = kit.run(tmp_path / "out", "iiii", mm_use_im_start_end=True, mm_use_im_patch_token=True, max_steps=2)
    tokenizer = spy.trainer.processing_class
    new = tokenizer.convert_tokens_to_ids(["<im_patch>", "<im_start>", "<im_end>"])
    assert new == [703, 704, 705]
    ids = spy.trainer.train_dataset[0]["input_ids"].tolist()
    at = ids.index(-200)
    assert (ids[at - 1], ids[at + 1]) == (704, 705)
    before, after = spy.before["model.embed_tokens.weight"], spy.trainer.model.get_input_embeddings().weight
    assert len(after) >= 706
    for token in (704, 705):
        assert not before[token].equal(after[token])

    loaded = load_pretrained_model(str(out), None, "llava_qwen", device_map="cpu", torch_dtype="float32")
    assert len(loaded[0]) == 706 and loaded[0].convert_tokens_to_ids("<im_end>") == 705
    assert loaded[1].get_input_embeddings().weight.equal(after)
    assert loaded[1].config.mm_use_im_start_end is True
    assert loaded[1].config.vocab_size == len(after)


@pytest.mark.parametrize("flags", [dict(mm_tunable_parts="mm_mlp_adapter"), dict(tune_mm_mlp_adapter=True)])
def test_new_tokens_need_the_language_model_trained(kit, tmp_path, capsys, flags):
    flags = {"mm_tunable_parts": None, **flags}
    with pytest.raises(SystemExit):
        kit.run(tmp_path / "out", mm_use_im_start_end=True, **flags)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: mm_use_im_start_end") and "mm_language_model" in error


def test_tokens_that_are_there_already_do_not(kit, tmp_path, spy):
    first = kit.run(tmp_path / "first", "iiii", mm_use_im_start_end=True, max_steps=1)
    kit.run(tmp_path / "out", "iiii", model_name_or_path=first, mm_tunable_parts="mm_mlp_adapter", max_steps=1)
    assert spy.moved_parts() == {"mm_mlp_adapter"} and spy.trainer.model.config.mm_use_im_start_end is True


def test_a_language_model_without_a_tower(kit, tmp_path, spy, capsys):
    from llava.model.builder import load_pretrained_model

    flags = dict(vision_tower=None, mm_tunable_parts="mm_language_model", image_aspect_ratio="square", max_steps=2)
    out = kit.run(tmp_path / "out", "tttt", **flags)
    assert spy.moved_parts() == {"mm_language_model"}
    loaded = load_pretrained_model(str(out), None, "llava_qwen", device_map="cpu", torch_dtype="float32")
    tokenizer, model, image_processor, _ = loaded
    assert image_processor is None and model.get_vision_tower() is None
    assert model.state_dict()["lm_head.weight"].equal(spy.trainer.model.state_dict()["lm_head.weight"])
    new = model.generate(tokenizer("What is shown?", return_tensors="pt").input_ids, max_new_tokens=3)
    assert new.shape[0] == 1 and new.shape[1] <= 3

    with pytest.raises(SystemExit):  # pictures, and nothing to see them with
        kit.run(tmp_path / "blind", "tiit", **flags)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "r1" in error and "vision_tower" in error


@pytest.mark.parametrize(
    ("projector", "merge"),
    [("patch_merger", "spatial"), ("spatial_merge", "spatial_unpad"), ("pooler", "spatial_unpad"), ("linear", "flat")],
)
def test_projectors(kit, tmp_path, spy, projector, merge):
    kit.run(tmp_path / "out", "imti", mm_projector_type=projector, mm_patch_merge_type=merge, max_steps=1)
    assert spy.moved_parts() == ALL
    trainer = spy.trainer
    sample = trainer.train_dataset[0]
    shape, size = tuple(sample["images"][0].shape), sample["image_sizes"][0]
    counted = trainer.model.visual_token_counter()(shape, size, "image")
    visual = trainer.model.eval()._visual_tokens(sample["images"], ["image"], [size])
    assert len(visual[0]) == counted > 0


def test_multi_scale_tower(kit, tmp_path, spy):
    kit.run(
        tmp_path / "out",
        "imti",
        s2=True,
        s2_scales="28,56",
        image_aspect_ratio="anyres",
        image_grid_pinpoints="(1x1),...,(2x2)",
        max_steps=1,
    )
    assert spy.moved_parts() == ALL
    assert spy.trainer.model.config.image_grid_pinpoints == [[56, 56], [56, 112], [112, 56], [112, 112]]
    sample = spy.trainer.train_dataset[0]
    assert sample["images"][0].shape[-2:] == (56, 56)


@pytest.mark.parametrize("kind", ["hevc_vit", "hevc_vit_packing"])
def test_hevc_vit(kit, tmp_path, spy, kind):
    """Trained from one folder of weights, padded or packed; checkpointing recomputes and changes nothing."""
    runs = {}
    for checkpointing in (False, True):
        out = tmp_path / f"out{checkpointing}"
        kit.run(
            out,
            vision_tower=kit.hevc_vit,
            mm_vision_tower_type=kind,
            gradient_checkpointing=checkpointing,
        )
        assert spy.moved_parts() == ALL
        blocks = spy.trainer.model.get_vision_tower().vision_tower.encoder.layers
        assert all(block.gradient_checkpointing is checkpointing for block in blocks)
        runs[checkpointing] = tiny.history(out)
    assert runs[False][-1]["loss"] < runs[False][0]["loss"]
    for a, b in zip(runs[False], runs[True], strict=True):
        assert abs(a["loss"] - b["loss"]) <= 1e-5 and abs(a["grad_norm"] - b["grad_norm"]) <= 1e-4
    config = json.loads((out / "config.json").read_text())
    assert config["mm_vision_config"]["model_type"] == kind.replace("hevc", "llava")


@pytest.mark.parametrize("merge", ["spatial_unpad", "flat"])
def test_native_resolution(kit, tmp_path, spy, merge):
    """Every image has tokens of its own number, in training, in the counts, and in the checkpoint that is loaded."""
    from llava.mm_utils import process_images
    from llava.model.builder import load_pretrained_model

    out = kit.run(
        tmp_path / "out",
        "imti",
        vision_tower=kit.hevc_vit,
        mm_vision_tower_type="hevc_vit_packing",
        mm_projector_type="spatial_merge",
        mm_patch_merge_type=merge,
        image_aspect_ratio="native",
        image_grid_pinpoints=None,
        min_pixels=28 * 28,
        max_pixels=3 * 28 * 28,
        max_steps=2,
    )
    assert spy.moved_parts() == ALL
    samples = [spy.trainer.train_dataset[i] for i in (0, 1, 3)]
    images = [image for sample in samples for image in sample["images"]]
    sizes = [size for sample in samples for size in sample["image_sizes"]]
    assert len(images) == 4 and len({image.shape for image in images}) > 1
    assert all(image.shape[1] % 28 == image.shape[2] % 28 == 0 for image in images)
    counter = spy.trainer.model.visual_token_counter()
    counts = [counter(tuple(image.shape), size) for image, size in zip(images, sizes, strict=True)]
    grids = [(image.shape[1] // 28, image.shape[2] // 28) for image in images]
    assert counts == [h * (w + (merge == "spatial_unpad")) for h, w in grids]
    tokens = spy.trainer.model.eval()._visual_tokens(images, ["image"] * 4, sizes)
    assert [len(t) for t in tokens] == counts

    _, model, processor, _ = load_pretrained_model(str(out), None, "x", device_map="cpu", torch_dtype="float32")
    assert (model.config.min_pixels, model.config.max_pixels) == (28 * 28, 3 * 28 * 28)
    picture = Image.open(Path(kit.records("imti")).parent / "images/0_0.png")
    assert process_images([picture], processor, model.config)[0].equal(images[0])


def test_native_resolution_needs_a_tower_that_takes_it(kit, tmp_path, capsys):
    with pytest.raises(SystemExit):
        kit.run(tmp_path / "out", "imti", image_aspect_ratio="native", image_grid_pinpoints=None)
    assert "image_aspect_ratio native: the tower" in capsys.readouterr().err


def test_adaptive_patches(kit, tmp_path, spy):
    """Trained, kept in the checkpoint, taken over from it by the next run, and switched off by none."""
    import torch
    import transformers

    adaptive = {"method": "budget", "alpha": [0.3, 0.7]}
    packed = dict(
        vision_tower=kit.hevc_vit,
        mm_vision_tower_type="hevc_vit_packing",
        image_aspect_ratio="native",
        image_grid_pinpoints=None,
        min_pixels=56 * 56,
        max_steps=2,
    )
    first = kit.run(tmp_path / "first", "imti", **packed, adaptive_patches="{method: budget, alpha: [0.3, 0.7]}")
    assert spy.moved_parts() == ALL
    config = json.loads((first / "config.json").read_text())
    assert config["adaptive_patches"] == adaptive
    assert spy.trainer.model.get_vision_tower().patch_chooser.choice.alpha == (0.3, 0.7)

    # DeepSpeed's dtype is not for pixels that patches are chosen by
    def in_bfloat16(trainer, batch):
        return {key: [value.bfloat16() for value in values] for key, values in batch.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.Trainer, "_prepare_inputs", in_bfloat16)
        image = torch.rand(3, 28, 28)
        found = spy.trainer._prepare_inputs({"images": [image], "others": [image]})
    assert found["images"][0].equal(image) and found["others"][0].dtype == torch.bfloat16

    packed |= {"model_name_or_path": first, "vision_tower": None, "mm_vision_tower_type": None}
    packed["mm_tunable_parts"] = "mm_mlp_adapter,mm_language_model"  # behind a frozen tower
    second = kit.run(tmp_path / "second", "imti", **packed)
    assert json.loads((second / "config.json").read_text())["adaptive_patches"] == adaptive
    third = kit.run(tmp_path / "third", "imti", **packed, adaptive_patches="none")
    assert json.loads((third / "config.json").read_text())["adaptive_patches"] is None
    assert tiny.history(second)[0]["loss"] != tiny.history(third)[0]["loss"]


def test_a_video_through_hevc_vit(kit, tmp_path, spy):
    """A clip at native resolution is one sample of the packed tower."""
    (tmp_path / "videos/clip").mkdir(parents=True)
    for at in range(3):
        Image.fromarray(np.full((30, 50, 3), 60 * at, dtype=np.uint8)).save(tmp_path / f"videos/clip/{at}.png")
    turns = [{"from": "human", "value": "<image>\nWhat happens?"}, {"from": "gpt", "value": "A temple in China."}]
    (tmp_path / "clips.json").write_text(json.dumps([{"id": "v", "video": "clip", "conversations": turns}] * 2))
    kit.run(
        tmp_path / "out",
        None,
        data_path=tmp_path / "clips.json",
        video_folder=tmp_path / "videos",
        vision_tower=kit.hevc_vit,
        mm_vision_tower_type="hevc_vit_packing",
        image_aspect_ratio="native",
        image_grid_pinpoints=None,
        min_pixels=14 * 14,
        mm_newline_position="grid",
        per_device_train_batch_size=2,
        max_steps=1,
    )
    assert spy.moved_parts() == ALL
    assert spy.trainer.train_dataset[0]["images"][0].shape == (3, 3, 28, 56)  # 30 x 50 pixels, to the nearest 14
