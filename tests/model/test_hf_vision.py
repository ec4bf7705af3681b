"""The tower for any vision backbone of transformers, against the stock models' own forward."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from llava.errors import LlavaError
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.hf_facts import PACKED
from llava.model.multimodal_encoder.hf_vision import FACTS
from tests.model import small

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
PLAIN = dict(**SIZES, image_size=42, patch_size=14)
STAGES = dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], image_size=64)
KINDS = {
    "dinov2": PLAIN,
    "dinov2_with_registers": {**PLAIN, "num_register_tokens": 2},
    "dinov3_vit": {**PLAIN, "num_register_tokens": 2},
    "siglip2_vision_model": {**SIZES, "patch_size": 14, "num_patches": 9},
    "aimv2_vision_model": {**PLAIN, "is_native": True},
    "mlcd_vision_model": PLAIN,
    "internvl_vision": {**PLAIN, "image_size": [42, 42], "patch_size": [14, 14]},
    "radio": dict(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=42, patch_size=14, max_img_size=84
    ),
    "convnext": STAGES,
    "convnextv2": STAGES,
    "vit": PLAIN,
    "vit_mae": PLAIN,
    "metaclip_2_vision_model": PLAIN,
    "ijepa": PLAIN,
}
# class tokens, then registers
PREFIX = {"dinov2_with_registers": 3, "dinov3_vit": 3, "siglip2_vision_model": 0, "aimv2_vision_model": 0, "ijepa": 0}
WHOLE = {"siglip2", "aimv2", "metaclip_2", "internvl", "mlcd"}  # the same encoders under their larger models' names


def names(kind):
    import transformers

    return [getattr(transformers, FACTS[kind].name + end) for end in ("Config", "Model")]


def stock(kind, **changes):
    config, model = names(kind)
    torch.manual_seed(1)
    made = model(config(**{**KINDS[kind], **changes})).eval()
    for parameter in made.parameters():  # also those that start at zero, such as positions and layer scales
        torch.nn.init.normal_(parameter, std=0.1)
    return made


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "tower"
    stock(kind).save_pretrained(path)
    return path


def build(folder, **values):
    return build_vision_tower({"mm_vision_tower": str(folder), "mm_vision_select_layer": -2, **values}).eval()


def own_states(kind, folder, images):
    """Hidden states as the stock model gives them, with no code of the tower."""
    model = names(kind)[1].from_pretrained(folder).eval()
    b, _, height, width = images.shape
    if kind == "siglip2_vision_model":
        h, w = height // 14, width // 14
        patches = [
            image[:, 14 * y : 14 * y + 14, 14 * x : 14 * x + 14].permute(1, 2, 0).reshape(-1)
            for image in images
            for y in range(h)
            for x in range(w)
        ]
        rows = torch.stack(patches).view(b, h * w, -1)
        given = dict(
            pixel_values=rows,
            pixel_attention_mask=torch.ones(b, h * w, dtype=torch.long),
            spatial_shapes=torch.tensor([[h, w]] * b),
        )
    else:
        given = {"pixel_values": images}
        if FACTS[kind].interpolates == "asked":
            given["interpolate_pos_encoding"] = True
    if kind == "vit_mae":
        model.config.mask_ratio = 0.0
        given["noise"] = torch.arange(height * width // 196.0).expand(b, -1)
    with torch.no_grad():
        return model(**given, output_hidden_states=True).hidden_states


def prefix(kind, config):
    return config.num_cls_tokens + config.num_registers if kind == "radio" else PREFIX.get(kind, 1)


def test_every_type_is_tried():
    assert set(FACTS) == set(KINDS) | WHOLE | set(PACKED)  # the last in test_packed_vision.py


@pytest.mark.parametrize(("layer", "larger"), [(-2, False), (-1, True)])
def test_features_are_the_stock_ones(kind, folder, layer, larger):
    """At the encoder's own size, and at another one."""
    maps = kind.startswith("convnext")
    side = (64 if maps else 42) + larger * (32 if maps else 28)
    tower = build(folder, mm_vision_select_layer=layer, image_size=side)
    images = small.pixels(2, 3, side, side)
    states = own_states(kind, folder, images)
    if maps:
        expected = torch.stack([states[-1][:, :, y, x] for y in range(side // 32) for x in range(side // 32)], dim=1)
    else:
        expected = states[layer][:, prefix(kind, tower.config) :]
    found = tower(images)
    assert found.shape == expected.shape == (2, tower.num_patches, tower.hidden_size)
    assert torch.allclose(found, expected, atol=1e-5)
    count, (h, w) = tower.token_grid(side, side)
    assert count == h * w == tower.num_patches == (side // tower.patch) ** 2


def test_stages_are_for_feature_maps(tmp_path):
    stock("dinov2").save_pretrained(tmp_path)
    with pytest.raises(LlavaError, match=r"vision_tower_stage.*no stages"):
        build(tmp_path, vision_tower_stage=1)


@pytest.mark.parametrize("kind", ["convnext", "convnextv2"])
@pytest.mark.parametrize("stage", [1, 3])
def test_a_stage_becomes_tokens_row_by_row(kind, tmp_path, stage):
    folder = tmp_path / "tower"
    stock(kind).save_pretrained(folder)
    tower = build(folder, vision_tower_stage=stage)
    images = small.pixels(1, 3, 64, 64)
    expected = own_states(kind, folder, images)[stage]
    found = tower(images)
    side = 64 // (4 * 2 ** (stage - 1))
    assert found.shape == (1, side**2, [8, 16, 24, 32][stage - 1]) == (1, tower.num_patches, tower.hidden_size)
    assert torch.allclose(found[0, side + side // 2 - 1], expected[0, :, 1, side // 2 - 1], atol=1e-5)
    with pytest.raises(LlavaError, match="vision_tower_stage: found 5, expected 1 to 4"):
        build(folder, vision_tower_stage=5)


def test_class_token(kind, folder):
    if kind == "radio":
        with pytest.raises(LlavaError, match="class tokens"):
            build(folder, mm_vision_select_feature="cls_patch")
        return
    tower = build(folder, mm_vision_select_feature="cls_patch")
    images = small.pixels(1, 3, tower.side, tower.side)
    found, plain = tower(images), build(folder)(images)
    if FACTS[kind].prefix(tower.config)[0] == 0:
        assert found.equal(plain) and tower.num_patches == plain.shape[1]
        return
    states = own_states(kind, folder, images)[-2]
    assert torch.allclose(found[:, 0], states[:, 0], atol=1e-5) and torch.allclose(found[:, 1:], plain, atol=1e-5)
    assert tower.num_patches == found.shape[1] == tower.token_grid(tower.side, tower.side)[0]


@pytest.mark.parametrize("layer", [-1, -2])
def test_gradient_reaches_what_counts_as_trained(kind, folder, layer):
    tower = build(folder, mm_vision_select_layer=layer)
    tower.requires_grad_(True)
    unused = {id(p) for module in tower.unused_modules() for p in module.parameters()}
    tower(small.pixels(2, 3, tower.side, tower.side)).square().sum().backward()
    without = {name for name, p in tower.named_parameters() if p.grad is None}
    assert without == {name for name, p in tower.named_parameters() if id(p) in unused}


def test_save_and_load(kind, folder, tmp_path):
    """A whole checkpoint, at another size, when the encoder's folder is gone."""
    source = shutil.copytree(folder, tmp_path / "encoder")
    side = 96 if kind.startswith("convnext") else 70
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
    assert after.image_processor.to_dict() == before.image_processor.to_dict() and after.side == side
    with torch.no_grad():
        assert after(images).equal(before(images)) and again.encode_images(images).equal(model.encode_images(images))


def test_sizes(kind, folder):
    tower = build(folder)
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
    with pytest.raises(LlavaError, match=f"image_size: found {side + 1}, expected a multiple of {patch}"):
        build(folder, image_size=side + 1)


def test_pixels_are_pillow(kind, folder):
    processor = build(folder).image_processor
    side = processor.crop_size["height"]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 50, 3), dtype=np.uint8))
    resized = np.asarray(picture.resize((side, side), FACTS[kind].resample), dtype=np.float32) / 255
    mean, std = (np.array(v, dtype=np.float32) for v in FACTS[kind].statistics)
    found = processor.preprocess(picture, return_tensors="pt")["pixel_values"][0]
    assert np.allclose(found.permute(1, 2, 0).numpy(), (resized - mean) / std, atol=1e-5)


def test_fixed_positions_are_refused(tmp_path):
    stock("aimv2_vision_model", is_native=False).save_pretrained(tmp_path / "fixed")
    assert build(tmp_path / "fixed").num_patches == 9
    with pytest.raises(LlavaError, match="image_size: found 70, expected 42: positions"):
        build(tmp_path / "fixed", image_size=70)


@pytest.mark.parametrize("prefix", ["vision_tower.", "model.vision_tower."])
def test_vision_half_by_prefix(tmp_path, prefix):
    from safetensors.torch import load_file, save_file

    stock("internvl_vision").save_pretrained(tmp_path / "half")
    source = load_file(tmp_path / "half" / "model.safetensors")
    whole = shutil.copytree(tmp_path / "half", tmp_path / "whole")
    text = {"language_model.norm.weight": torch.ones(4)}
    save_file({prefix + k: v for k, v in source.items()} | text, whole / "model.safetensors", {"format": "pt"})
    config = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps({"model_type": "internvl", "vision_config": config}))
    found = build(whole).vision_tower.state_dict()
    assert len(source) > 30 and all(torch.equal(found[key], source[key]) for key in source)


def test_weights_that_lack_blocks_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    stock("dinov2").save_pretrained(tmp_path)
    source = load_file(tmp_path / "model.safetensors")
    kept = {k: v for k, v in source.items() if "layer.1." not in k}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LlavaError, match=r"lack \d+ of Dinov2Model's"):
        build(tmp_path)


def test_types_that_cannot_be(tmp_path, monkeypatch):
    import transformers

    stock("dinov2").save_pretrained(tmp_path)
    with monkeypatch.context() as patched, pytest.raises(LlavaError, match="not in the installed transformers"):
        patched.setattr(transformers, "Dinov2Model", None)
        build(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "intern_vit_6b", "auto_map": {"AutoModel": "x.Y"}}')
    with pytest.raises(LlavaError, match=r"auto_map.*internvl"):
        build(tmp_path)


@pytest.mark.parametrize("kind", ["dinov2", "siglip2_vision_model", "radio"])
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
