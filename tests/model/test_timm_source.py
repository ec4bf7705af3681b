"""What is said of an encoder of timm before timm is asked; timm need not be there."""

import sys
from types import SimpleNamespace

import pytest

from llava.errors import LlavaError, OutOfReach
from llava.model.multimodal_encoder.builder import build_vision_tower, tower_type
from llava.model.multimodal_encoder.timm_source import TAKEN, check_args, find_source, missing_weights
from llava.tools.towers import describe

NAMES = ("vit_large_patch14_clip_336.openai", "vit_base_patch16_siglip_224.webli", "/folder/of/clip", "owner/onevision")


@pytest.fixture
def without_timm(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)  # then `import timm` finds nothing


@pytest.mark.parametrize("name", NAMES)
def test_the_prefix_decides(name):
    """Whatever else the name has in it, and before anything is looked for."""
    assert tower_type(SimpleNamespace(), f"timm:{name}") == "timm"
    assert tower_type(SimpleNamespace(mm_vision_tower_type="timm"), f"timm:{name}") == "timm"
    assert tower_type(SimpleNamespace(mm_vision_tower_type="timm+toconv"), f"timm:{name}") == "timm"
    assert tower_type(SimpleNamespace(mm_vision_config={"model_type": "timm"}), name) == "timm"
    with pytest.raises(LlavaError, match=f"mm_vision_tower_type: found 'clip' beside the vision tower timm:{name}"):
        tower_type(SimpleNamespace(mm_vision_tower_type="clip"), f"timm:{name}")


def test_without_timm(without_timm):
    expected = "found no timm installed.*pip install 'llava.timm.'.*torchvision"
    with pytest.raises(OutOfReach, match=expected) as caught:
        build_vision_tower({"mm_vision_tower": "timm:vit_base_patch16_224"}, delay_load=True)
    assert "\n" not in str(caught.value) and "timm:vit_base_patch16_224" in str(caught.value)
    with pytest.raises(OutOfReach, match=expected):
        find_source("timm:/folder")
    row = describe("timm:vit_pe_core_large_patch14_336.fb")
    assert row["loads"] == "needs_extra" and "torchvision" in row["reason"] and row["params"] is None
    stored = {"mm_vision_config": {"model_type": "timm"}, "mm_image_processor_config": {}}
    with pytest.raises(OutOfReach, match=expected):  # a checkpoint of such a tower too
        build_vision_tower({"mm_vision_tower": "timm:x", **stored}, delay_load=True)


def test_timm_that_cannot_be_imported(tmp_path, monkeypatch):
    """As where torchvision was made for another torch."""
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm/__init__.py").write_text('raise RuntimeError("operator torchvision::nms does not exist\\nmore")')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        OutOfReach, match=r"cannot be imported \(RuntimeError: operator torchvision::nms .*exist\)"
    ) as e:
        find_source("timm:vit_base_patch16_224")
    assert "pip install 'llava[timm]'" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("name", TAKEN)
def test_arguments_that_the_tower_says(name):
    check_args({"dynamic_img_size": True})
    instead = f"the key {TAKEN[name]}" if TAKEN[name] else "other names: the tower sets this one"
    with pytest.raises(LlavaError, match=f"tower_args: found {name}, expected {instead}"):
        check_args({name: 1})


def test_keys_of_own_classes():
    with pytest.raises(LlavaError, match=r"vision_tower_image: found .*is of the type timm"):
        build_vision_tower({"mm_vision_tower": "timm:x", "vision_tower_image": {"size": 2}})


def test_missing_weights_are_heard_of():
    import torch.nn as nn

    layer = nn.Linear(2, 2)
    with missing_weights() as missing:
        layer.load_state_dict({"weight": layer.weight.detach()}, strict=False)
        assert missing == ["bias"]
    layer.load_state_dict({}, strict=False)
    assert missing == ["bias"]  # and no more after that
