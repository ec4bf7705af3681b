"""Vision towers against the encoders of transformers that they are made of."""

import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from llava.errors import LlavaError
from llava.model.multimodal_encoder.builder import build_vision_tower
from tests import tiny
from tests.model import small
from tests.support import encoders

SIDE = 42  # pixels; 3 x 3 patches


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny.tower(tmp_path_factory.mktemp("clip_vision"), layers=12, side=SIDE)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    return tiny.tower(tmp_path_factory.mktemp("sig_encoder"), kind="siglip", layers=3, side=SIDE)


def build(folder, **values):
    return build_vision_tower({"mm_vision_tower": str(folder), "mm_vision_select_layer": -2, **values})


def stock_states(folder, images, kind="clip"):
    from transformers import CLIPVisionModel, SiglipVisionModel

    stock = (CLIPVisionModel if kind == "clip" else SiglipVisionModel).from_pretrained(folder).eval()
    with torch.no_grad():
        return stock(images, output_hidden_states=True).hidden_states


def close(a, b):
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("layer", [-1, -2, 0, 5])
@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
def test_clip_is_the_stock_hidden_state(clip, layer, feature):
    images = small.pixels(2, 3, SIDE, SIDE)
    tower = build(clip, mm_vision_select_layer=layer, mm_vision_select_feature=feature)
    expected = stock_states(clip, images)[layer]
    expected = expected[:, 1:] if feature == "patch" else expected
    assert close(tower(images), expected)
    assert tower.num_patches == expected.shape[1] and tower.hidden_size == expected.shape[2]
    assert tower.num_patches_per_side == 3 and tower.image_size == SIDE
    assert tower.token_grid(SIDE, SIDE) == (expected.shape[1], (3, 3) if feature == "patch" else None)
    assert pickle.loads(pickle.dumps(tower.token_grid))(SIDE, SIDE) == tower.token_grid(SIDE, SIDE)
    assert tower.dummy_feature.shape == (1, expected.shape[2])


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize(
    "feature, picked",
    [("slicefour", {-1: (2, 5, 8, 11), -2: (1, 4, 7, 10)}), ("slice_m25811_f6", {-1: (11, 8, 5, 2, 6)})],
)
def test_clip_layers_side_by_side(clip, layer, feature, picked):
    """13 hidden states: every third, four of them; or -2, -5, -8, -11 and 6 whatever the layer."""
    images = small.pixels(2, 3, SIDE, SIDE)
    states = stock_states(clip, images)
    expected = torch.cat([states[i] for i in picked.get(layer, picked[-1])], dim=-1)
    tower = build(clip, mm_vision_select_layer=layer, mm_vision_select_feature=f"{feature}_patch")
    assert close(tower(images), expected[:, 1:])
    assert tower.hidden_size == expected.shape[-1] and tower.num_patches == 9
    tower.set_features(SimpleNamespace(mm_vision_select_layer=layer, mm_vision_select_feature=f"{feature}_cls_patch"))
    assert close(tower(images), expected)
    assert tower.num_patches == 10


@pytest.mark.parametrize("layer", [-2, -1, 0])
def test_siglip_is_layer_minus_two(siglip, layer):
    """Whatever mm_vision_select_layer says, and whatever the feature: there is no class token."""
    images = small.pixels(2, 3, SIDE, SIDE)
    tower = build(siglip, mm_vision_select_layer=layer, mm_vision_select_feature="cls_patch")
    expected = stock_states(siglip, images, "siglip")[-2]
    assert close(tower(images), expected)
    assert (tower.num_patches, tower.hidden_size) == expected.shape[1:]
    assert tower.token_grid(SIDE, SIDE) == (9, (3, 3))
    names = [name for name, _ in tower.named_parameters()]
    assert len(tower.vision_tower.vision_model.encoder.layers) == 2 and not any("head" in name for name in names)
    assert "vision_tower.vision_model.post_layernorm.weight" in names


def test_s2_is_the_slow_formula(clip):
    """Every scale in tiles of the smallest, encoded one by one, put back, averaged down, side by side on channels."""
    tower = build(clip, s2=True, s2_scales="42,84,126")
    assert type(tower).__name__ == "CLIPVisionTowerS2"
    assert tower.hidden_size == 96 and tower.image_size == 126 and tower.num_patches == 9
    assert tower.image_processor.crop_size["height"] == 126 and tower.image_processor.size["shortest_edge"] == 126
    plain = build(clip)
    images = small.pixels(2, 3, 126, 126)
    for image, found in zip(images, tower(images), strict=True):
        columns = []
        for n in (1, 2, 3):
            scaled = image[None]
            if n != 3:
                scaled = F.interpolate(scaled, size=(42 * n, 42 * n), mode="bicubic", align_corners=False)
            whole = torch.zeros(3 * n, 3 * n, 32)
            for i in range(n):
                for j in range(n):
                    tile = scaled[:, :, 42 * i : 42 * i + 42, 42 * j : 42 * j + 42]
                    whole[3 * i : 3 * i + 3, 3 * j : 3 * j + 3] = plain(tile)[0].view(3, 3, 32)
            pooled = torch.stack(
                [whole[n * y : n * y + n, n * x : n * x + n].mean((0, 1)) for y in range(3) for x in range(3)]
            )
            columns.append(pooled)
        assert close(found, torch.cat(columns, dim=-1))
    assert all(close(a, b) for a, b in zip(tower(list(images)), tower(images), strict=True))
    with pytest.raises(LlavaError, match="s2_scales"):
        build(clip, s2=True, s2_scales="40,80")
    with pytest.raises(LlavaError, match="s2_scales"):
        build(clip, s2=True, s2_scales="large")
    with pytest.raises(LlavaError, match="class token"):
        build(clip, s2=True, s2_scales="42,84", mm_vision_select_feature="cls_patch")


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_list_is_a_batch(kind, clip, siglip):
    tower = build({"clip": clip, "siglip": siglip}[kind])
    images = small.pixels(3, 3, SIDE, SIDE)
    batched = tower(images)
    listed = tower(list(images))
    assert isinstance(listed, list) and all(close(a, b) for a, b in zip(listed, batched, strict=True))
    half = tower(images.bfloat16())
    assert half.dtype == torch.bfloat16 and tower.dtype == torch.float32
    assert torch.allclose(half.float(), batched, atol=0.1)


def test_gradients(clip):
    tower = build(clip)
    images = small.pixels(1, 3, SIDE, SIDE)
    assert not tower.trainable and tower(images).grad_fn is None  # frozen when loaded: keeps no activations
    tower.requires_grad_(True)
    unused = {id(p) for module in tower.unused_modules() for p in module.parameters()}
    tower(images).square().sum().backward()
    without = {name for name, p in tower.named_parameters() if p.grad is None}
    assert without == {name for name, p in tower.named_parameters() if id(p) in unused}
    assert any("layers.11." in name for name in without) and not any("layers.10." in name for name in without)
    assert tower.vision_tower.vision_model.embeddings.patch_embedding.weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert tower(images).grad_fn is None


@pytest.mark.parametrize(
    "values, words",
    [
        ({"mm_vision_select_feature": "patches"}, ["mm_vision_select_feature", "patches", "cls_patch"]),
        ({"mm_vision_select_feature": "sliceten_patch"}, ["mm_vision_select_feature", "sliceten_patch"]),
        ({"mm_vision_select_layer": -14}, ["mm_vision_select_layer", "-14", "13 hidden states"]),
        ({"mm_vision_select_layer": 13}, ["mm_vision_select_layer", "13 hidden states"]),
        ({"mm_vision_select_feature": "slicefour_patch", "mm_vision_select_layer": -4}, ["slicefour", "expected 4"]),
        ({"mm_vision_select_feature": "slicefour_patch", "mm_vision_select_layer": 1}, ["slicefour", "expected 4"]),
    ],
)
def test_faults_of_features_are_one_line(clip, values, words):
    with pytest.raises(LlavaError) as fault:
        build(clip, **values)
    assert all(word in str(fault.value) for word in words) and "\n" not in str(fault.value)


def test_too_few_layers_for_five(tmp_path):
    folder = tiny.tower(tmp_path / "clip", layers=9, side=28)
    with pytest.raises(LlavaError, match="10 hidden states"):
        build(folder, mm_vision_select_feature="slice_m25811_f6_patch")


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_wrong_image_size(kind, clip, siglip):
    with pytest.raises(LlavaError, match=r"42x42 pixels, got \(42, 56\)"):
        build({"clip": clip, "siglip": siglip}[kind])(small.pixels(1, 3, 42, 56))


# --- dispatch ---


def test_config_in_any_form(clip):
    from transformers import Qwen2Config

    values = {"mm_vision_tower": clip, "mm_vision_select_layer": -1}
    for config in (values, SimpleNamespace(**values), Qwen2Config(**values), {**values, "vision_tower": "nowhere"}):
        tower = build_vision_tower(config)
        assert type(tower).__name__ == "CLIPVisionTower" and tower.select_layer == -1 and tower.is_loaded
    tower = build_vision_tower({"vision_tower": clip}, delay_load=True)
    assert not tower.is_loaded and tower.select_layer == -2 and tower.select_feature == "patch"
    with pytest.raises(LlavaError, match="mm_vision_tower: missing"):
        build_vision_tower({"mm_vision_tower": None})


def retyped(source, target, model_type):
    """Copy of a tower's folder with another `model_type` (None: taken out)."""
    shutil.copytree(source, target)
    values = json.loads((target / "config.json").read_text())
    values.pop("model_type")
    if model_type:
        values["model_type"] = model_type
    (target / "config.json").write_text(json.dumps(values))
    return target


@pytest.mark.parametrize(
    "name, model_type, expected",
    [
        ("openai-clip", "siglip_vision_model", "SigLipVisionTower"),  # model_type before name
        ("google-siglip", "clip_vision_model", "CLIPVisionTower"),
        ("encoder", "clip_vision_model", "CLIPVisionTower"),
        ("my-siglip-so400m", None, "SigLipVisionTower"),
        ("openai-clip-siglip", None, "SigLipVisionTower"),
        ("laion-large", None, "CLIPVisionTower"),
        ("ShareGPT4V-tower", None, "CLIPVisionTower"),
    ],
)
def test_dispatch(tmp_path, clip, siglip, name, model_type, expected):
    folder = retyped(siglip if expected.startswith("Sig") else clip, tmp_path / name, model_type)
    assert type(build(folder)).__name__ == expected


def test_explicit_type_comes_first(clip, siglip):
    assert type(build(siglip, mm_vision_tower_type="siglip")).__name__ == "SigLipVisionTower"
    assert type(build(clip, mm_vision_tower_type="clip_s2", s2_scales="42,84")).__name__ == "CLIPVisionTowerS2"
    with pytest.raises(LlavaError, match=r"mm_vision_tower_type: found 'klip'.*siglip, clip"):
        build(clip, mm_vision_tower_type="klip")


def test_folders_that_are_no_towers(tmp_path, clip):
    (tmp_path / "clip-empty").mkdir()
    with pytest.raises(LlavaError, match=r"clip-empty.*no config\.json"):
        build(tmp_path / "clip-empty")
    with pytest.raises(LlavaError, match=r"model_type 'efficientnet', an image classifier.*expected an encoder"):
        build(retyped(clip, tmp_path / "clip-not", "efficientnet"))
    with pytest.raises(LlavaError, match=r"/absent': no usable config\.json: no such folder"):
        build(tmp_path / "absent")
    with pytest.raises(LlavaError, match="a name that says nothing"):
        build("nobody/absent")
    with pytest.raises(LlavaError, match=r"no usable config\.json in the hub or its cache"):
        build("nobody/clip-absent")
    bare = shutil.copytree(clip, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    with pytest.raises(LlavaError, match="no weights found"):
        build(bare)
    other = Path(encoders.folder(tmp_path / "other", "dinov2"))
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (Path(clip) / name).exists():
            shutil.copy(Path(clip) / name, other)
    with pytest.raises(
        LlavaError, match=r"its weights lack \d+ of CLIPVisionModel's, such as .*expected an encoder of"
    ):
        build(other, mm_vision_tower_type="clip")
    broken = shutil.copytree(clip, tmp_path / "broken")
    (broken / "config.json").write_text("{")
    with pytest.raises(LlavaError, match="not JSON"):
        build(broken)
    blind = shutil.copytree(clip, tmp_path / "blind")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (blind / name).unlink(missing_ok=True)
    with pytest.raises(LlavaError, match=r"preprocessor_config\.json"):
        build(blind)


# --- weights, whatever they are called ---


def whole_model(kind, folder):
    """Folder of a model with both a text and a vision half; returns its vision half's weights, by bare names."""
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    torch.manual_seed(3)
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
    vision = dict(**sizes, image_size=SIDE, patch_size=14)
    if kind == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    else:
        model = SiglipModel(SiglipConfig(text_config={**text, "projection_size": 32}, vision_config=vision))
    model.save_pretrained(folder)
    return {k: v.clone() for k, v in model.vision_model.state_dict().items()}


def encoder_weights(tower):
    return {k: v for k, v in tower.vision_tower.vision_model.state_dict().items() if "position_ids" not in k}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_folder_of_the_whole_model(tmp_path, kind):
    """As the hub has them: model_type "clip"/"siglip", vision settings nested, the text half's weights beside."""
    processor = shutil.copytree(tiny.tower(tmp_path / "donor", kind=kind, side=SIDE), tmp_path / "whole")
    source = whole_model(kind, tmp_path / "whole")
    assert json.loads((processor / "config.json").read_text())["model_type"] == kind
    tower = build(processor)
    found = encoder_weights(tower)
    assert len(found) > 30 and all(torch.equal(found[key], source[key]) for key in found)
    assert tower.config.image_size == SIDE and tower.hidden_size == 32
    images = small.pixels(1, 3, SIDE, SIDE)
    assert close(tower(images), stock_states(processor, images, kind)[-2][:, -9:])


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_weights_with_and_without_prefix(tmp_path, kind, prefix, clip, siglip):
    folder = shutil.copytree({"clip": clip, "siglip": siglip}[kind], tmp_path / "tower")
    source = {k.removeprefix("vision_model."): v for k, v in load_file(folder / "model.safetensors").items()}
    save_file({prefix + k: v for k, v in source.items()}, folder / "model.safetensors", {"format": "pt"})
    found = encoder_weights(build(folder))
    assert len(found) > 30 and all(torch.equal(found[key], source[key]) for key in found)


@pytest.mark.parametrize(
    ("name", "tokens", "width", "side"),
    [("openai/clip-vit-large-patch14-336", 576, 1024, 336), ("google/siglip-so400m-patch14-384", 729, 1152, 384)],
)
def test_towers_of_released_checkpoints_are_known_offline(name, tokens, width, side):
    """Their config is; their weights come from the checkpoint."""
    with torch.device("meta"):
        tower = build_vision_tower({"mm_vision_tower": name, "mm_vision_select_layer": -2}, delay_load=True)
    assert (tower.num_patches, tower.hidden_size, tower.image_size) == (tokens, width, side)
    assert not tower.is_loaded
    pixels = tower.image_processor.preprocess(Image.new("RGB", (50, 40), (0, 0, 0)), return_tensors="pt")
    assert pixels["pixel_values"].shape == (1, 3, side, side)
    black = -1.0 if "siglip" in name else -0.48145466 / 0.26862954
    assert abs(pixels["pixel_values"][0, 0].mean().item() - black) < 1e-4
