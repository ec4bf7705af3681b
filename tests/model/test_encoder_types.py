"""Every type of encoder that `hf_vision` takes, as a part of a LLaVA model and of its training."""

import copy
import os
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch._dynamo.utils import counters

from llava.errors import LlavaError
from llava.images.processing import process_image
from llava.model.compiled_blocks import compile_blocks
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.hf_facts import FACTS
from llava.tools.hf.layouts import choose_format
from tests.model import small
from tests.support import encoders

COMPRESSED = {"use_token_compression": True, "compression_input_size": 4, "compression_output_size": 2}
# convolutions, whose blocks transformers computes once
WITHOUT_CHECKPOINTING = ("convnext", "convnextv2", "dinov3_convnext", "resnet", "regnet", "cvt")
DEPTH = 12  # that every kind of features has its layers
# types whose blocks are compiled here, which takes seconds each; scripts/test_long.sh tries all
COMPILED = encoders.KINDS if os.environ.get("LLAVA_LONG_TESTS") else ("dinov3_vit", "siglip2_vision_model", "convnext")


@pytest.fixture(scope="module", params=encoders.KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    return encoders.folder(tmp_path_factory.mktemp("encoder") / "tower", kind)


def build(folder, **values):
    return build_vision_tower({"mm_vision_tower": folder, "mm_vision_select_layer": -2, **values}).eval()


def pixels(tower, count=2):
    return small.pixels(count, 3, tower.image_size, tower.image_size)


@pytest.mark.parametrize(("aspect", "merge"), [("pad", "flat"), ("anyres", "spatial_unpad")])
def test_counted_tokens_are_those_of_the_model(kind, folder, aspect, merge):
    pinpoints = "(1x1),...,(2x2)"
    model = small.model(folder, image_aspect_ratio=aspect, mm_patch_merge_type=merge, image_grid_pinpoints=pinpoints)
    tower, count = model.get_vision_tower(), model.visual_token_counter()
    for size in ((90, 40), (30, 60)):
        crops = process_image(Image.new("RGB", size, "red"), tower.image_processor, aspect, pinpoints)
        with torch.no_grad():
            (found,) = model._visual_tokens([crops], ["image"], [size])
        assert len(found) == count(crops.shape, size) > 0 and found.isfinite().all()


def test_kinds_of_features(kind, tmp_path):
    """Those of several layers side by side, from the stock model's hidden states."""
    kinds = {"slicefour_patch": [1, 4, 7, 10], "slicefour_cls_patch": [1, 4, 7, 10]}  # of 13, every third from 3 - 2 on
    kinds["slice_m25811_f6_patch"] = [-2, -5, -8, -11, 6]
    deep = encoders.folder(tmp_path / "tower", kind, **({} if kind in encoders.MAPS else {"num_hidden_layers": DEPTH}))
    plain = build(deep)
    states, before = encoders.own_states(kind, deep, pixels(plain)), encoders.prefix(kind, plain.config)
    for feature, layers in kinds.items():
        if kind in encoders.MAPS or (kind == "radio" and "cls" in feature):
            fault = f"found '{feature}'.*one feature map" if kind in encoders.MAPS else "3 class tokens"
            with pytest.raises(LlavaError, match=f"mm_vision_select_feature.*{fault}"):
                build(deep, mm_vision_select_feature=feature)
            continue
        plain.set_features(SimpleNamespace(mm_vision_select_layer=-2, mm_vision_select_feature=feature))
        expected = torch.cat([states[layer] for layer in layers], dim=-1)
        kept = [expected[:, :1]] * ("cls" in feature and FACTS[kind].prefix(plain.config)[0] == 1)
        found = plain(pixels(plain))
        assert found.shape == (2, plain.num_patches, plain.hidden_size) and plain.hidden_size == 32 * len(layers)
        assert torch.allclose(found, torch.cat([*kept, expected[:, before:]], dim=1), atol=1e-5)


def gradients(tower):
    tower.zero_grad(set_to_none=True)
    tower(pixels(tower)).square().sum().backward()
    return {name: value.grad.clone() for name, value in tower.named_parameters() if value.grad is not None}


def test_gradient_checkpointing_changes_nothing(kind, folder):
    model = small.model(folder, image_aspect_ratio="pad", mm_patch_merge_type="flat").train()
    tower = model.get_vision_tower().requires_grad_(True)
    plain = gradients(tower)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    blocks = [block for block in tower.modules() if getattr(block, "gradient_checkpointing", False)]
    assert bool(blocks) == (kind not in WITHOUT_CHECKPOINTING)
    again = gradients(tower)
    assert again.keys() == plain.keys()
    assert all(torch.allclose(again[name], plain[name], atol=1e-6) for name in plain)


@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_blocks_change_nothing(kind, tmp_path):
    plain = torch.nn.ModuleDict({"vision_tower": build(encoders.folder(tmp_path / "tower", kind))})
    if kind in encoders.MAPS:
        with pytest.raises(LlavaError, match="torch_compile_tower"):
            compile_blocks(plain, tower_alone=True, backend="eager")
        return
    compiled, images = copy.deepcopy(plain), pixels(plain["vision_tower"])
    torch._dynamo.reset()
    counters.clear()
    assert compile_blocks(compiled, tower_alone=True, backend="eager") == 3
    expected, found = plain["vision_tower"](images), compiled["vision_tower"](images)
    assert counters["stats"]["unique_graphs"] and torch.allclose(found, expected, atol=1e-6)
    torch._dynamo.reset()


def test_compression(kind, folder):
    patch, own = build(folder).patch, build(folder).image_size
    side = own if kind in encoders.FIXED else 4 * patch
    if side // patch != 4:
        with pytest.raises(LlavaError, match=f"^compression_input_size: found 4, expected {side // patch}, the side"):
            build(folder, **COMPRESSED)
        return
    tower, plain = build(folder, image_size=side, **COMPRESSED), build(folder, image_size=side)
    images = pixels(tower)
    assert tower(images).equal(tower.token_compressor(plain(images)))
    assert tower(images).shape == (2, 4, tower.hidden_size) and tower.num_patches == 4
    assert tower.token_grid(side, side) == (4, (2, 2))


def test_several_scales(kind, folder):
    """The smallest scale's features, and pooled to their grid those of the four tiles of the next."""
    plain = build(folder, **({"image_size": 64} if kind in encoders.NO_SIZE else {}))
    side, grid = plain.image_size, plain.num_patches_per_side
    tower = build(folder, s2=True, s2_scales=f"{side},{2 * side}", image_size=side)
    images = small.pixels(1, 3, 2 * side, 2 * side)
    small_one = torch.nn.functional.interpolate(images, size=(side, side), mode="bicubic")
    halves = [images[..., y : y + side, x : x + side] for y in (0, side) for x in (0, side)]
    tiles = [plain(half).unflatten(1, (grid, grid)) for half in halves]  # [1, h, w, D]
    whole = torch.cat([torch.cat(tiles[:2], dim=2), torch.cat(tiles[2:], dim=2)], dim=1)
    pooled = whole.unflatten(2, (grid, 2)).unflatten(1, (grid, 2)).mean((2, 4)).flatten(1, 2)
    assert torch.allclose(tower(images), torch.cat([plain(small_one), pooled], dim=-1), atol=1e-5)
    assert tower.hidden_size == 2 * plain.hidden_size and tower.image_size == 2 * side


@pytest.mark.parametrize("kind", ["dinov2", "siglip2_vision_model", "swin"])
def test_there_is_no_class_of_transformers_to_export_to(kind, tmp_path):
    folder = encoders.folder(tmp_path / "tower", kind)
    config = SimpleNamespace(image_aspect_ratio="anyres", mm_patch_merge_type="spatial_unpad")
    config.mm_projector_type = "mlp2x_gelu"
    with pytest.raises(LlavaError, match=r"vision tower of the kind (HFVisionBackbone|Packed), not CLIP or SigLIP"):
        choose_format(folder, config, build(folder))


def test_sizes_of_other_towers_are_refused(tmp_path):
    clip = small.tower(tmp_path / "clip")
    for key in ("image_size", "vision_tower_stage"):
        with pytest.raises(LlavaError, match=f"^{key}: found 56, but .* is of the type clip"):
            build(clip, **{key: 56})
