"""HEVC-ViT towers, padded and packed, against the encoder they are made of and against each other."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file

from llava.errors import LlavaError
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.hevc_vit_packing_tower import images_to_packed, packed_to_features
from llavavit import LlavaViTModel, LlavaViTPackingModel
from tests import tiny
from tests.model import small

SIDE, PATCH = 42, 14
KINDS = ("hevc_vit", "hevc_vit_packing")
SIZES = [(42, 56), (14, 14), (42, 42), (84, 28), (14, 14)]  # height, width


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Padded folder of an encoder with 13 hidden states."""
    return tiny.tower(tmp_path_factory.mktemp("encoders") / "vit", kind="hevc_vit", layers=12, side=SIDE)


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """The golden padded encoder, patch 16."""
    return "tests/golden/hevc_vit/llava_vit_tiny"


def build(folder, kind, **values):
    values = {"mm_vision_select_layer": -2, **values}
    return build_vision_tower({"mm_vision_tower": str(folder), "mm_vision_tower_type": kind, **values})


def close(a, b, atol=1e-5):
    return a.shape == b.shape and torch.allclose(a, b, atol=atol)


def states_of(folder, pixels):
    model = LlavaViTModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(pixels, output_hidden_states=True).hidden_states


# --- conversions ---


@pytest.mark.parametrize("as_list", [False, True])
def test_images_to_packed_is_the_slow_formula(as_list):
    images = small.pixels(3, 2, 28, 42)
    rows, grid = images_to_packed(list(images) if as_list else images, PATCH)
    assert rows.shape == (3 * 6, 2 * 14 * 14) and grid.tolist() == [[1, 2, 3]] * 3
    at = 0
    for image in images:
        for y in range(2):
            for x in range(3):
                patch = image[:, 14 * y : 14 * y + 14, 14 * x : 14 * x + 14]
                assert torch.equal(rows[at], torch.cat([channel.flatten() for channel in patch]))
                at += 1


def test_packed_samples_of_all_kinds():
    """Images of several sizes and a clip: one sample each, in their order."""
    image, clip = small.pixels(3, 14, 28), small.pixels(4, 3, 28, 14, seed=1)
    rows, grid = images_to_packed([image, clip, image], PATCH)
    assert grid.tolist() == [[1, 1, 2], [4, 2, 1], [1, 1, 2]] and grid.device.type == "cpu"
    assert torch.equal(rows[:2], images_to_packed(image[None], PATCH)[0]) and torch.equal(rows[:2], rows[-2:])
    assert torch.equal(rows[2:-2], images_to_packed(clip, PATCH)[0])
    parts = packed_to_features(rows, grid, batched=False)
    assert [len(part) for part in parts] == [2, 8, 2] and torch.equal(torch.cat(parts), rows)
    batch = small.pixels(5, 3, 28, 28)
    rows, grid = images_to_packed(batch, PATCH)
    assert packed_to_features(rows, grid, batched=True).shape == (5, 4, 3 * 14 * 14)
    assert torch.equal(packed_to_features(rows, grid, batched=True)[3], images_to_packed(batch[3:4], PATCH)[0])


def test_the_walk_of_the_reference():
    rows, grid = images_to_packed(small.pixels(4, 3, 224, 224), 16)
    assert rows.shape == (784, 768) and grid.tolist() == [[1, 14, 14]] * 4
    assert packed_to_features(rows, grid, batched=True).shape == (4, 196, 768)


# --- features ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
@pytest.mark.parametrize("layer", [-1, -2, 0])
def test_batch_is_the_hidden_state(encoder, kind, feature, layer):
    images = small.pixels(2, 3, SIDE, SIDE)
    tower = build(encoder, kind, mm_vision_select_layer=layer, mm_vision_select_feature=feature)
    assert close(tower(images), states_of(encoder, images)[layer])
    assert (tower.num_patches, tower.hidden_size) == (9, 64) and tower.num_patches_per_side == 3
    assert tower.image_size == SIDE and tower.any_size and tower.sees_time
    assert pickle.loads(pickle.dumps(tower.token_grid))(28, 56) == (8, (2, 4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("feature", "picked"), [("slicefour", (1, 4, 7, 10)), ("slice_m25811_f6", (11, 8, 5, 2, 6))])
def test_layers_side_by_side(encoder, kind, feature, picked):
    images = small.pixels(2, 3, SIDE, SIDE)
    states = states_of(encoder, images)
    expected = torch.cat([states[i] for i in picked], dim=-1)
    for ending in ("patch", "cls_patch"):
        tower = build(encoder, kind, mm_vision_select_feature=f"{feature}_{ending}")
        assert close(tower(images), expected) and tower.hidden_size == expected.shape[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_list_of_sizes_is_image_by_image(encoder, kind):
    images = [small.pixels(3, h, w, seed=h * w + i) for i, (h, w) in enumerate(SIZES)]
    tower = build(encoder, kind)
    features, dims = tower(images, return_spatial_dims=True)
    assert dims == [(3, 4), (1, 1), (3, 3), (6, 2), (1, 1)]
    for image, feature, (h, w) in zip(images, features, dims, strict=True):
        assert feature.shape == (h * w, 64)
        assert close(feature, states_of(encoder, image[None])[-2][0])
    batch = small.pixels(2, 3, 28, 42)
    assert tower(batch, return_spatial_dims=True)[1] == [(2, 3)] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_clip_is_one_sample(encoder, kind):
    """Its frames see each other, and images beside it see nothing of it."""
    clip, image = small.pixels(4, 3, 28, 42), small.pixels(3, 28, 42, seed=1)
    found = build(encoder, kind)([clip, image])
    whole = states_of(encoder, clip.transpose(0, 1)[None])[-2][0]
    assert close(found[0], whole) and found[0].shape == (4 * 6, 64)
    assert close(found[1], states_of(encoder, image[None])[-2][0])
    alone = states_of(encoder, clip)[-2].flatten(0, 1)
    assert not torch.allclose(whole, alone, atol=1e-2)


def test_packed_tower_calls_the_encoder_once(encoder, monkeypatch):
    tower = build(encoder, "hevc_vit_packing")
    calls = []
    forward = tower.vision_tower.forward
    monkeypatch.setattr(tower.vision_tower, "forward", lambda *a, **k: calls.append(a[0].shape) or forward(*a, **k))
    tower([small.pixels(3, h, w) for h, w in SIZES])
    assert calls == [(12 + 1 + 9 + 12 + 1, 3 * 14 * 14)]


@pytest.mark.parametrize("kind", KINDS)
def test_golden_encoder(golden, kind):
    """The published implementation's hidden states, through a tower."""
    values = load_file(f"{golden}/io.safetensors")
    tower = build(golden, kind, mm_vision_select_layer=-1)
    assert close(tower(values["image.pixel_values"]), values["image.hidden_states.3"])
    packed = load_file("tests/golden/hevc_vit/llava_vit_packing_tiny/io.safetensors")
    tower = build(golden, kind)
    found = tower([packed[f"packed.image.{i}"] for i in range(4)])
    assert close(torch.cat(found), packed["packed.hidden_states.-2"])


@pytest.mark.parametrize("kind", KINDS)
def test_dtype_and_gradients(encoder, kind):
    tower = build(encoder, kind)
    images = [small.pixels(3, h, w) for h, w in SIZES]
    assert not tower.trainable and tower(images)[0].grad_fn is None
    half = tower([image.bfloat16() for image in images])
    assert half[0].dtype == torch.bfloat16 and torch.allclose(half[0].float(), tower(images)[0], atol=0.1)
    tower.requires_grad_(True)
    unused = {id(p) for module in tower.unused_modules() for p in module.parameters()}
    sum(feature.square().sum() for feature in tower(images)).backward()
    without = {name for name, p in tower.named_parameters() if p.grad is None}
    assert without == {name for name, p in tower.named_parameters() if id(p) in unused}
    assert {name.split(".")[1] for name in without} == {"encoder", "layernorm_post", "head"}
    assert any("layers.11." in name for name in without) and not any("layers.10." in name for name in without)


def test_eager_language_model_means_eager(encoder):
    assert build(encoder, "hevc_vit", _attn_implementation="eager").vision_tower.config._attn_implementation == "eager"
    assert build(encoder, "hevc_vit", _attn_implementation="sdpa").vision_tower.config._attn_implementation == "varlen"


# --- faults ---


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_that_are_no_multiples(encoder, kind):
    tower = build(encoder, kind)
    with pytest.raises(LlavaError, match=r"multiples of 14 pixels, got 30x42, 42x50$"):
        tower([small.pixels(3, h, w) for h, w in [(42, 50), (42, 42), (30, 42)]])
    with pytest.raises(LlavaError, match="got 43x42"):
        tower(small.pixels(2, 3, 43, 42))


def test_too_many_hidden_states_asked_for(golden):
    with pytest.raises(LlavaError, match="4 hidden states"):
        build(golden, "hevc_vit_packing", mm_vision_select_layer=-5)


def test_an_encoder_of_another_kind(tmp_path):
    folder = tiny.tower(tmp_path / "clip")
    with pytest.raises(LlavaError, match=r"config\.json: model_type 'clip_vision_model'"):
        build(folder, "hevc_vit")


# --- which tower, and where its weights and processor come from ---


def typed(source, target, model_type):
    shutil.copytree(source, target)
    values = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**values, "model_type": model_type}))
    return target


@pytest.mark.parametrize(
    ("name", "model_type", "expected"),
    [
        ("encoder", "llava_vit", "HEVCViTVisionTower"),
        ("encoder", "onevision_encoder", "HEVCViTVisionTower"),
        ("encoder", "llava_vit_packing", "HEVCViTPackingVisionTower"),
        ("onevision-packing", "onevision_encoder", "HEVCViTPackingVisionTower"),  # the published rule: the name
        ("openai-clip-hevc_vit", "llava_vit", "HEVCViTVisionTower"),
    ],
)
def test_dispatch(tmp_path, golden, name, model_type, expected):
    source = golden.replace("llava_vit_tiny", "llava_vit_packing_tiny") if "packing" in model_type else golden
    folder = typed(source, tmp_path / "in-packing" / name, model_type)
    tower = build_vision_tower({"mm_vision_tower": str(folder)})
    assert type(tower).__name__ == expected
    pixels = load_file("tests/golden/hevc_vit/llava_vit_tiny/io.safetensors")["image.pixel_values"]
    assert close(tower(pixels), build(golden, "hevc_vit")(pixels))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hub/hevc_vit_packing-x", "packing"),
        ("hub/hevc_vit-x", "hevc_vit_tower"),
        ("hub/onevision-x", "hevc_vit_tower"),
    ],
)
def test_dispatch_by_name_alone(name, expected):
    from llava.model.multimodal_encoder.builder import TOWERS, tower_type

    assert expected in TOWERS[tower_type(object(), name)].path


def test_processor_of_an_encoder_without_one(golden):
    """CLIP's statistics at the encoder's own size; golden folders hold no preprocessor_config.json."""
    processor = build(golden, "hevc_vit").image_processor
    assert processor.crop_size["height"] == 64 and processor.size["shortest_edge"] == 64
    assert list(processor.image_mean) == [0.48145466, 0.4578275, 0.40821073]
    assert list(processor.image_std) == [0.26862954, 0.26130258, 0.27577711]


@pytest.mark.parametrize("kind", KINDS)
def test_llava_checkpoint_holds_the_tower(tmp_path, encoder, kind):
    """Saved, its source gone, loaded: the published names, the same numbers, the same tower."""
    folder = shutil.copytree(encoder, tmp_path / "vit")
    built = small.model(folder, mm_vision_tower_type=kind)
    tower = built.get_vision_tower()
    assert isinstance(tower.vision_tower, LlavaViTPackingModel if "packing" in kind else LlavaViTModel)
    built.get_model().describe_vision()
    built.save_pretrained(tmp_path / "llava")
    shutil.rmtree(folder)
    names = load_file(tmp_path / "llava" / "model.safetensors").keys()
    projection = "qkv" if "packing" in kind else "q_proj"
    assert f"model.vision_tower.vision_tower.encoder.layers.0.self_attn.{projection}.weight" in names
    assert "model.vision_tower.vision_tower.head.probe" in names and not any("inv_freq" in name for name in names)
    again = type(built).from_pretrained(tmp_path / "llava").eval()
    assert type(again.get_vision_tower()) is type(tower)
    images = [small.pixels(3, h, w) for h, w in SIZES]
    for a, b in zip(tower(images), again.get_vision_tower()(images), strict=True):
        assert torch.equal(a, b)
