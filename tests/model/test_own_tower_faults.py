"""What is said of an encoder of a user's own that is wrong, before anything is trained."""

import shutil

import pytest
import torch

from llava.errors import LlavaError
from llava.model.builder import load_pretrained_model
from tests.model.own_encoders import TOWER, build, plain_tower, saved, working_folder  # noqa: F401

RETURNED = r"^mine.py:Plain: for images \[1, 3, 42, 42\] \(float32, {device}\) it returned "


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        ("two dimensions", r"\[1, 32\] \(float32, {device}\), expected \[1, any, any\]: \[B, N, D\]"),
        ("tuple", "a tuple, expected a tensor"),
        ("dtype", r"\[1, 9, 32\] \(float64, {device}\), expected the dtype of the images"),
    ],
)
def test_what_a_module_returns(device, wrong, fault):
    with torch.device(device), pytest.raises(LlavaError, match=(RETURNED + fault).format(device=device)):
        build(tower_args={"wrong": wrong}, delay_load=True)


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        ("class token", r"it returned \[1, 10, 32\], expected .*no class token"),
        ("nan", "288 of its 288 values not finite"),
        ("device", r"\(float32, meta\), expected the device of the images"),
        ("raises", r"^vision tower mine.py:Plain: KeyError: 'lost' \(line \d+ of .*mine.py\)$"),
    ],
)
def test_what_a_module_does(wrong, fault):
    with pytest.raises(LlavaError, match=fault) as found:
        build(tower_args={"wrong": wrong})
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("name", "values", "fault"),
    [
        ("gone.py:Plain", {}, "found no file gone.py"),
        ("mine.py:Plan", {}, "mine.py defines no class Plan, expected one of Plain, Map, NoForward"),
        ("mine.py:change", {}, "defines no class change"),
        ("mine.py", {}, "expected the class in it too: mine.py:CLASS"),
        ("gone.vit:Plain", {}, "found no module gone"),
        ("mine.py:NoForward", {}, "lacks forward"),
        ("mine.py:NoWeights", {}, "has no parameters"),
        ("mine.py:NoModule", {}, "no nn.Module"),
        ("mine.py:Plain", {"vision_tower_image": None}, "vision_tower_image: missing; mine.py:Plain.*size: 224"),
        (
            "mine.py:Plain",
            {"vision_tower_image": {"size": 42}},
            "vision_tower_image: found no mean, std, interpolation",
        ),
        ("mine.py:Plain", {"tower_args": {"wide": 3}}, "tower_args: mine.py:Plain: .*'wide'; it takes width, wrong"),
        ("mine.py:Plain", {"mm_vision_select_feature": "cls_patch"}, "expected patch: mine.py:Plain is a plain"),
        ("mine.py:Plain", {"mm_vision_tower_type": "clip"}, "expected one of the two"),
        ("mine.py:Plain", {"s2": True}, "^s2_scales: found '336,672,1008', expected multiples of the encoder's 42"),
        ("towers.py:Half", {}, "Half lacks build_empty, encode, load_model"),
        ("x", {"mm_vision_tower_type": "klip"}, "found 'klip', expected one of .*FILE.py:Class"),
        ("x", {"mm_vision_tower_type": "clip", "tower_args": {"a": 1}}, "^tower_args: .*x is of the type clip"),
    ],
)
def test_faults(name, values, fault):
    with pytest.raises(LlavaError, match=fault) as found:
        build(name, **values)
    assert "\n" not in str(found.value)


def test_code_that_fails(here):
    (here / "odd.py").write_text("import torch\nclass A:\n    pass\n1 / 0\n")
    with pytest.raises(
        LlavaError, match=r"cannot be imported: ZeroDivisionError: division by zero \(line 4 of .*odd.py"
    ):
        build("odd.py:A")
    (here / "odd.py").write_text("class A\n")
    with pytest.raises(LlavaError, match="is not Python"):
        build("odd.py:A")
    (here / "quiet.py").write_text("import torch\ntorch.ran += 1\n")  # the class is not there: nothing is run
    with pytest.raises(LlavaError, match="defines no class A"):
        build("quiet.py:A")
    assert torch.ran == 0


def test_a_tower_that_forgets_its_config(here, tmp_path):
    saved(tmp_path / "saved", "encoder", mm_vision_tower_type="towers.py:Forgetful")
    shutil.rmtree(here / "encoder")
    with pytest.raises(LlavaError, match=r"FileNotFoundError.*read_config is to take .* mm_vision_config"):
        load_pretrained_model(str(tmp_path / "saved"), None, "llava_qwen", vision_tower="towers.py:Forgetful")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (
            "        return states[layer]",
            r"returned \[1, 12, 32\] .*, expected \[1, 9, 32\]: B images, 9 tokens of each",
        ),
        ("        return states[layer][:, 3:, :8]", r"returned \[1, 9, 8\] .*, expected \[1, 9, 32\]"),
        ("        return states[layer][:, 3:] / 0 * 0", "288 of its 288 values not finite"),
        ("        return [states[layer]]", "returned a list, expected a tensor"),
    ],
)
def test_what_a_tower_returns(here, change, fault):
    text = TOWER.replace("        return states[layer][:, len(extra) :]", change)
    assert text != TOWER
    (here / "towers.py").write_text(text)
    with pytest.raises(LlavaError, match=fault):
        plain_tower()


def test_a_tower_without_an_image_size(here):
    (here / "towers.py").write_text(TOWER.replace("self.config = values", 'self.config = {"patch_size": 14}'))
    with pytest.raises(LlavaError, match=r"read_config set a config without image_size, hidden_size|config: no"):
        plain_tower()
