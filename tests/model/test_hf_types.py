"""The tower for transformers' backbones, from a folder: pixels, stages, halves of larger models, what it refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llava.errors import LlavaError
from llava.model.multimodal_encoder.hf_vision import FACTS
from tests.model import small
from tests.model.hf_encoders import KINDS, MAPS, WHOLE, build, naflex, own_states, stock

ROOT = Path(__file__).parents[2] / "configs" / "towers"
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 50, 3), dtype=np.uint8))
WIDE = Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 70, 3), dtype=np.uint8))


def described(kind, folder, processor=None):
    """A folder with an encoder's config and, if given, its preprocessor_config.json; no weights."""
    folder.mkdir(exist_ok=True)
    stock(kind).config.save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def processor_of(folder, kind, **values):
    from llava.model.multimodal_encoder.builder import build_vision_tower

    settings = {"mm_vision_tower": str(folder), "mm_vision_select_layer": -2, **values}
    return build_vision_tower(settings, delay_load=True).image_processor


def normalised(picture, mean, std):
    pixels = np.asarray(picture, dtype=np.float32) / 255
    return (pixels - np.array(mean, dtype=np.float32)) / np.array(std, dtype=np.float32)


def pixels_of(processor, picture):
    return processor.preprocess(picture, return_tensors="pt")["pixel_values"][0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_pillow(kind, tmp_path):
    """With the published statistics and interpolation, at exactly the size that the encoder sees."""
    side = 64 if kind in MAPS else 42
    processor = processor_of(described(kind, tmp_path), kind, image_size=side)
    resized = PICTURE.resize((side, side), FACTS[kind].resample)
    found = pixels_of(processor, PICTURE)
    assert np.allclose(found, normalised(resized, *FACTS[kind].statistics), atol=1e-5)
    assert processor.crop_size["height"] == side  # where a crop is cut


def test_facts_name_the_types_own_processors():
    """Every one that transformers has for Pillow, by its own table; one that only torchvision has is None."""
    import transformers
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES as LISTED

    named = {kind: FACTS[kind].processor for kind in {*KINDS, *WHOLE}}
    assert all(hasattr(transformers, name) for name in named.values() if name)
    listed = {kind: LISTED[kind].get("pil") for kind in named if kind in LISTED}
    assert len(listed) > 25 and {kind: named[kind] for kind in listed} == listed
    assert named["dinov3_vit"] is named["vjepa2"] is None


PLAIN = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "resample": 2}


@pytest.mark.parametrize(
    ("kind", "size", "squashed"),
    [
        ("vit", {"height": 30, "width": 30}, True),
        ("vit", 30, True),  # as older files say it
        ("deit", 256, True),
        ("dinov2", {"shortest_edge": 256}, False),
        ("dinov2", 256, False),
        ("convnext", {"shortest_edge": 300}, False),  # no margin of 224 / 256 either
        ("sam_vision_model", {"longest_edge": 1024}, True),
        ("dinov3_vit", {"height": 224, "width": 224}, True),
    ],
)
def test_pixels_by_the_folders_own_file(kind, size, squashed, tmp_path):
    side = 64 if kind in MAPS else 42
    processor = processor_of(described(kind, tmp_path, {**PLAIN, "size": size}), kind)
    if squashed:
        expected = WIDE.resize((side, side), Image.BILINEAR)
    else:
        width = int(70 * side / 40)
        left = (width - side) // 2
        expected = WIDE.resize((width, side), Image.BILINEAR).crop((left, 0, left + side, side))
    expected = normalised(expected, PLAIN["image_mean"], PLAIN["image_std"])
    assert np.allclose(pixels_of(processor, WIDE), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "dinov2", "deit", "blip_vision_model", "pvt_v2", "chinese_clip_vision_model"])
def test_the_types_own_processor_is_used(kind, tmp_path):
    """Where it does nothing that the encoder's size forbids; any size of a native picture too."""
    processor = processor_of(described(kind, tmp_path), kind)
    assert type(processor).__name__ == FACTS[kind].processor
    from llava.images.processing import process_native_image

    found = process_native_image(WIDE, processor, (56, 28)).permute(1, 2, 0).numpy()
    expected = normalised(WIDE.resize((56, 28), FACTS[kind].resample), *FACTS[kind].statistics)
    assert np.allclose(found, expected, atol=1e-5)


def test_naflex_sees_what_its_own_processor_shows(tmp_path):
    """Siglip2's cuts patches itself: the same numbers in the same order."""
    from transformers import Siglip2ImageProcessorPil

    from llava.images.processing import process_native_image

    own = Siglip2ImageProcessorPil(patch_size=14, max_num_patches=24)(WIDE, return_tensors="pt")
    h, w = own["spatial_shapes"][0].tolist()
    processor = processor_of(described("siglip2_vision_model", tmp_path), "siglip2_vision_model")
    pixels = process_native_image(WIDE, processor, (14 * w, 14 * h))
    rows = naflex(pixels[None])["pixel_values"][0]
    assert h != w and torch.allclose(rows, own["pixel_values"][0, : h * w], atol=1e-5)


def saved(kind, folder, **changes):
    stock(kind, **changes).save_pretrained(folder)
    return folder


# --- stages ---


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("stage", [1, 3])
def test_a_stage_becomes_tokens_row_by_row(kind, tmp_path, stage):
    tower = build(saved(kind, tmp_path), kind, vision_tower_stage=stage)
    images = small.pixels(1, 3, 64, 64)
    states = own_states(kind, tmp_path, images)
    expected = states[stage - 1 if FACTS[kind].hidden_states == "stages" else stage]
    found = tower(images)
    side, widths = 64 // FACTS[kind].strides[stage - 1], KINDS[kind].get("hidden_sizes", [8, 16, 32, 64])
    widths = KINDS[kind]["embed_dim"] if kind == "cvt" else widths
    assert found.shape == (1, side**2, widths[stage - 1]) == (1, tower.num_patches, tower.hidden_size)
    assert torch.allclose(found[0, side + side // 2 - 1], expected[0, :, 1, side // 2 - 1], atol=1e-5)
    assert torch.allclose(found[0, -2], expected[0, :, -1, -2], atol=1e-5)
    tower.requires_grad_(True)
    unused = {id(p) for module in tower.unused_modules() for p in module.parameters()}
    tower(images).square().sum().backward()
    assert all((p.grad is None) == (id(p) in unused) for p in tower.parameters())
    last = len(tower.facts.stage_strides(tower.config))
    with pytest.raises(LlavaError, match=f"vision_tower_stage: found 5, expected 1 to {last}"):
        build(tmp_path, kind, vision_tower_stage=5)


def test_stages_are_for_feature_maps(tmp_path):
    with pytest.raises(LlavaError, match=r"vision_tower_stage.*no stages"):
        build(saved("dinov2", tmp_path), vision_tower_stage=1)


def test_strides_follow_the_configs_patch(tmp_path):
    tower = build(saved("convnext", tmp_path, patch_size=2), vision_tower_stage=2)
    assert tower.patch == 4 and tower(small.pixels(1, 3, 64, 64)).shape == (1, 256, 16)


def test_pictures_too_small_for_the_windows(tmp_path):
    """Swin's own forward fails there; Swin V2's pads."""
    saved("swin", tmp_path / "swin", window_size=2)
    assert build(tmp_path / "swin", image_size=64).num_patches == 4
    with pytest.raises(LlavaError, match=r"image_size: found 32, expected 64 or more: .* windows of 2 tokens"):
        build(tmp_path / "swin", image_size=32)
    tower = build(saved("swinv2", tmp_path / "swinv2", window_size=2), image_size=32)
    assert tower(small.pixels(1, 3, 32, 32)).isfinite().all()


# --- weights ---

TEXT = dict(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=16,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
DECODER = dict(hidden_size=16, mlp_dim=16, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=16)
PROMPTS = dict(hidden_size=16, image_size=42, patch_size=14)
# larger model -> (its class, the encoder's type, the rest of its config)
LARGER = {
    "altclip": ("AltCLIPModel", "altclip_vision_model", dict(text_config={**TEXT, "project_dim": 16})),
    "chinese_clip": ("ChineseCLIPModel", "chinese_clip_vision_model", dict(text_config=TEXT)),
    "metaclip_2": ("MetaClip2Model", "metaclip_2_vision_model", dict(text_config=TEXT)),
    "siglip2": ("Siglip2Model", "siglip2_vision_model", dict(text_config=TEXT)),
    "aimv2": ("Aimv2Model", "aimv2_vision_model", dict(text_config=TEXT)),
    "tipsv2": ("Tipsv2Model", "tipsv2_vision_model", dict(text_config=TEXT)),
    "internvl": (
        "InternVLForConditionalGeneration",
        "internvl_vision",
        dict(text_config={**TEXT, "model_type": "qwen2", "num_key_value_heads": 2}),
    ),
    "blip": ("BlipForConditionalGeneration", "blip_vision_model", dict(text_config=TEXT)),
    "blip-2": (
        "Blip2ForConditionalGeneration",
        "blip_2_vision_model",
        dict(
            text_config={**TEXT, "model_type": "opt", "ffn_dim": 32, "word_embed_proj_dim": 32},
            qformer_config={**TEXT, "encoder_hidden_size": 32},
        ),
    ),
    "sam": ("SamModel", "sam_vision_model", dict(mask_decoder_config=DECODER, prompt_encoder_config=PROMPTS)),
    "sam_hq": (
        "SamHQModel",
        "sam_hq_vision_model",
        dict(mask_decoder_config={**DECODER, "vit_dim": 32}, prompt_encoder_config=PROMPTS),
    ),
}


@pytest.mark.parametrize("kind", LARGER)
def test_half_of_a_larger_model(kind, tmp_path):
    """As transformers saves the whole of it: the encoder's weights are found, and give the half's own states."""
    import transformers

    name, half, rest = LARGER[kind]
    whole = getattr(transformers, name)
    torch.manual_seed(0)
    vision = {**KINDS[half], "model_type": half}
    model = whole(whole.config_class(vision_config=vision, projection_dim=16, **rest)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    tower = build(tmp_path)
    classes = (FACTS[kind].name + "Model", FACTS[kind].name + "Encoder")
    own = next(part for part in model.modules() if type(part).__name__ in classes)
    images = small.pixels(1, 3, 42, 42)
    given = naflex(images) if kind == "siglip2" else {"pixel_values": images}
    with torch.no_grad():
        expected = own(**given, output_hidden_states=True).hidden_states[-2].reshape(1, -1, 32)
    assert torch.allclose(tower(images), expected[:, -9:], atol=1e-5)
    assert tower.config.model_type == half and tower.num_patches == 9


def test_every_larger_model_is_tried():
    assert set(LARGER) == WHOLE - {"mlcd"}  # its published checkpoint is the encoder alone


@pytest.mark.parametrize("prefix", ["vision_tower.", "model.vision_tower."])
def test_vision_half_by_prefix(tmp_path, prefix):
    from safetensors.torch import load_file, save_file

    saved("internvl_vision", tmp_path / "half")
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

    saved("dinov2", tmp_path)
    source = load_file(tmp_path / "model.safetensors")
    kept = {k: v for k, v in source.items() if "layer.1." not in k}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LlavaError, match=r"lack \d+ of Dinov2Model's"):
        build(tmp_path)


def test_beit_of_every_make(tmp_path):
    """Absolute positions, one bias for all blocks, a final norm: what its config says, at another size too."""
    changes = dict(
        use_relative_position_bias=False,
        use_shared_relative_position_bias=True,
        use_absolute_position_embeddings=True,
        use_mean_pooling=False,
        use_mask_token=True,
    )
    tower = build(saved("beit", tmp_path, **changes), mm_vision_select_layer=-1, image_size=70)
    images = small.pixels(1, 3, 70, 70)
    assert torch.allclose(tower(images), own_states("beit", tmp_path, images)[-1][:, 1:], atol=1e-5)
    tower.requires_grad_(True)
    unused = {id(p) for module in tower.unused_modules() for p in module.parameters()}
    tower(images).sum().backward()
    assert {n for n, p in tower.named_parameters() if p.grad is None} == {
        name for name, p in tower.named_parameters() if id(p) in unused
    }


# --- configs/towers ---


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.yaml")), ids=lambda path: path.stem)
def test_yaml_of_a_published_encoder(path):
    """Read as the commands do; its resolutions are whole crops of its size."""
    from llava.tools.towers import read_tower

    cfg = read_tower(str(path))
    assert cfg.mm_vision_select_feature == "patch" and path.read_text().startswith("#")
    pairs = cfg.image_grid_pinpoints or []
    side = cfg.image_size or min(pixels for pair in pairs or [[1]] for pixels in pair)
    assert all(pixels % side == 0 for pair in pairs for pixels in pair)


# --- refusals, from config.json alone ---


def test_fixed_positions_are_refused(tmp_path):
    saved("aimv2_vision_model", tmp_path / "fixed", is_native=False)
    assert build(tmp_path / "fixed").num_patches == 9
    with pytest.raises(LlavaError, match="image_size: found 70, expected 42: positions"):
        build(tmp_path / "fixed", image_size=70)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "bert"}, "model_type 'bert', a language model; expected an encoder of pictures"),
        ({"model_type": "llama"}, "'llama', a language model"),
        ({"model_type": "clip_text_model"}, "'clip_text_model', a text model"),
        ({"model_type": "whisper"}, "'whisper', a model of sound"),
        ({"model_type": "detr"}, "'detr', a model for detection"),
        ({"model_type": "yolos"}, "'yolos', a model for detection"),
        ({"model_type": "grounding-dino"}, "'grounding-dino', a model for detection"),
        ({"model_type": "mask2former"}, "'mask2former', a model for segmentation"),
        ({"model_type": "videomae"}, "'videomae', a model of video; expected vjepa2"),
        ({"model_type": "efficientnet"}, "an image classifier whose states are no tokens"),
        ({"model_type": "perception_lm"}, "has through timm only, as timm:vit_pe_"),
        ({"model_type": "timm_wrapper"}, "expected the encoder of timm, as timm:NAME"),
        (
            {"model_type": "dinov9"},
            r"'dinov9', which the installed transformers [\d.]+ does not know; expected a version",
        ),
        ({"model_type": "dinov9", "transformers_version": "9.1"}, r"know \(it was saved by transformers 9.1\)"),
        ({"model_type": "intern_vit_6b", "auto_map": {"AutoModel": "x.Y"}}, "auto_map.*internvl"),
        ({"model_type": "intern_vit_6b"}, "auto_map.*internvl"),
        ({"model_type": "my_vit", "auto_map": {"AutoModel": "x.Y"}}, "'my_vit', code of its own repository"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "found no model_type, code of its own repository"),
        ({}, "config.json has no model_type"),
    ],
)
def test_what_is_no_encoder(config, words, tmp_path):
    """One line, from config.json alone: there are no weights, and none are asked for."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LlavaError, match=words) as fault:
        build(tmp_path)
    assert "\n" not in str(fault.value) and len(str(fault.value)) < 500 and str(tmp_path) in str(fault.value)


def test_a_type_that_the_installed_transformers_lacks(tmp_path, monkeypatch):
    import transformers

    saved("dinov2", tmp_path)
    monkeypatch.setattr(transformers, "Dinov2Model", None)
    with pytest.raises(LlavaError, match=r"'dinov2' is not in the installed transformers [\d.]+, .* Dinov2Model"):
        build(tmp_path)


@pytest.mark.parametrize("name", ["clip", "clip_vision_model", "siglip", "siglip_vision_model", "llava_vit"])
def test_towers_of_their_own_keep_their_types(name):
    from llava.model.multimodal_encoder.builder import TOWERS

    first = next(key for key, entry in TOWERS.items() if name in entry.model_types)
    assert first != "hf_vision" and name not in FACTS
