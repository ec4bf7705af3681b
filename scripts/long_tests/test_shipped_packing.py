"""Every shipped train config, packed and not: the same steps (scripts/test_long.sh). A config packs by default where it
passes here.

The configs run shrunk, on the demo's random models, in float32 and one process; the demos' own also as they are, for 50
steps.
"""

import json
import sys
from pathlib import Path

import pytest

from llava.config import resolve

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu_checks.smoke import make_records, shrunk_flags  # noqa: E402

CONFIGS = sorted((ROOT / "configs/train").glob("*.yaml"))
PLAIN = {"deepspeed": None, "bf16": False, "tf32": None, "attn_implementation": None, "save_strategy": "no"}
PADDED, PACKED = ({"pack_sequences": packed} for packed in (False, True))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    import subprocess

    folder = tmp_path_factory.mktemp("data")
    make_records(folder)
    make = [sys.executable, ROOT / "playground/make_demo_model.py", "--output", folder]
    subprocess.run(make, check=True, cwd=ROOT, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's data and random models, and a first stage of few steps for each family."""
    import subprocess

    folder = tmp_path_factory.mktemp("demo")
    for name in ("make_demo_data.py", "make_demo_model.py"):
        subprocess.run([sys.executable, ROOT / "playground" / name, "--output", folder], check=True, cwd=ROOT)
    return folder


def run(config: Path, flags: dict) -> list[dict]:
    """Loss and gradient norm of each step."""
    from llava.train.train import train

    train([str(config), *(str(word) for key, value in flags.items() for word in (f"--{key}", value))])
    history = json.loads((Path(flags["output_dir"]) / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def check_equal(packed: list[dict], padded: list[dict], steps: int, later: float = 1e-3):
    """Within 1e-5 over the first five steps, within `later` over all."""
    assert len(packed) == len(padded) == steps
    for number, (ours, theirs) in enumerate(zip(packed, padded, strict=True)):
        limit = 1e-5 if number < 5 else later
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=limit), (number, ours, theirs)


@pytest.mark.parametrize("config", CONFIGS, ids=[config.stem for config in CONFIGS])
def test_five_steps(config, data, tmp_path):
    flags = shrunk_flags(config, data, "cpu") | PLAIN | {"max_steps": 5, "logging_steps": 1, "disable_tqdm": True}
    flags |= {"per_device_train_batch_size": 4, "lora_dropout": 0.0}  # dropout falls on other places of other rows
    padded, packed = (
        run(config, flags | way | {"output_dir": tmp_path / str(way["pack_sequences"])}) for way in (PADDED, PACKED)
    )
    check_equal(packed, padded, 5)
    assert packed[0]["perf/pack_efficiency"] == 1 >= padded[0]["perf/pack_efficiency"]
    assert resolve([str(config)])["pack_sequences"], "passes, and is to pack by default"


@pytest.mark.parametrize("name", ["demo", "demo_pretrain", "demo_lora", "demo_qwen2_vl", "demo_qwen2_vl_pretrain"])
def test_fifty_steps_of_the_demos(name, demo, tmp_path):
    config = ROOT / f"configs/train/{name}.yaml"
    settings = resolve([str(config)])
    flags = {"data_path": demo / Path(settings["data_path"]).name, "image_folder": demo / "images", "max_steps": 50}
    flags |= {"model_name_or_path": demo / ("qwen2_vl" if "qwen2_vl" in name else "llm"), "logging_steps": 1}
    if "qwen2_vl" not in name:
        flags["vision_tower"] = demo / "clip_tower"
    flags |= PLAIN | {"disable_tqdm": True, "lora_dropout": 0.0}
    padded, packed = (
        run(config, flags | way | {"output_dir": tmp_path / str(way["pack_sequences"])}) for way in (PADDED, PACKED)
    )
    check_equal(packed, padded, 50)
