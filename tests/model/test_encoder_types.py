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
from llava.model.compiled_blocks import compile_blocks, model_blocks
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.hf_facts import FACTS
from llava.tools.hf.layouts import choose_format
from tests.model import small
from tests.support import encoders

COMPRESSED = {"use_token_compression": True, "compression_input_size": 4, "compression_output_size": 2}
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


def test_every_type_is_tried():
    assert set(FACTS) == set(encoders.KINDS) | encoders.WHOLE


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
    states, before = encoders.states(kind, deep, pixels(plain)), encoders.prefix(kind, plain.config)
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


def test_training_mode_changes_nothing(kind, folder):
    """A frozen encoder gives in training what it gives in evaluation."""
    tower = build(folder)
    images = pixels(tower)
    assert tower(images).equal(tower.train()(images))


def gradients(tower):
    tower.zero_grad(set_to_none=True)
    tower(pixels(tower)).square().sum().backward()
    return {name: value.grad.clone() for name, value in tower.named_parameters() if value.grad is not None}


def test_gradient_checkpointing_changes_nothing(kind, folder):
    model = small.model(folder, image_aspect_ratio="pad", mm_patch_merge_type="flat").train()
    tower = model.get_vision_tower().requires_grad_(True)
    plain = gradients(tower)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    blocks = [block for block in tower.blocks() if getattr(block, "gradient_checkpointing", False)]
    assert len(blocks) in ((0, len(tower.blocks())) if kind in encoders.MAPS else (2,))
    again = gradients(tower)
    assert again.keys() == plain.keys()
    assert all(torch.allclose(again[name], plain[name], atol=1e-6) for name in plain)


@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_blocks_change_nothing(kind, tmp_path):
    plain = torch.nn.ModuleDict({"vision_tower": build(encoders.folder(tmp_path / "tower", kind))})
    if not model_blocks(plain, tower_alone=True):
        with pytest.raises(LlavaError, match="torch_compile_tower"):
            compile_blocks(plain, tower_alone=True, backend="eager")
        return
    compiled, images = copy.deepcopy(plain), pixels(plain["vision_tower"])
    torch._dynamo.reset()
    counters.clear()
    assert compile_blocks(compiled, tower_alone=True, backend="eager") > 1
    expected, found = plain["vision_tower"](images), compiled["vision_tower"](images)
    assert counters["stats"]["unique_graphs"] and torch.allclose(found, expected, atol=1e-6)
    torch._dynamo.reset()


def test_compression(kind, folder):
    side = 4 * build(folder).patch_size
    if kind in encoders.FIXED:
        with pytest.raises(LlavaError, match=r"image_size: found .*do not interpolate"):
            build(folder, image_size=side, **COMPRESSED)
        return
    if kind == "cvt":  # 24 channels wide here
        with pytest.raises(LlavaError, match="hidden_dim: found 24, expected a multiple of 32"):
            build(folder, image_size=side, **COMPRESSED)
        return
    tower, plain = build(folder, image_size=side, **COMPRESSED), build(folder, image_size=side)
    images = pixels(tower)
    assert tower(images).equal(tower.token_compressor(plain(images)))
    assert tower(images).shape == (2, 4, tower.hidden_size) and tower.num_patches == 4
    assert tower.token_grid(side, side) == (4, (2, 2))


def test_what_there_is_not_is_refused(kind, folder):
    with pytest.raises(LlavaError, match=r"^s2: found true, expected false: .*hf_vision"):
        build(folder, s2=True, s2_scales="42,84")
    config = SimpleNamespace(image_aspect_ratio="anyres", mm_patch_merge_type="spatial_unpad")
    config.mm_projector_type = "mlp2x_gelu"
    with pytest.raises(LlavaError, match="vision tower of the kind HFVisionBackbone, not CLIP or SigLIP"):
        choose_format(folder, config, build(folder))


def test_buffers_that_no_checkpoint_holds(kind, folder):
    """Whatever loading left in them, they are as the stock model made them."""
    tower = build(folder)
    images, saved = pixels(tower), set(tower.vision_tower.state_dict())
    expected = tower(images)
    for name, buffer in tower.vision_tower.named_buffers():
        if name not in saved:
            buffer.fill_(3)
    tower.reset_buffers()
    assert tower(images).equal(expected)


def test_sizes_of_other_towers_are_refused(tmp_path):
    clip = small.tower(tmp_path / "clip")
    for key in ("image_size", "vision_tower_stage"):
        with pytest.raises(LlavaError, match=f"^{key}: found 56, but .* is of the type clip"):
            build(clip, **{key: 56})
