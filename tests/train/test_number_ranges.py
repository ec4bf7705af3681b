"""Any number for any key: a run refuses it in one line, before a model is loaded, or takes its step and saves."""

import json
import math
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava.config.schema import all_keys
from llava.train.train import train
from tests import tiny

EXAMPLES = 100 if os.environ.get("LLAVA_LONG_TESTS") else 2
# what is drawn of keys whose larger numbers ask for much time or memory, rightly
BOUNDS = {
    "per_device_train_batch_size": 6,
    "gradient_accumulation_steps": 3,
    "max_steps": 2,
    "num_train_epochs": 1,
    "dataloader_num_workers": 1,
    "dataloader_prefetch_factor": 4,
    "lora_r": 64,
    "frames_upbound": 6,
    "min_pixels": 28 * 28 * 9,
    "max_pixels": 28 * 28 * 9,
    "compression_input_size": 5,
    "compression_output_size": 5,
}
EDGES = (-1, 0, 1, 2, 3, 0.5, 1e-30, 0.999, 1.0, 1.5, 100, 2**31, 2**32 - 1, 2**62, 1e30, math.nan, math.inf, -0.5)
ALONE = ("local_rank",)  # a launcher's, not a user's
# what has its place in a model or its data, or a package of its own: not at the ends of its range in every run
SHAPED = {"bits", "model_max_length", "mm_vision_select_layer", "compression_input_size", "compression_output_size"}
SHAPED |= {"min_pixels", "max_pixels", "max_steps", "neftune_noise_alpha", "label_smoothing_factor"}
SHAPED |= {"dataloader_num_workers", "mm_spatial_pool_stride"}
SHAPED |= {"image_size", "vision_tower_stage", "mm_vision_tower_trainable_blocks", "mm_vision_tower_layer_decay"}


def values(name: str):
    """A strategy for one key: edges of ranges, and any number between its bounds."""
    key = all_keys()[name]
    most = BOUNDS.get(name, math.inf)
    edges = st.sampled_from([edge for edge in EDGES if not edge > most])
    between = st.integers(-2, min(most, 10**6)) | st.floats(-1, min(most, 1e6))
    number = edges | between
    if list[float] in key.kinds:
        return st.lists(number, min_size=1, max_size=2)
    return number.map(kind_of(name))


def kind_of(name: str):
    """A function to the kind of number that a key holds; no whole number is NaN."""
    whole = not {float, list[float]} & set(all_keys()[name].kinds)
    return lambda value: int(value) if whole and math.isfinite(value) else value


def fits(name: str):
    """Whether the key's rule takes a value that was drawn for it."""
    key = all_keys()[name]
    return lambda value: key.within.fault(value) is None


NUMBERS = [
    key.name
    for key in all_keys().values()
    if {int, float, list[float]} & set(key.kinds) and not key.only_default and key.name not in ALONE
]
PATCHES = ("patch_alpha", "patch_thresholds")
LLAVA = [name for name in NUMBERS if name not in PATCHES]


@pytest.fixture(scope="module")
def models(kit):
    """name -> (keys of a run that uses the numbers, the numbers that belong to it)."""
    qwen = tiny.qwen2_vl(kit.folder / "numbers_qwen2_vl")
    own = ("version", "vision_tower", "mm_vision_select_layer", "mm_projector_type", "mm_patch_merge_type")
    own += ("image_aspect_ratio", "image_grid_pinpoints", "mm_use_im_patch_token")
    native = {"vision_tower": kit.hevc_vit, "image_aspect_ratio": "native", "image_grid_pinpoints": None}
    lora = {"mm_tunable_parts": "mm_mlp_adapter,mm_language_model", "lora_enable": True}
    compressed = {"use_token_compression": True, "image_aspect_ratio": "square", "mm_patch_merge_type": "flat"}
    compressed |= {"image_grid_pinpoints": None, "vision_tower": kit.clip_fine}
    compressed |= {"compression_input_size": 4, "compression_output_size": 2}
    not_llava = ("mm_", "rope_", "compression_", "video_", "frames_")
    return {
        "llava": ({"rope_scaling_type": "linear"}, LLAVA),
        "native": (native | {"min_pixels": 784}, LLAVA),
        "lora": (lora, LLAVA),
        "compressed": (compressed, LLAVA),
        "qwen2_vl": (
            dict.fromkeys(own) | {"model_name_or_path": qwen, "patch_selection_method": "v2"},
            [name for name in NUMBERS if not name.startswith(not_llava)],
        ),
    }


def check(kit, capsys, base: dict, numbers: dict, trains: bool = False) -> None:
    """Train with these numbers: exit status 2, one line and no model, or a model (which must be if it `trains`)."""
    out = Path(tempfile.mkdtemp(dir=kit.folder))
    keys = {"max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "steps", "rope_scaling_type": None}
    keys |= base | ({"dataloader_num_workers": 1} if "dataloader_prefetch_factor" in numbers else {}) | numbers
    if "rope_scaling_factor" not in keys:
        keys["rope_scaling_type"] = None
    elif keys["rope_scaling_type"] is None:
        keys["rope_scaling_type"] = "dynamic"
    capsys.readouterr()
    try:
        train(kit.flags(out, "iit", **keys))
    except SystemExit as stop:
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert not trains, error
        assert stop.code == 2 and len(lines) == 1 and "Traceback" not in error, error
        assert not list(out.rglob("*.safetensors"))
    else:
        assert json.loads((out / "trainer_state.json").read_text())["global_step"] >= 1
        assert list(out.glob("*.safetensors"))
    finally:
        shutil.rmtree(out, ignore_errors=True)


MODELS = ("llava", "native", "lora", "compressed", "qwen2_vl")


@pytest.mark.parametrize("end", [min, max])
@pytest.mark.parametrize("model", MODELS)
def test_the_ends_of_all_ranges_train(model, end, kit, models, capsys):
    base, names = models[model]
    numbers = {}
    for name in [name for name in names if name not in SHAPED]:
        right = [edge for edge in map(kind_of(name), EDGES) if fits(name)(edge) and edge <= BOUNDS.get(name, math.inf)]
        numbers[name] = end(right)
    numbers.pop("patch_thresholds", None)  # of another method than the rest
    check(kit, capsys, base, numbers, trains=True)


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_one_line_or_a_run(model, data, kit, models, capsys):
    base, names = models[model]
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=5, unique=True))
    any_number = data.draw(st.integers(0, 4)) == 0  # else those that the keys' rules take
    drawn = {name: values(name) if any_number else values(name).filter(fits(name)) for name in chosen}
    check(kit, capsys, base, {name: data.draw(strategy, label=name) for name, strategy in drawn.items()})
