"""The tower for any vision backbone of transformers, against the stock models' own forward."""

import shutil

import pytest
import torch
from PIL import Image

from llava.errors import LlavaError
from llava.model.multimodal_encoder.builder import TOWERS
from llava.model.multimodal_encoder.hf_facts import REMOTE
from llava.model.multimodal_encoder.hf_states import KINDS as STATES
from llava.model.multimodal_encoder.hf_vision import FACTS
from tests.model import small
from tests.support.encoders import (
    FIXED,
    KINDS,
    MAPS,
    WHOLE,
    build,
    expected_tokens,
    own_states,
    prefix,
    side_of,
    stock,
)

SEVERAL = ("radio", "pixio")  # class tokens


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "tower"
    stock(kind).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tower(kind, folder):
    return build(folder, kind)


def larger(kind):
    """Another side than the encoder's own, where it can take one."""
    return side_of(kind) + (0 if kind in FIXED else 32 if kind in MAPS else 28)


def test_every_type_is_tried():
    taken = set(TOWERS["hf_vision"].model_types) - set(REMOTE)
    assert len(taken) > 40 and taken <= set(KINDS) | WHOLE <= set(FACTS)
    assert {FACTS[kind].hidden_states for kind in KINDS} == set(STATES)


def check_features(kind, folder, layer, side):
    tower = build(folder, kind, mm_vision_select_layer=layer, image_size=side)
    images = small.pixels(2, 3, side, side)
    expected = expected_tokens(kind, own_states(kind, folder, images), tower.config, layer)
    found = tower(images)
    assert found.shape == expected.shape == (2, tower.num_patches, tower.hidden_size)
    assert torch.allclose(found, expected, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 1e-3  # it looks at the pixels
    count, (h, w) = tower.token_grid(side, side)
    assert count == h * w == tower.num_patches == (side // tower.patch) ** 2
    return tower, images


@pytest.mark.parametrize("layer", [-2, -1])
def test_features_and_gradients_are_the_stock_ones(kind, folder, layer):
    """At the encoder's own size (layer -2), and at another one; what counts as trained gets a gradient."""
    tower, images = check_features(kind, folder, layer, side_of(kind) if layer == -2 else larger(kind))
    tower.requires_grad_(True)
    unused = {id(p) for module in tower.unused_modules() for p in module.parameters()}
    tower(images).square().sum().backward()
    without = {name for name, p in tower.named_parameters() if p.grad is None}
    assert without == {name for name, p in tower.named_parameters() if id(p) in unused}
    assert len(without) < sum(1 for _ in tower.parameters())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in MAPS])
def test_class_token(kind, tmp_path):
    stock(kind).save_pretrained(tmp_path)
    if kind in SEVERAL:
        with pytest.raises(LlavaError, match="class tokens"):
            build(tmp_path, mm_vision_select_feature="cls_patch")
        return
    tower = build(tmp_path, mm_vision_select_feature="cls_patch")
    images = small.pixels(1, 3, 42, 42)
    states = own_states(kind, tmp_path, images)
    patches = expected_tokens(kind, states, tower.config, -2)
    found = tower(images)
    if prefix(kind, tower.config) == 0:
        assert torch.allclose(found, patches, atol=1e-5) and tower.num_patches == patches.shape[1]
        return
    assert torch.allclose(found[:, 0], states[-2][:, 0], atol=1e-5)
    assert torch.allclose(found[:, 1:], patches, atol=1e-5)
    assert tower.num_patches == found.shape[1] == tower.token_grid(42, 42)[0]


def test_training_mode_changes_nothing(kind, folder, tower):
    """A frozen encoder is in it too: no block is dropped, no statistics of a batch are taken."""
    images = small.pixels(2, 3, tower.side, tower.side)
    before = tower(images)
    buffers = {name: buffer.clone() for name, buffer in tower.named_buffers()}
    assert tower.train()(images).equal(before) and tower.training
    assert all(buffer.equal(buffers[name]) for name, buffer in tower.named_buffers())
    tower.eval()


def test_save_and_load(kind, folder, tmp_path):
    """A whole checkpoint, at another size, when the encoder's folder is gone."""
    source = shutil.copytree(folder, tmp_path / "encoder")
    side = larger(kind)
    model = small.model(source, image_aspect_ratio="pad", mm_patch_merge_type="flat", image_size=side)
    model.get_model().describe_vision()
    with torch.no_grad():
        for parameter in model.get_vision_tower().parameters():
            parameter.mul_(1.01)
    model.save_pretrained(tmp_path / "saved")
    shutil.rmtree(source)
    again = type(model).from_pretrained(tmp_path / "saved").eval()
    before, after = model.get_vision_tower(), again.get_vision_tower()
    images = small.pixels(2, 3, side, side)
    assert type(after.image_processor) is type(before.image_processor) and after.side == side
    assert after.image_processor.to_dict() == before.image_processor.to_dict()
    with torch.no_grad():
        for found, expected in ((after, before), (again.encode_images, model.encode_images)):
            # close: where a weight lies in memory decides how convolutions are summed
            scale = max(1, expected(images).abs().max().item())
            assert torch.allclose(found(images), expected(images), atol=1e-5 * scale)


def test_buffers_that_no_checkpoint_holds(kind, tower):
    """They come back as the encoder made them, whatever loading left in them."""
    saved = set(tower.vision_tower.state_dict())
    buffers = {name: b for name, b in tower.vision_tower.named_buffers() if name not in saved}
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    for buffer in buffers.values():
        buffer.zero_()
    tower.reset_buffers()
    assert all(buffer.equal(before[name]) for name, buffer in buffers.items())
    assert bool(buffers) == (kind in BUFFERS)


BUFFERS = {"dinov3_vit", "mlcd_vision_model", "metaclip_2_vision_model", "altclip_vision_model", "swin", "swinv2"}
BUFFERS |= {"chinese_clip_vision_model", "aimv2_vision_model"}


def test_sizes(kind, folder, tower):
    patch, side = tower.patch, tower.side
    wide = small.pixels(1, 3, side, side + patch)
    if tower.any_size:
        expected = own_states(kind, folder, wide)[-2][:, prefix(kind, tower.config) :]
        assert torch.allclose(tower(wide), expected, atol=1e-5)
        assert tower.token_grid(side, side + patch)[0] == expected.shape[1]
        mixed = tower([wide[0], small.pixels(3, side, side), wide[0]])
        assert torch.allclose(mixed[2], expected[0], atol=1e-5) and len(mixed[1]) == (side // patch) ** 2
    else:
        with pytest.raises(LlavaError, match=f"takes images of {side}x{side} pixels"):
            tower(wide)
    fixed = f"{side}: positions of this {kind} do not interpolate"
    multiple = f"a multiple of {patch} "
    with pytest.raises(
        LlavaError, match=f"image_size: found {side + 1}, expected {fixed if kind in FIXED else multiple}"
    ):
        build(folder, image_size=side + 1)


@pytest.mark.parametrize("kind", ["dinov2", "siglip2_vision_model", "radio", "pixio", "tipsv2_vision_model"])
def test_native_through_the_model(tmp_path, kind):
    """Pictures of any size as the pipeline makes them: every token of each comes out."""
    from llava.images.processing import process_image
    from llava.model.visual_merge import native_resolution

    stock(kind).save_pretrained(tmp_path / "t")
    model = small.model(tmp_path / "t", image_aspect_ratio="native", mm_patch_merge_type="flat")
    model.get_model().describe_vision()
    model.config.min_pixels, model.config.max_pixels = 14 * 14, 70 * 70
    tower = model.get_vision_tower()
    pictures = [Image.new("RGB", size, colour) for size, colour in (((60, 30), "red"), ((28, 42), "blue"))]
    native = native_resolution(model.config)
    images = [process_image(picture, tower.image_processor, "native", native=native) for picture in pictures]
    assert [tuple(image.shape[1:]) for image in images] == [native(*picture.size)[::-1] for picture in pictures]
    with torch.no_grad():
        features = model.encode_images(images)
    assert [len(f) for f in features] == [i.shape[1] * i.shape[2] // 196 for i in images] and len(features[0]) > 1
    model.config.min_pixels = model.config.max_pixels = 14 * 14 - 1
    with pytest.raises(LlavaError, match="at least 196, the smallest image this model takes"):
        native_resolution(model.config)
