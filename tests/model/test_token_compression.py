"""Token compression in the towers: what they give, count and refuse, and what trains, is saved and loaded."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from llava.errors import LlavaError
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_encoder.builder import build_vision_tower
from tests import tiny
from tests.model import small

SIDE = 56  # pixels; 4 x 4 patches
COMPRESSED = {"use_token_compression": True, "compression_input_size": 4, "compression_output_size": 2}
TOWERS = ("clip", "siglip", "hevc_vit", "hevc_vit_packing")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    made = {kind: tiny.tower(root / kind, kind=kind, side=SIDE) for kind in ("clip", "siglip", "hevc_vit")}
    return made | {"hevc_vit_packing": made["hevc_vit"]}


def build(folders, kind, **values):
    values = {"mm_vision_tower": folders[kind], "mm_vision_tower_type": kind, "mm_vision_select_layer": -2, **values}
    return build_vision_tower(values)


# --- towers ---


@pytest.mark.parametrize("kind", TOWERS)
def test_tower_is_encoder_then_compressor(folders, kind):
    images = small.pixels(3, 3, SIDE, SIDE)
    tower, plain = build(folders, kind, **COMPRESSED), build(folders, kind)
    expected = tower.token_compressor(plain(images))
    found = tower(images)
    assert found.shape == (3, 4, tower.hidden_size) and torch.equal(found, expected)
    assert (tower.num_patches, tower.num_patches_per_side) == (4, 2) and tower.image_size == SIDE
    assert tower.token_grid(SIDE, SIDE) == (4, (2, 2)) and plain.token_grid(SIDE, SIDE) == (16, (4, 4))
    listed, dims = tower(list(images), return_spatial_dims=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(listed, expected, strict=True)) and dims == [(2, 2)] * 3
    assert tower(list(images), packed=True).shape == (12, tower.hidden_size)


@pytest.mark.parametrize("feature", ["slicefour_patch", "patch"])
def test_width_follows_the_feature_kind(tmp_path, feature):
    folder = tiny.tower(tmp_path / "clip", layers=12, side=SIDE)
    values = {"mm_vision_tower": folder, "mm_vision_select_feature": feature, **COMPRESSED}
    tower = build_vision_tower(values)
    assert tower.token_compressor.hidden_dim == tower.hidden_size == (128 if feature.startswith("slice") else 32)
    assert tower(small.pixels(1, 3, SIDE, SIDE)).shape == (1, 4, tower.hidden_size)


def test_multi_scale_compresses_every_tile(folders):
    """Tiles encoded and compressed one by one, put back, averaged down to the compressed grid, side by side."""
    tower = build(folders, "clip", mm_vision_tower_type="clip_s2", s2_scales="56,112", **COMPRESSED)
    plain = build(folders, "clip")
    images = small.pixels(2, 3, 112, 112)
    found = tower(images)
    assert found.shape == (2, 4, 64) and tower.num_patches == 4
    for image, features in zip(images, found, strict=True):
        columns = []
        for n in (1, 2):
            scaled = image[None]
            if n == 1:
                scaled = F.interpolate(scaled, size=(56, 56), mode="bicubic", align_corners=False)
            whole = torch.zeros(2 * n, 2 * n, 32)
            for i in range(n):
                for j in range(n):
                    tile = scaled[:, :, 56 * i : 56 * i + 56, 56 * j : 56 * j + 56]
                    tokens = tower.token_compressor(plain(tile))[0]
                    whole[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = tokens.view(2, 2, 32)
            columns.append(
                torch.stack([whole[n * y : n * y + n, n * x : n * x + n].mean((0, 1)) for y in (0, 1) for x in (0, 1)])
            )
        assert torch.allclose(features, torch.cat(columns, dim=-1), atol=1e-5)


@pytest.mark.parametrize("kind", TOWERS)
def test_frozen_encoder_learning_compressor(folders, kind):
    tower = build(folders, kind, **COMPRESSED)
    assert not tower.trainable and all(p.requires_grad for p in tower.token_compressor.parameters())
    seen = []
    tower.token_compressor.register_forward_pre_hook(lambda module, args: seen.append(args[0].requires_grad))
    tower(small.pixels(2, 3, SIDE, SIDE)).square().sum().backward()
    assert seen == [False]  # the encoder kept no activations
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tower.token_compressor.parameters())
    assert all(p.grad is None for p in tower.vision_tower.parameters())


@pytest.mark.parametrize("kind", ["hevc_vit", "hevc_vit_packing"])
def test_clip_is_compressed_frame_by_frame(folders, kind):
    tower, plain = build(folders, kind, **COMPRESSED), build(folders, kind)
    clip, image = small.pixels(3, 3, SIDE, SIDE), small.pixels(3, SIDE, SIDE, seed=1)
    found = tower([clip, image])
    frames = plain([clip])[0].unflatten(0, (3, 16))
    assert torch.allclose(found[0], tower.token_compressor(frames).flatten(0, 1), atol=1e-6)
    assert torch.allclose(found[1], tower(image[None])[0], atol=1e-6)


# --- names and refusals ---


def test_named_by_the_tower_type(folders):
    tower = build(folders, "clip", mm_vision_tower_type="clip+toconv", **COMPRESSED | {"use_token_compression": False})
    assert type(tower).__name__ == "CLIPVisionTower" and tower.token_compressor is not None
    assert build(folders, "clip", **COMPRESSED | {"use_token_compression": False}).token_compressor is None
    with pytest.raises(LlavaError, match=r"found 'klip', expected one of .*\+toconv"):
        build(folders, "clip", mm_vision_tower_type="klip+toconv")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"compression_input_size": 24}, "compression_input_size: found 24, expected 4"),
        ({"compression_output_size": 5}, "4x4 -> 5x5"),
        ({"mm_vision_select_feature": "cls_patch"}, "class token"),
    ],
)
def test_what_cannot_be_built_is_refused(folders, changes, words):
    with pytest.raises(LlavaError, match=words):
        build(folders, "clip", **COMPRESSED | changes)


@pytest.mark.parametrize("kind", ["siglip", "hevc_vit"])
def test_towers_without_a_class_token_have_none_to_refuse(folders, kind):
    tower = build(folders, kind, mm_vision_select_feature="cls_patch", **COMPRESSED)
    assert tower(small.pixels(1, 3, SIDE, SIDE)).shape[1] == 4


def test_other_sizes_are_refused(folders):
    tower = build(folders, "hevc_vit_packing", **COMPRESSED)
    with pytest.raises(LlavaError, match=r"28x56 pixels gives 4x2 tokens, expected 4x4 \(compression_input_size\)"):
        tower([small.pixels(3, SIDE, SIDE), small.pixels(3, 56, 28)])


# --- in a model ---


@pytest.mark.parametrize("merge", ["spatial_unpad", "flat"])
def test_counts_and_layout_follow_the_compressed_grid(folders, merge):
    model = small.model(folders["clip"], mm_patch_merge_type=merge, image_grid_pinpoints=[[112, 112]], **COMPRESSED)
    crops = small.pixels(5, 3, SIDE, SIDE)
    tokens = model._visual_tokens([crops], ["image"], [(112, 56)])[0]
    # base 2x2; a 4x4 map, of which the upper and lower quarter are padding, with a newline after each of two rows
    assert len(tokens) == (4 + 2 * (4 + 1) if merge == "spatial_unpad" else 5 * 4)
    assert model.visual_token_counter()(tuple(crops.shape), (112, 56), "image") == len(tokens)
    plain = small.model(folders["clip"], mm_patch_merge_type=merge, image_grid_pinpoints=[[112, 112]])
    assert len(plain._visual_tokens([crops], ["image"], [(112, 56)])[0]) == (
        16 + 4 * (8 + 1) if merge == "spatial_unpad" else 5 * 16
    )


def saved(model, folder):
    model.get_model().describe_vision()
    model.save_pretrained(folder)
    for path in tiny.TOKENIZER.iterdir():
        shutil.copy(path, folder)
    return folder


def load(folder, **options):
    return load_pretrained_model(str(folder), None, "llava_qwen", device_map="cpu", torch_dtype="float32", **options)[1]


@pytest.mark.parametrize("kind", ["clip", "hevc_vit_packing"])
def test_checkpoint_holds_the_compressor(tmp_path, folders, kind):
    model = small.model(folders[kind], mm_vision_tower_type=kind, vocab_size=703, **COMPRESSED)
    folder = saved(model, tmp_path / "llava")
    names = {name for name in load_file(folder / "model.safetensors") if "token_compressor" in name}
    prefix = "model.vision_tower.token_compressor."
    assert names == {prefix + n for n in ("compress_conv.conv.weight", "norm.weight", "norm.bias", "pos_embed")}
    config = json.loads((folder / "config.json").read_text())
    assert (config["use_token_compression"], config["compression_output_size"]) == (True, 2)
    again = load(folder)
    images = small.pixels(2, 3, SIDE, SIDE)
    assert torch.equal(again.get_vision_tower()(images), model.get_vision_tower()(images))


def test_compression_added_at_inference(tmp_path, folders, capsys):
    """A model that was trained without: an untrained compressor with a warning, or the one it is told of."""
    plain = small.model(folders["clip"], vocab_size=703)
    folder = saved(plain, tmp_path / "llava")
    model = load(folder, overwrite_config=dict(COMPRESSED))
    assert "warning" in (printed := capsys.readouterr().out) and "untrained" in printed
    assert all(torch.isfinite(p).all() for p in model.get_vision_tower().token_compressor.parameters())
    assert model.get_vision_tower().token_compressor.norm.weight.eq(1).all()

    donor = build(folders, "clip", **COMPRESSED).token_compressor
    torch.nn.init.normal_(donor.norm.bias)
    save_file(donor.state_dict(), tmp_path / "token_compressor.safetensors")
    source = {"pretrain_token_compressor": str(tmp_path / "token_compressor.safetensors")}
    model = load(folder, overwrite_config=COMPRESSED | source)
    assert "untrained" not in capsys.readouterr().out
    assert torch.equal(model.get_vision_tower().token_compressor.norm.bias, donor.norm.bias)
    images = small.pixels(1, 3, SIDE, SIDE)
    assert torch.allclose(model.get_vision_tower()(images), donor(plain.get_vision_tower()(images)), atol=1e-6)
    with pytest.raises(LlavaError, match="absent"):
        load(folder, overwrite_config=COMPRESSED | {"pretrain_token_compressor": str(tmp_path / "absent.safetensors")})
