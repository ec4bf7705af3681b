"""Runs with an encoder of timm.

Skipped where timm is missing: bash scripts/test_timm.sh makes an environment that has it.
"""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny

pytest.importorskip("timm", reason="timm brings torchvision: bash scripts/test_timm.sh runs this")

BLOCK = "model.vision_tower.vision_tower.blocks."
EVA = dict(name="eva02_tiny_patch14_224", embed_dim=32, depth=3, num_heads=2, patch_size=14, img_size=tiny.SIDE)


def test_a_run_with_timm(kit, tmp_path, spy):
    """The last block of those used learns; the result loads where the encoder's folder is gone, and goes on."""
    from llava.model.builder import load_pretrained_model

    source = tiny.timm_tower(tmp_path / "encoder", **EVA)
    flags = {"vision_tower": f"timm:{source}", "mm_vision_tower_trainable_blocks": 1, "gradient_checkpointing": True}
    out = kit.run(tmp_path / "out", max_steps=2, **flags)
    moved = {name for name in spy.moved() if "vision_tower" in name}
    assert moved and all(name.startswith(BLOCK + "1.") for name in moved)
    saved = load_file(out / "model.safetensors")
    assert all(saved[name].equal(value.detach()) for name, value in spy.trainer.model.named_parameters())

    shutil.rmtree(source)
    _, model, processor, _ = load_pretrained_model(str(out), None, "llava-qwen", device_map=None, torch_dtype="float32")
    tower, before = model.get_vision_tower(), spy.trainer.model.get_vision_tower().eval()
    assert tower.vision_tower_name == f"timm:{source}" and processor.crop_size["height"] == tiny.SIDE
    images = torch.randn(2, 3, tiny.SIDE, tiny.SIDE)
    with torch.no_grad():
        assert tower(images).equal(before(images.to(before.device)).cpu())
    kit.run(tmp_path / "on", max_steps=1, model_name_or_path=out, **flags)  # which names the tower as before


def test_checkpointing_changes_no_loss_with_timm(kit, tmp_path):
    source = tiny.timm_tower(tmp_path / "encoder", **EVA)
    found = []
    for checkpointing in (False, True):
        flags = {"vision_tower": f"timm:{source}", "gradient_checkpointing": checkpointing, "max_steps": 2}
        out = kit.run(tmp_path / str(checkpointing), mm_vision_tower_layer_decay=0.5, **flags)
        found.append([(step["loss"], step["grad_norm"]) for step in tiny.history(out)])
    assert len(found[0]) == 2 and torch.allclose(torch.tensor(found[0]), torch.tensor(found[1]), atol=1e-5)
