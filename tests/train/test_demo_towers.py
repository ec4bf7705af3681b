"""A demo-size LLaVA learns from the demo data with the other towers: a short run of stage 1 each."""

import json
import os

import pytest

from tests.demo.test_make_demo_data import data, load

CONFIG = "configs/train/demo_pretrain.yaml"
TOWERS = [  # tower config, encoder, its model type
    ("demo_hevc_vit_packing_adaptive", "hevc_vit_tower", "llava_vit_packing"),
    ("demo_clip_toconv", "clip_fine_tower", "clip_vision_model"),
]
if os.environ.get("LLAVA_LONG_TESTS"):  # the first one's encoder without adaptive patches
    TOWERS += [("demo_hevc_vit", "hevc_vit_tower", "llava_vit")]
    TOWERS += [("demo_hevc_vit_packing", "hevc_vit_tower", "llava_vit_packing")]
    TOWERS += [("demo_dinov2", "dinov2_tower", "dinov2"), ("demo_aimv2", "aimv2_tower", "aimv2_vision_model")]
    TOWERS += [("demo_siglip2", "siglip2_tower", "siglip2_vision_model")]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A few hundred pictures, and the random models that belong to them."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CANVASES", {"train": (300, 20, 20), "heldout": (60, 20, 20)})
        patch.setattr(data, "HELDOUT", dict.fromkeys(data.HELDOUT, 3))
        patch.setattr(data, "TRAIN_TEXTS", 3)
        data.make(folder, seed=0)
    load("make_demo_model").make(folder, seed=0)
    return folder


@pytest.mark.parametrize(("tower", "encoder", "model_type"), TOWERS)
def test_loss_falls(demo, tmp_path, spy, tower, encoder, model_type):
    from llava.train.train import train

    flags = {
        "tower": f"configs/towers/{tower}.yaml",
        "vision_tower": demo / encoder,
        "model_name_or_path": demo / "llm",
        "data_path": demo / "pretrain.json",
        "image_folder": demo / "images",
        "output_dir": tmp_path / "out",
        "max_steps": 30,
        "per_device_train_batch_size": 32,
        "logging_steps": 5,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    train([CONFIG, *(str(part) for key, value in flags.items() for part in (f"--{key}", value))])
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == 6 and losses[-1] < 0.6 * losses[0]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mm_vision_config"]["model_type"] == model_type
    compressor = {name for name in spy.before if ".token_compressor." in name}
    assert len(compressor) == (4 if "toconv" in tower else 0) and compressor <= spy.moved()
