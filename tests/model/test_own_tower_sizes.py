"""Encoders of a user's own that take images of any size, several scales (S2), and other dtypes than float32."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import LlavaError
from llava.families import get_family
from llava.families.llava_layout import vision_layout
from llava.families.precision import Precision
from llava.mm_utils import process_images
from llava.model.compiled_blocks import compile_blocks, model_blocks
from llava.model.multimodal_encoder.base import PatchGrid
from llava.model.multimodal_encoder.trial import check_dtype
from tests.model import small
from tests.model.own_encoders import IMAGE, SIDE, TOWER, build, plain_tower, saved, working_folder  # noqa: F401

NATIVE = {"image_aspect_ratio": "native", "min_pixels": 14 * 14, "max_pixels": 20 * 28 * 28}
ANY = """
import torch
import torch.nn as nn

TABLE = torch.linspace(0.5, 1, 32)


class Rows(nn.Module):
    any_size = True

    def __init__(self, wrong=None):
        super().__init__()
        self.wrong = wrong
        self.embed = nn.Conv2d(3, 32, 14, 14)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, images):
        x = self.embed(images).flatten(2).transpose(1, 2)
        x = x + x.mean(1, keepdim=True)
        for layer in self.layers:
            x = x + layer(x).tanh()
        if self.wrong == "float32":
            return x * TABLE.to(x.device)
        if self.wrong == "fails":
            x = self.layers[0](x * TABLE.to(x.device))
        return x[:, :9] if self.wrong == "one size" else x


class Lone(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 14, 14)

    def forward(self, images):
        return self.embed(images)
"""


@pytest.fixture(autouse=True)
def more_classes(here, monkeypatch):
    (here / "sizes.py").write_text(ANY)
    (here / "any.py").write_text(
        TOWER.replace("class Restoring(Forgetful):", "class Restoring(Forgetful):\n    any_size = True")
    )
    monkeypatch.delitem(sys.modules, "sizes", raising=False)


def any_tower(kind, **values):
    if kind == "module":
        return build("sizes.py:Rows", **values).eval()
    return plain_tower("any.py:Restoring", **values).eval()


@pytest.mark.parametrize("kind", ["module", "tower"])
def test_any_size(kind):
    tower = any_tower(kind)
    assert tower.any_size and tower.token_grid == PatchGrid(14)
    images = [small.pixels(3, 28, 70), small.pixels(3, 42, 42, seed=1), small.pixels(3, 28, 70, seed=2)]
    features, grids = tower(images, return_spatial_dims=True)
    assert grids == [(2, 5), (3, 3), (2, 5)] and [len(f) for f in features] == [10, 9, 10]
    for image, feature in zip(images, features, strict=True):
        alone = tower.vision_tower(image[None]) if kind == "module" else tower.encode(image[None])
        assert torch.allclose(feature, alone[0], atol=1e-5)
    if kind == "module":
        with pytest.raises(LlavaError, match=r"takes images in multiples of 14 pixels, got .28, 30."):
            tower(small.pixels(1, 3, 28, 30))


@pytest.mark.parametrize("kind", ["module", "tower"])
def test_native_through_a_model(here, tmp_path, kind):
    """Tokens of each picture's own grid, a newline behind each row; answers after saving and loading are the same."""
    name, changes = "sizes.py:Rows", {"vision_tower_image": IMAGE}
    if kind == "tower":
        name, changes = "encoder", {"mm_vision_tower_type": "any.py:Restoring"}
    model = small.model(name, **NATIVE, **changes)
    model.get_model().describe_vision()
    pictures = [Image.new("RGB", size, (90, 20 * i, 200)) for i, size in enumerate([(84, 56), (28, 140)])]
    images = process_images(pictures, model.get_vision_tower().image_processor, model.config)
    assert [tuple(image.shape[1:]) for image in images] == [(56, 84), (140, 28)]
    counter = model.visual_token_counter()
    sizes = [picture.size for picture in pictures]
    tokens = model._visual_tokens(images, ["image"] * 2, sizes)
    assert [len(t) for t in tokens] == [4 * (6 + 1), 10 * (2 + 1)]
    assert [counter(tuple(i.shape), size) for i, size in zip(images, sizes, strict=True)] == [28, 30]
    row = torch.tensor([[3, IMAGE_TOKEN_INDEX, 4, IMAGE_TOKEN_INDEX, 5]])
    options = dict(images=images, image_sizes=sizes, do_sample=False, max_new_tokens=5, pad_token_id=0)
    expected = model.generate(row, **options)
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved", vision_tower=changes.get("mm_vision_tower_type", name))
    assert again.eval().generate(row, **options).equal(expected)


def test_any_size_that_is_not(here):
    with pytest.raises(
        LlavaError, match=r"returned \[1, 9, 32\], expected tokens \[1, 20, 32\], one a patch, since its"
    ):
        build("sizes.py:Rows", tower_args={"wrong": "one size"})
    text = (here / "any.py").read_text()
    (here / "any.py").write_text(text.replace("[:, len(extra) :]", "[:, len(extra) : len(extra) + 9]"))
    with pytest.raises(
        LlavaError, match=r"returned \[1, 9, 32\] .*expected \[1, 20, 32\]: it says any_size, and 20 tok"
    ):
        any_tower("tower")
    (here / "any.py").write_text(text.replace("[:, len(extra) :]", "[:, len(extra) - 1 :]"))  # a class token of its own
    cfg = {"mm_vision_tower": "encoder", "mm_vision_tower_type": "any.py:Restoring", **NATIVE}
    with pytest.raises(LlavaError, match="native: mm_vision_select_feature cls_patch of encoder has a class token"):
        vision_layout(SimpleNamespace(**cfg, mm_vision_select_feature="cls_patch"))
    with pytest.raises(
        LlavaError, match=r"image_aspect_ratio native: the tower mine.py:Plain takes images of one size"
    ):
        vision_layout(SimpleNamespace(mm_vision_tower="mine.py:Plain", vision_tower_image=IMAGE, **NATIVE))


@pytest.mark.parametrize("kind", ["module", "tower"])
def test_several_scales(tmp_path, kind):
    """Against the formula: the picture at each scale, in tiles of the encoder's own size."""
    scales = {"s2": True, "s2_scales": f"{SIDE},{2 * SIDE}"}
    tower, plain = any_tower(kind, **scales), any_tower(kind)
    tower.vision_tower.load_state_dict(plain.vision_tower.state_dict())
    assert not tower.any_size and tower.hidden_size == 64 and tower.num_patches == 9
    photo = Image.new("RGB", (120, 90), (10, 200, 90))
    pixels = tower.image_processor.preprocess(photo, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 2 * SIDE, 2 * SIDE) and tower(pixels).shape == (1, 9, 64)
    images = small.pixels(2, 3, 2 * SIDE, 2 * SIDE)
    half = F.interpolate(images, size=(SIDE, SIDE), mode="bicubic")
    base = plain(half)
    corners = [
        [plain(images[:, :, y : y + SIDE, x : x + SIDE]).unflatten(1, (3, 3)) for x in (0, SIDE)] for y in (0, SIDE)
    ]
    whole = torch.cat([torch.cat(line, dim=2) for line in corners], dim=1)  # [2, 6, 6, 32]
    pooled = F.avg_pool2d(whole.permute(0, 3, 1, 2), 2).flatten(2).transpose(1, 2)
    assert torch.allclose(tower(images), torch.cat([base, pooled], dim=-1), atol=1e-5)
    name, changes = "encoder", {"mm_vision_tower_type": "any.py:Restoring"}
    if kind == "module":
        name, changes = "sizes.py:Rows", {"vision_tower_image": IMAGE}
    model = saved(tmp_path / "saved", name, **changes, **scales)
    named = changes.get("mm_vision_tower_type", name)
    again = type(model).from_pretrained(tmp_path / "saved", vision_tower=named).eval()
    with torch.no_grad():
        assert again.encode_images(images).equal(model.encode_images(images))
    assert again.get_vision_tower().image_processor.size == model.get_vision_tower().image_processor.size


def test_scales_that_cannot_be(here):
    with pytest.raises(
        LlavaError, match=r"s2_scales: found '336,672,1008', expected multiples of the encoder's 42 pixels"
    ):
        build(s2=True, s2_scales="336,672,1008")
    (here / "any.py").write_text((here / "any.py").read_text().replace("any_size", "sees_time"))
    with pytest.raises(LlavaError, match=r"^s2: found true, but any.py:Restoring sees clips or chooses patches"):
        plain_tower("any.py:Restoring", s2=True, s2_scales="42,84")


# --- dtypes ---


def test_a_class_that_computes_in_half_precision():
    for tower in (build(), build("sizes.py:Rows"), plain_tower()):
        for dtype in (torch.bfloat16, torch.float16):
            check_dtype(tower, "it", dtype)
        assert tower.dtype == torch.float32


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        (
            "float32",
            r"^it: for images \[1, 3, 42, 42\] \(bfloat16, cpu\) it returned .*float32.* the dtype of the images",
        ),
        ("fails", r"^it: with weights and images in bfloat16: RuntimeError: .*dtype"),
    ],
)
def test_a_class_of_float32_alone(wrong, fault, capsys):
    tower = build("sizes.py:Rows", tower_args={"wrong": wrong})
    check_dtype(tower, "it", torch.float32)
    with pytest.raises(LlavaError, match=fault) as found:
        check_dtype(tower, "it", torch.bfloat16)
    assert "\n" not in str(found.value)
    model = SimpleNamespace(get_vision_tower=lambda: tower)
    family, half = get_family("llava"), torch.bfloat16
    family.check_precision(model, Precision(trained=torch.float32, frozen=half))  # trained, under autocast
    assert "warning: vision tower sizes.py:Rows: " in capsys.readouterr().out
    tower.to(half)
    with pytest.raises(LlavaError, match=r"^vision tower sizes.py:Rows: "):
        family.check_precision(model, Precision(trained=half, frozen=half))
    family.check_precision(model, Precision(trained=torch.float32, frozen=torch.float32))


# --- compiled blocks ---


def test_blocks_to_compile():
    model = small.model("sizes.py:Rows", vision_tower_image=IMAGE, image_aspect_ratio="pad")
    layers = list(model.get_vision_tower().vision_tower.layers)
    assert model_blocks(model, tower_alone=True) == layers
    assert {*layers} < {*model_blocks(model)} and len(model_blocks(model)) == 3 + 2
    images = small.pixels(2, 3, SIDE, SIDE)
    with torch.no_grad():
        expected = model.encode_images(images)
        assert compile_blocks(model, tower_alone=True, backend="eager") == 3
        assert torch.allclose(model.encode_images(images), expected, atol=1e-6)
    model = small.model("sizes.py:Lone", vision_tower_image=IMAGE, image_aspect_ratio="pad")
    with pytest.raises(LlavaError, match=r"the vision encoder sizes.py:Lone has no list of modules of one class"):
        compile_blocks(model, tower_alone=True)
