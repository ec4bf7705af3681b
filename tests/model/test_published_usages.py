"""Towers and projectors as user code written for LLaVA, LLaVA-NeXT and ToConv calls them."""

import argparse
from collections import namedtuple
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from transformers import CLIPImageProcessorPil, CLIPVisionModel, PreTrainedConfig

from llava.errors import LlavaError
from llava.model.multimodal_encoder import builder
from llava.model.multimodal_encoder.base import VisionTower
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower, CLIPVisionTowerS2
from llava.model.multimodal_encoder.hevc_vit_packing_tower import HEVCViTPackingVisionTower, images_to_packed
from llava.model.multimodal_encoder.plain_config import config_values
from llava.model.multimodal_projector.builder import build_vision_projector
from tests import tiny
from tests.model import small

SIDE = 56  # pixels; 4 x 4 patches


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny.tower(tmp_path_factory.mktemp("clip-vit"), side=SIDE)


@pytest.fixture(scope="module")
def hevc(tmp_path_factory):
    return tiny.tower(tmp_path_factory.mktemp("hevc_vit"), kind="hevc_vit", side=SIDE)


class Args:
    mm_vision_select_layer = -2
    mm_vision_select_feature = "patch"


# --- arguments and attributes ---


@dataclass
class DataArgs:
    mm_vision_select_layer: int = -1
    mm_vision_select_feature: str = "cls_patch"


VALUES = {"mm_vision_select_layer": -1, "mm_vision_select_feature": "cls_patch"}
ARGS = [VALUES, SimpleNamespace(**VALUES), argparse.Namespace(**VALUES), DataArgs(), PreTrainedConfig(**VALUES)]


@pytest.mark.parametrize("args", [*ARGS, MappingProxyType(VALUES)], ids=lambda args: type(args).__name__)
def test_arguments_of_any_kind(clip, args):
    tower = CLIPVisionTower(clip, args, delay_load=True)
    assert (tower.select_layer, tower.select_feature) == (-1, "cls_patch")


@pytest.mark.parametrize("form", [dict, MappingProxyType, lambda values: argparse.Namespace(**values)])
def test_a_whole_config_of_any_kind(clip, form):
    tower = build_vision_tower(form({"mm_vision_tower": clip, **VALUES}), delay_load=True)
    assert type(tower) is CLIPVisionTower and (tower.select_layer, tower.select_feature) == (-1, "cls_patch")


def test_loaded_later(clip):
    tower = CLIPVisionTower(clip, args=Args(), delay_load=True)
    assert not tower.is_loaded and tower.vision_tower_name == clip
    sizes = (tower.hidden_size, tower.num_patches, tower.num_patches_per_side, tower.image_size)
    assert sizes == (32, 16, 4, SIDE) and tower.config.hidden_size == 32
    tower.load_model()
    weights = tower.vision_tower
    tower.load_model()  # no effect the second time
    assert tower.is_loaded and tower.vision_tower is weights and not any(p.requires_grad for p in tower.parameters())
    assert sizes == (tower.hidden_size, tower.num_patches, tower.num_patches_per_side, tower.image_size)
    assert (tower.dtype, tower.device) == (torch.float32, torch.device("cpu"))
    assert tower.dummy_feature.shape == (1, 32) and not tower.dummy_feature.any()
    assert tower.image_processor.crop_size == {"height": SIDE, "width": SIDE}
    tower.to(device="cpu", dtype=torch.float16)
    assert tower.dtype == tower.dummy_feature.dtype == torch.float16


@pytest.mark.parametrize("feature", ["patch", "cls_patch", "slicefour_patch"])
def test_feature_select(tmp_path, clip, feature):
    """Of the tower's own encoder, called as LLaVA's code calls it, and of a stock one."""
    folder = clip if "slice" not in feature else tiny.tower(tmp_path / "clip", layers=12, side=SIDE)
    tower = build_vision_tower({"mm_vision_tower": folder, "mm_vision_select_feature": feature}).eval()
    images = small.pixels(2, 3, SIDE, SIDE)
    with torch.no_grad():
        stock = CLIPVisionModel.from_pretrained(folder).eval()(images, output_hidden_states=True)
        found = tower.vision_tower(images, output_hidden_states=True)
    assert torch.allclose(found.last_hidden_state, stock.last_hidden_state, atol=1e-6)
    assert len(found.hidden_states) == len(stock.hidden_states)
    assert tower.vision_tower(images).hidden_states is None
    assert torch.equal(tower.feature_select(found), tower(images))
    assert torch.allclose(tower.feature_select(stock), tower(images), atol=1e-6)


def test_feature_select_of_the_packed_tower(hevc):
    tower = HEVCViTPackingVisionTower(vision_tower=hevc, args=Args(), delay_load=False)
    images = small.pixels(2, 3, SIDE, SIDE)
    patches, grid_thw = images_to_packed(images, 14)
    with torch.no_grad():
        outs = tower.vision_tower(hidden_states=patches, grid_thw=grid_thw, output_hidden_states=True)
    assert torch.equal(tower.feature_select(outs).view(2, 16, -1), tower(images))


# --- token compression ---


@pytest.mark.parametrize("kind", ["clip", "siglip", "hevc_vit", "hevc_vit_packing", "packed_vision", "hf_vision"])
def test_every_tower_tells_of_its_compression(tmp_path, kind):
    side = 2 * tiny.SIDE
    folder = tiny.tower(tmp_path / kind, kind=kind, side=side)
    plain = build_vision_tower({"mm_vision_tower": folder, "mm_vision_tower_type": kind}, delay_load=True)
    assert plain.use_token_compression is False and plain.token_compressor is None
    assert (plain.compression_input_size, plain.compression_output_size) == (24, 12)  # the keys' defaults
    values = {"mm_vision_tower_type": f"{kind}+toconv", "compression_input_size": 4, "compression_output_size": 2}
    tower = build_vision_tower({"mm_vision_tower": folder, **values}, delay_load=True)
    assert tower.use_token_compression is True and tower.num_patches == 4 and tower.num_patches_per_side == 2
    assert (tower.compression_input_size, tower.compression_output_size) == (4, 2)


@pytest.mark.parametrize("s2", [False, True])
def test_compression_of_a_loaded_model(tmp_path, clip, s2):
    keys = {"use_token_compression": True, "compression_input_size": 4, "compression_output_size": 2}
    keys |= {"s2": True, "s2_scales": f"{SIDE},{2 * SIDE}"} if s2 else {}
    model = small.model(clip, image_aspect_ratio="pad", mm_patch_merge_type="flat", **keys)
    model.get_model().describe_vision()
    model.save_pretrained(tmp_path)
    tower = type(model).from_pretrained(tmp_path).get_vision_tower()
    assert type(tower) is (CLIPVisionTowerS2 if s2 else CLIPVisionTower)
    told = tower.use_token_compression, tower.compression_input_size, tower.compression_output_size
    assert told == (True, 4, 2)
    assert tower(small.pixels(1, 3, tower.image_size, tower.image_size)).shape == (1, 4, 64 if s2 else 32)


# --- a tower of one's own, whose config is any object with plain values ---


class Fields:
    image_size, patch_size, hidden_size = SIDE, 14, 64


class Slots:
    __slots__ = ("hidden_size", "image_size", "patch_size")

    def __init__(self):
        self.image_size, self.patch_size, self.hidden_size = SIDE, 14, 64


@dataclass
class Data:
    image_size: int = SIDE
    patch_size: int = 14
    hidden_size: int = 64


class Stock(PreTrainedConfig):
    model_type = "toy"

    def __init__(self, image_size=SIDE, patch_size=14, hidden_size=64, **rest):
        super().__init__(**rest)
        self.image_size, self.patch_size, self.hidden_size = image_size, patch_size, hidden_size


SIZES = {"hidden_size": 64, "image_size": SIDE, "patch_size": 14}
CONFIGS = [SIZES, MappingProxyType(SIZES), SimpleNamespace(**SIZES), argparse.Namespace(**SIZES), Fields(), Slots()]
CONFIGS += [Data(), Stock(), namedtuple("Tuple", SIZES)(**SIZES)]


def toy(config):
    """Class of a tower with this config."""

    class Toy(VisionTower):
        def read_config(self, args):
            crop = {"height": SIDE, "width": SIDE}
            self.config, self.image_processor = (
                config,
                CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=crop),
            )

        def build_empty(self):
            self.vision_tower = torch.nn.Conv2d(3, 64, 14, 14)

        def load_model(self, device_map=None):
            self.build_empty()
            self.is_loaded = True

        def encode(self, images):
            return self.vision_tower(images).flatten(2).transpose(1, 2)

    return Toy


def start(monkeypatch, clip, config):
    """A model whose tower is replaced by the toy, as a run that names another tower does it."""
    entry = SimpleNamespace(model_types=(), name_parts=("toy",), also_reads=(), load=lambda: toy(config))
    monkeypatch.setitem(builder.TOWERS, "toy", entry)
    model = small.model(clip)
    values = {"vision_tower": "my/toy", "mm_vision_tower_type": "toy", "mm_projector_type": "mlp2x_gelu"}
    values |= {"mm_vision_select_layer": -1, "mm_vision_select_feature": "patch"}
    model.get_model().initialize_vision_modules(SimpleNamespace(**values))
    return model


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_a_new_tower_with_any_config(monkeypatch, tmp_path, clip, config):
    model = start(monkeypatch, clip, config)
    model.save_pretrained(tmp_path)
    tower = type(model).from_pretrained(tmp_path).get_vision_tower()
    assert type(tower).__name__ == "Toy" and tower(small.pixels(2, 3, SIDE, SIDE)).shape == (2, 16, 64)
    assert tower.num_patches == 16 and SIZES.items() <= model.config.mm_vision_config.items()
    assert torch.equal(tower.vision_tower.weight, model.get_vision_tower().vision_tower.weight)


@pytest.mark.parametrize("missing", [*SIZES, "all"])
def test_sizes_that_a_config_does_not_tell(monkeypatch, clip, missing):
    config = None if missing == "all" else {name: size for name, size in SIZES.items() if name != missing}
    expected = "hidden_size" if missing == "all" else missing
    with pytest.raises(LlavaError, match=f"vision tower my/toy: found no {expected} in its config .*, expected one"):
        _ = start(monkeypatch, clip, config).get_vision_tower().num_patches


def test_what_is_computed_is_no_value():
    class Sized:
        image_size = 28
        _kept = 1

        @property
        def tokens(self):
            raise RuntimeError

    assert config_values(Sized()) == {"image_size": 28}


# --- projectors ---


@pytest.mark.parametrize(
    "form",
    [dict, lambda **values: MappingProxyType(values), lambda **values: SimpleNamespace(**values), PreTrainedConfig],
)
def test_projector_of_any_config(form):
    projector = build_vision_projector(form(mm_projector_type="mlp2x_gelu", mm_hidden_size=32, hidden_size=48))
    assert projector(torch.zeros(1, 4, 32)).shape == (1, 4, 48)
    assert build_vision_projector(form(mm_hidden_size=8, hidden_size=6), vision_cfg=None).weight.shape == (6, 8)
    with pytest.raises(LlavaError, match="mm_hidden_size: found none in the config, expected a number of channels"):
        build_vision_projector(form(hidden_size=48))
