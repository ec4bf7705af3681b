"""Encoders of a user's own: where the class is found, the tower around a plain module, and checkpoints."""

import json
import shutil
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from llava.errors import LlavaError
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_encoder.plain_config import config_values
from llava.model.vision_change import VisionChange
from tests import tiny
from tests.model import small
from tests.model.own_encoders import CHANNELS, IMAGE, SIDE, build, plain_tower, saved, working_folder  # noqa: F401

# --- a plain module ---


@pytest.mark.parametrize("name", ["mine.py:Plain", "mine:Plain", "mine.py:Map"])
def test_features_are_the_modules_own(name):
    tower = build(name).eval()
    images = small.pixels(2, 3, SIDE, SIDE)
    expected = tower.vision_tower(images)
    if name.endswith("Map"):
        expected = torch.stack([expected[:, :, i, j] for i in range(3) for j in range(3)], dim=1)
    assert tower(images).equal(expected) and expected.shape == (2, 9, CHANNELS)
    assert (tower.num_patches, tower.num_patches_per_side, tower.hidden_size) == (9, 3, CHANNELS)
    assert tower.token_grid(SIDE, SIDE) == (9, (3, 3)) and tower.config.patch_size == 14
    assert torch.allclose(tower([images[0], images[1]])[1], expected[1], atol=1e-6)
    with pytest.raises(LlavaError, match=r"takes images of 42x42 pixels, got .56, 42."):
        tower(small.pixels(1, 3, 56, 42))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_pixels_are_pillows(interpolation):
    tower = build(vision_tower_image=IMAGE | {"interpolation": interpolation})
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 90, 3), dtype=np.uint8))
    found = tower.image_processor.preprocess(photo, return_tensors="pt")["pixel_values"][0]
    resized = np.asarray(photo.resize((SIDE, SIDE), getattr(Image.Resampling, interpolation.upper())), np.float32)
    expected = (resized / 255 - np.float32(IMAGE["mean"])) / np.float32(IMAGE["std"])
    assert np.abs(found.numpy() - expected.transpose(2, 0, 1)).max() < 1e-5


def test_weights_of_a_file(tmp_path):
    from safetensors.torch import save_file

    other = {name: torch.randn_like(value) for name, value in build().vision_tower.state_dict().items()}
    save_file(other, tmp_path / "w.safetensors")
    tower = build(vision_tower_weights=str(tmp_path / "w.safetensors"))
    assert all(value.equal(other[name]) for name, value in tower.vision_tower.state_dict().items())
    assert not tower.trainable
    other["gamma"] = torch.ones(33)
    other.pop("lone")
    save_file(other, tmp_path / "w.safetensors")
    fault = r"does not fit mine.py:Plain: gamma is \(33,\), expected \(32,\), lone is missing, expected \(3,\)"
    with torch.device("meta"), pytest.raises(LlavaError, match=fault):
        build(vision_tower_weights=str(tmp_path / "w.safetensors"), delay_load=True)
    with pytest.raises(LlavaError, match=r"none.safetensors: no such file"):
        build(vision_tower_weights="none.safetensors")


def test_the_seed_alone_decides():
    torch.manual_seed(3)
    torch.rand(7)
    first = build().vision_tower.state_dict()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert all(value.equal(first[name]) for name, value in build().vision_tower.state_dict().items())
    assert torch.get_rng_state().equal(state)  # nothing else of the run depends on the encoder


# --- checkpoints ---


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mine.py:Plain", {"vision_tower_image": IMAGE, "tower_args": {"width": 64}}),
        ("mine:Plain", {"vision_tower_image": IMAGE}),
        ("encoder", {"mm_vision_tower_type": "towers.py:Restoring", "tower_args": {"registers": 1}}),
    ],
)
def test_save_and_load_elsewhere(here, tmp_path, monkeypatch, name, changes):
    """Another folder, where the file is, and the encoder's folder is not."""
    model = saved(tmp_path / "saved", name, **changes)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["mm_vision_tower_type"] == changes.get("mm_vision_tower_type", name)
    assert config["mm_vision_tower"] == name and config.get("tower_args") == changes.get("tower_args")
    shutil.move(here, tmp_path / "there")
    shutil.rmtree(tmp_path / "there" / "encoder")
    monkeypatch.chdir(tmp_path / "there")
    sys.modules.pop("mine", None)
    named = changes.get("mm_vision_tower_type", name)
    again = type(model).from_pretrained(tmp_path / "saved", vision_tower=named).eval()
    images = small.pixels(2, 3, SIDE, SIDE)
    with torch.no_grad():
        expected = model.encode_images(images)
        assert again.encode_images(images).equal(expected) and expected.isfinite().all()
    assert again.get_vision_tower().image_processor.to_dict() == model.get_vision_tower().image_processor.to_dict()
    if changes.get("tower_args"):
        assert again.get_vision_tower().tower_args == changes["tower_args"]


def test_where_the_class_is_not(here, tmp_path, monkeypatch):
    """Named by the user, and not there; what came with a checkpoint is not run, from within it neither."""
    model, named = (
        saved(tmp_path / "saved", "mine.py:Plain", vision_tower_image=IMAGE),
        {"vision_tower": "mine.py:Plain"},
    )
    (here / "mine.py").rename(tmp_path / "saved" / "mine.py")
    for folder in (here, tmp_path / "saved"):
        monkeypatch.chdir(folder)
        torch.ran = 0
        with pytest.raises(
            LlavaError, match=r"mine.py:Plain: found .*mine.py, which came with the checkpoint.*copy it"
        ):
            type(model).from_pretrained(tmp_path / "saved", **named)
        assert torch.ran == 0
    tiny.llm(tmp_path / "llm")  # its tokenizer
    for file in (tmp_path / "llm").glob("token*"):
        shutil.copy(file, tmp_path / "saved")
    loaded = load_pretrained_model(
        *(str(tmp_path / "saved"), None, "llava_qwen"),
        **{"device_map": "cpu", "torch_dtype": "float32", "trust_remote_code": True},
    )
    images = small.pixels(2, 3, SIDE, SIDE)
    with torch.no_grad():
        assert loaded[1].get_vision_tower()(images).equal(model.get_vision_tower()(images)) and torch.ran == 1
    (tmp_path / "saved" / "mine.py").unlink()
    with pytest.raises(LlavaError, match=r"^vision tower mine.py:Plain: found no file mine.py.*PYTHONPATH$"):
        type(model).from_pretrained(tmp_path / "saved", **named)


def test_every_kind_of_tower_is_recorded(tmp_path):
    for kind in ("clip", "siglip", "hevc_vit", "hevc_vit_packing"):
        model = small.model(small.tower(tmp_path / "encoder", kind=kind), image_aspect_ratio="pad")
        model.get_model().describe_vision()
        assert model.config.mm_vision_tower_type == kind
    model = small.model(
        small.tower(tmp_path / "encoder"),
        **{"mm_vision_tower_type": "clip+toconv", "compression_input_size": 3, "compression_output_size": 2},
    )
    model.get_model().describe_vision()
    assert model.config.mm_vision_tower_type == "clip+toconv"


def test_another_tower_than_the_checkpoints(tmp_path):
    """What was said of the tower that goes says nothing of the one that comes."""
    model = small.model("mine.py:Plain", vision_tower_image=IMAGE, tower_args={"width": 64}, image_aspect_ratio="pad")
    model.get_model().describe_vision()
    given = SimpleNamespace(vision_tower=small.tower(tmp_path / "clip"), **{"mm_vision_tower_type": None})
    model.get_model().initialize_vision_modules(given)
    config = model.config
    assert type(model.get_vision_tower()).__name__ == "CLIPVisionTower" and config.mm_vision_tower_type == "clip"
    assert not config.tower_args and not config.vision_tower_image


def test_a_moved_file_is_the_same_tower():
    def change(**after):
        before = {
            "mm_vision_tower": "a/mine.py:Plain",
            "mm_vision_tower_type": "a/mine.py:Plain",
            "tower_args": {"w": 1},
        }
        return VisionChange.between(before, {**before, **after}, None)

    assert not change(mm_vision_tower="b/mine.py:Plain").new_tower
    assert not change(mm_vision_tower="mine.py:Plain", mm_vision_tower_type="mine.py:Plain").new_tower
    assert change(mm_vision_tower="b/mine.py:Other").new_tower
    assert change(tower_args={"w": 2}).new_tower


# --- a VisionTower ---


@dataclass
class Sizes:
    image_size: int = 42
    numbers: tuple = (1, 2)


def test_any_object_is_a_config():
    assert config_values(Sizes()) == {"image_size": 42, "numbers": (1, 2)}
    assert config_values(SimpleNamespace(a=[1])) == {"a": [1]} == config_values({"a": [1]})
    with pytest.raises(
        LlavaError, match=r"config's dtype is a dtype, expected what a checkpoint's config.json can hold"
    ):
        config_values({"dtype": torch.float32})
    for kind in (None, "namespace"):
        tower = plain_tower(tower_args={"config": kind})
        assert tower.config.hidden_size == 32 and config_values(tower.config)["patch_size"] == 14


@pytest.mark.parametrize(("layer", "behind"), [(-1, set()), (-2, {2}), (0, {0, 1, 2}), (1, {1, 2})])
def test_what_gets_no_gradient_is_not_trained(layer, behind):
    tower = plain_tower(mm_vision_select_layer=layer)
    blocks = list(tower.vision_tower["blocks"])
    unused = {id(parameter) for part in tower.unused_modules() for parameter in part.parameters()}
    expected = [parameter for i in behind for parameter in blocks[i].parameters()]
    assert unused == {id(parameter) for parameter in expected}
    assert not tower.trainable and all(parameter.grad is None for parameter in tower.parameters())


def test_unused_parts_of_a_plain_module():
    tower = build().train()
    parts = list(tower.unused_modules())
    module = tower.vision_tower
    assert parts[0] is module.behind and list(parts[1].parameters()) == [module.lone] and len(parts) == 2
    assert module.block.training and module.position.device.type == module.scale.device.type == "cpu"


def test_not_counted_as_trained(capsys):
    from llava.train.parts import set_trainable

    model = small.model("mine.py:Plain", vision_tower_image=IMAGE, image_aspect_ratio="pad")
    set_trainable(model, {"mm_vision_tower"})
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and not [name for name in trained if "behind" in name or "lone" in name]
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert f"mm_vision_tower {count / 1e6:.2f}M" in capsys.readouterr().out


def test_an_entry_point(monkeypatch):
    import importlib.metadata as metadata

    point = metadata.EntryPoint("ours", "mine:Plain", "llava.towers")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [point] if group == "llava.towers" else [])
    tower = build("ours")
    assert tower.recorded_type == "ours" and tower.num_patches == 9
    assert not VisionChange.between({"mm_vision_tower": "ours"}, {"mm_vision_tower": "mine:Plain"}, None).new_tower
