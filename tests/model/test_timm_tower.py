"""The tower for encoders of timm, against timm's own forward.

Skipped where timm is missing: bash scripts/test_timm.sh makes an environment that has it.
"""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from llava.errors import LlavaError
from llava.model.multimodal_encoder.builder import build_vision_tower
from tests import tiny
from tests.model import small

timm = pytest.importorskip("timm", reason="timm brings torchvision: bash scripts/test_timm.sh runs this")

SIZES = dict(embed_dim=32, depth=3, num_heads=2, patch_size=14, img_size=42)
PE = dict(embed_dim=64, depth=3, num_heads=2, patch_size=14, img_size=42)
# name -> a model of timm's registry, its arguments, and how many prefix tokens it has
SEQUENCES = {
    "vit": ("vit_tiny_patch16_224", SIZES, 1),
    "clip": ("vit_base_patch16_clip_224", SIZES, 1),
    "registers": ("vit_tiny_patch16_224", SIZES | {"reg_tokens": 2, "no_embed_class": True}, 3),
    "siglip": ("vit_base_patch16_siglip_224", SIZES, 0),
    "dinov3": ("vit_small_patch16_dinov3", PE | {"ref_feat_shape": (3, 3)}, 5),
    "eva02": ("eva02_tiny_patch14_224", SIZES, 1),
    "pe_core": ("vit_pe_core_tiny_patch16_384", PE, 1),
    "pe_spatial": ("vit_pe_spatial_tiny_patch16_512", PE, 1),
    "beit": ("beit_base_patch16_224", SIZES, 1),
}
STAGES = {
    "convnext": ("convnext_atto", dict(dims=(8, 16, 24, 32), depths=(1, 2, 3, 1))),
    "swin": (
        "swin_tiny_patch4_window7_224",
        dict(embed_dim=8, depths=(1, 2, 3, 1), num_heads=(1, 2, 2, 2), window_size=2, img_size=64),
    ),
    "resnet": ("resnet18", dict(channels=(8, 16, 24, 32))),
}
MODELS = {**{kind: row[:2] for kind, row in SEQUENCES.items()}, **STAGES}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: folder}, each made when it is first asked for."""
    made = {}

    def folder(kind):
        if kind not in made:
            name, changes = MODELS[kind]
            made[kind] = tiny.timm_tower(tmp_path_factory.mktemp("encoder") / kind, name=name, **changes)
        return made[kind]

    return folder


def build(folder, **values):
    return build_vision_tower({"mm_vision_tower": f"timm:{folder}", "mm_vision_select_layer": -2, **values}).eval()


def reference(folder, **changes):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0, **changes).eval()


def rows(features):
    """[B, D, h, w] -> [B, h * w, D], place by place."""
    return torch.stack([features[:, :, y, x] for y in range(features.shape[2]) for x in range(features.shape[3])], 1)


# --- features ---


@pytest.mark.parametrize("kind", SEQUENCES)
def test_hidden_states_are_those_of_timm(kind, folders):
    """Layer -1 with the final norm is what `forward_features` gives; -2 is the block before."""
    model, images, prefix = reference(folders(kind)), small.pixels(2, 3, 42, 42), SEQUENCES[kind][2]
    assert model.num_prefix_tokens == prefix
    with torch.no_grad():
        states, final = [], model.forward_features(images)
        for block in model.blocks:
            block.register_forward_hook(lambda _, __, out: states.append(out))
        model(images)
    for layer in (-1, -2):
        tower = build(folders(kind), mm_vision_select_layer=layer)
        found = tower(images)
        assert found.shape == (2, 9, tower.hidden_size) == (2, tower.num_patches, model.num_features)
        assert torch.allclose(found, states[layer][:, prefix:], atol=1e-5)
        if layer == -1:
            assert torch.allclose(model.norm(found), final[:, prefix:], atol=1e-5)


@pytest.mark.parametrize("kind", SEQUENCES)
def test_another_size(kind, folders):
    """Positions are interpolated once, by timm's rule: the same as of a model whose size is set after loading."""
    model, images = reference(folders(kind)), small.pixels(1, 3, 70, 70)
    model.set_input_size(img_size=(70, 70))
    with torch.no_grad():
        (expected,) = model.forward_intermediates(images, indices=[1], intermediates_only=True)
    tower = build(folders(kind), image_size=70)
    assert torch.allclose(tower(images), rows(expected), atol=1e-5)
    assert tower.token_grid(70, 70) == (25, (5, 5)) and tower.num_patches == 25 and tower.image_size == 70
    assert tower.image_processor.crop_size["height"] == 70
    if not tower.any_size:
        with pytest.raises(LlavaError, match=r"takes images of 70x70 pixels, got .42, 42"):
            tower(small.pixels(1, 3, 42, 42))
    with pytest.raises(LlavaError, match=r"image_size: .*71.*14"):
        build(folders(kind), image_size=71)


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize(("stage", "side"), [(None, 64), (2, 64), (3, 96)])
def test_a_stage_becomes_tokens_row_by_row(kind, stage, side, folders):
    changes = {"img_size": side} if kind == "swin" else {}
    with torch.no_grad():
        maps = reference(folders(kind), **changes).forward_intermediates(
            small.pixels(2, 3, side, side), intermediates_only=True
        )
    tower = build(folders(kind), image_size=side, **({} if stage is None else {"vision_tower_stage": stage}))
    expected = rows(maps[-1 if stage is None else stage - 1])
    found = tower(small.pixels(2, 3, side, side))
    assert found.shape == expected.shape == (2, tower.num_patches, tower.hidden_size)
    assert torch.allclose(found, expected, atol=1e-5)
    assert tower.config.patch_size * tower.num_patches_per_side == side
    with pytest.raises(LlavaError, match=f"vision_tower_stage: found 9, expected 1 to {len(maps)}"):
        build(folders(kind), vision_tower_stage=9)


def test_sequences_have_no_stages(folders):
    with pytest.raises(LlavaError, match=r"vision_tower_stage: found 1.*no stages"):
        build(folders("vit"), vision_tower_stage=1)


@pytest.mark.parametrize("kind", SEQUENCES)
def test_class_token(kind, folders):
    images = small.pixels(2, 3, 42, 42)
    tower, plain = build(folders(kind), mm_vision_select_feature="cls_patch"), build(folders(kind))(images)
    found = tower(images)
    if SEQUENCES[kind][2] == 0:
        assert found.equal(plain) and tower.num_patches == 9
        return
    with torch.no_grad():
        ((_, prefix),) = reference(folders(kind)).forward_intermediates(
            images, indices=[1], intermediates_only=True, return_prefix_tokens=True
        )
    assert torch.allclose(found[:, 0], prefix[:, 0], atol=1e-5) and found[:, 1:].equal(plain)
    assert found.shape[1] == tower.num_patches == tower.token_grid(42, 42)[0] == 10
    assert tower.token_grid(42, 42)[1] is None


def test_a_class_token_that_joins_behind_the_blocks(tmp_path):
    folder = tiny.timm_tower(tmp_path, name="cait_xxs24_224", **SIZES)
    tower, images = build(folder, mm_vision_select_feature="cls_patch"), small.pixels(1, 3, 42, 42)
    assert tower(images).equal(build(folder)(images)) and tower.num_patches == 9


def test_two_class_tokens_are_refused(tmp_path):
    folder = tiny.timm_tower(tmp_path, name="deit_tiny_distilled_patch16_224", **SIZES)
    assert build(folder).num_patches == 9
    with pytest.raises(LlavaError, match=r"cls_patch: .* has 2 class tokens"):
        build(folder, mm_vision_select_feature="cls_patch")


def test_slices_of_layers(tmp_path):
    folder = tiny.timm_tower(tmp_path, name="vit_tiny_patch16_224", **SIZES | {"depth": 12})
    images = small.pixels(1, 3, 42, 42)
    with torch.no_grad():
        maps = [rows(each) for each in reference(folder).forward_intermediates(images, intermediates_only=True)]
    for kind, blocks in (("slicefour_patch", (1, 4, 7, 10)), ("slice_m25811_f6_patch", (11, 8, 5, 2, 6))):
        tower = build(folder, mm_vision_select_feature=kind)
        # hidden state i is what block i - 1 gives; -2 of 13 states is state 11, of block 10
        picked = [i - 1 for i in (1, 4, 7, 10)] if kind.startswith("slicefour") else [b - 1 for b in blocks]
        assert torch.allclose(tower(images), torch.cat([maps[i] for i in picked], -1), atol=1e-5)
        assert tower.hidden_size == 32 * len(blocks)


def test_layers_that_are_not_there(folders):
    for layer, said in ((-4, "embeddings before the first block"), (0, "embeddings"), (4, "4 hidden states")):
        with pytest.raises(LlavaError, match=said):
            build(folders("vit"), mm_vision_select_layer=layer)


def test_any_size_where_timm_has_it(folders):
    tower = build(folders("vit"), tower_args={"dynamic_img_size": True})
    wide = small.pixels(2, 3, 28, 70)
    with torch.no_grad():
        (expected,) = reference(folders("vit"), dynamic_img_size=True).forward_intermediates(
            wide, indices=[1], intermediates_only=True
        )
    assert tower.any_size and torch.allclose(tower(wide), rows(expected), atol=1e-5)
    mixed = tower([wide[0], small.pixels(3, 42, 42), wide[1]])
    assert [len(each) for each in mixed] == [10, 9, 10] and torch.allclose(mixed[2], rows(expected)[1], atol=1e-5)
    assert tower.token_grid(28, 70) == (10, (2, 5))
    with pytest.raises(LlavaError, match=r"multiples of 14 pixels, got .28, 71"):
        tower(small.pixels(1, 3, 28, 71))


# --- pixels ---


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_clip_224.openai",
        "vit_base_patch16_siglip_256.v2_webli",
        "eva02_tiny_patch14_336.mim_in22k_ft_in1k",
        "vit_pe_core_tiny_patch16_384.fb",
        "convnext_atto.d2_in1k",
    ],
)
def test_pixels_are_pillow_by_the_data_config(name):
    with torch.device("meta"):
        processor = build_vision_tower({"mm_vision_tower": f"timm:{name}"}, delay_load=True).image_processor
    cfg = timm.get_pretrained_cfg(name)
    side, wide = cfg.input_size[-1], Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 150, 3), np.uint8))
    kind = {"bicubic": Image.BICUBIC, "bilinear": Image.BILINEAR}[cfg.interpolation]
    if cfg.crop_mode == "squash":
        resized = wide.resize((side, side), kind)
    else:  # the shorter edge at exactly the encoder's size, no margin around it, and the middle
        long = int(side * 150 / 90)
        left = (long - side) // 2
        resized = wide.resize((long, side), kind).crop((left, 0, left + side, side))
    expected = (np.asarray(resized, dtype=np.float32) / 255 - np.float32(cfg.mean)) / np.float32(cfg.std)
    found = processor.preprocess(wide, return_tensors="pt")["pixel_values"][0].permute(1, 2, 0).numpy()
    assert found.shape == (side, side, 3) and np.abs(found - expected).max() < 1e-5


# --- training ---


@pytest.mark.parametrize("kind", ["vit", "eva02", "pe_core", "convnext", "resnet"])
def test_gradient_reaches_what_counts_as_trained(kind, folders):
    tower = build(folders(kind), vision_tower_stage=2 if kind in STAGES else None)
    tower.requires_grad_(True)
    unused = {id(p) for module in tower.unused_modules() for p in module.parameters()}
    tower(small.pixels(2, 3, tower.image_size, tower.image_size)).square().sum().backward()
    without = {name for name, p in tower.named_parameters() if p.grad is None}
    assert without and without == {name for name, p in tower.named_parameters() if id(p) in unused}


@pytest.mark.parametrize(("kind", "expected"), [("vit", 2), ("pe_core", 2), ("convnext", 6), ("swin", 6)])
def test_blocks(kind, expected, folders):
    """Of layer -2 the last of three is left out; of stage 3 those of the stages 1 to 3, in a row."""
    tower = build(folders(kind), vision_tower_stage=3 if kind in STAGES else None)
    names = {module: name for name, module in tower.vision_tower.named_modules()}
    found = [names[block] for block in tower.blocks()]
    assert found == sorted(found) and len(set(found)) == len(found) == expected


def test_checkpointing_is_timms_own(folders):
    """The same gradients, and each block's forward twice."""
    tower = build(folders("eva02")).train()
    tower.requires_grad_(True)
    images, calls = small.pixels(2, 3, 42, 42), []
    tower.vision_tower.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = []
    for tower.gradient_checkpointing in (False, True):
        tower.zero_grad()
        tower(images).square().sum().backward()
        gradients.append({name: p.grad for name, p in tower.named_parameters() if p.grad is not None})
        assert len(calls) == 1 + 2 * tower.gradient_checkpointing
    assert all(torch.allclose(gradients[1][name], value, atol=1e-6) for name, value in gradients[0].items())
    calls.clear()
    with torch.no_grad():
        assert tower(images).equal(tower(images)) and len(calls) == 2


def test_a_model_without_checkpointing_goes_on(folders, monkeypatch, capsys):
    tower = build(folders("vit")).train().requires_grad_(True)

    def refuse(on):
        raise AssertionError("gradient checkpointing not supported")

    monkeypatch.setattr(tower.vision_tower, "set_grad_checkpointing", refuse)
    tower.gradient_checkpointing = True
    for _ in range(2):
        tower(small.pixels(1, 3, 42, 42)).sum().backward()
    assert capsys.readouterr().out.count("has no gradient checkpointing") == 1


def test_batch_norms_keep_their_statistics(folders):
    """From the first batch on, before anything is said of training, and in it."""
    tower, again = build(folders("resnet")), build_vision_tower({"mm_vision_tower": f"timm:{folders('resnet')}"})
    images = small.pixels(2, 3, tower.image_size, tower.image_size)
    before, state = tower(images), {k: v.clone() for k, v in tower.vision_tower.state_dict().items()}
    assert again.training and again(images).equal(before)
    tower.train()
    assert tower(images).equal(before) and tower.training
    assert all(value.equal(state[name]) for name, value in tower.vision_tower.state_dict().items())


@pytest.mark.parametrize("kind", ["vit", "convnext"])
def test_compression(kind, folders):
    settings = {"use_token_compression": True, "compression_input_size": 3, "compression_output_size": 2}
    side = 42 if kind == "vit" else 96
    tower = build(folders(kind), image_size=side, **settings)
    assert tower(small.pixels(2, 3, side, side)).shape == (2, 4, tower.hidden_size) and tower.num_patches == 4


def test_several_scales(folders):
    """S2 goes around it as around any tower of squares: the base scale's part is the tower's own."""
    tower = build(folders("eva02"), s2=True, s2_scales="42,84")
    images = small.pixels(2, 3, 84, 84)
    found = tower(images)
    assert found.shape == (2, 9, 64) == (2, tower.num_patches, tower.hidden_size)
    base = torch.nn.functional.interpolate(images, size=(42, 42), mode="bicubic")
    assert torch.allclose(found[..., :32], build(folders("eva02"))(base), atol=1e-5)


# --- checkpoints ---


@pytest.mark.parametrize("kind", MODELS)
def test_save_and_load(kind, folders, tmp_path):
    """A whole checkpoint at another size, when the encoder's folder is gone."""
    source = shutil.copytree(folders(kind), tmp_path / "encoder")
    side = 96 if kind in STAGES else 70
    settings = {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat", "image_size": side}
    settings |= {"vision_tower_stage": 3} if kind in STAGES else {}
    model = small.model(f"timm:{source}", **settings)
    model.get_model().describe_vision()
    with torch.no_grad():
        for parameter in model.get_vision_tower().parameters():
            parameter.mul_(1.01)
    model.save_pretrained(tmp_path / "saved")
    shutil.rmtree(source)
    again = type(model).from_pretrained(tmp_path / "saved").eval()
    before, after = model.get_vision_tower(), again.get_vision_tower()
    images = small.pixels(2, 3, side, side)
    assert after.config == before.config and after.image_processor.to_dict() == before.image_processor.to_dict()
    with torch.no_grad():
        assert after(images).equal(before(images)) and again.encode_images(images).equal(model.encode_images(images))
    # in half precision too, with rotary tables and masks that no checkpoint holds
    half = type(model).from_pretrained(tmp_path / "saved", dtype=torch.bfloat16).eval().get_vision_tower()
    with torch.no_grad():
        assert half(images.bfloat16()).equal(before.bfloat16()(images.bfloat16()))


def test_arguments_are_kept(folders, tmp_path):
    """Of `tower_args`, by a checkpoint."""
    source = shutil.copytree(folders("vit"), tmp_path / "encoder")
    settings = {"image_aspect_ratio": "native", "mm_patch_merge_type": "flat"}
    model = small.model(f"timm:{source}", tower_args={"dynamic_img_size": True}, **settings)
    model.get_model().describe_vision()
    model.save_pretrained(tmp_path / "saved")
    shutil.rmtree(source)
    again = type(model).from_pretrained(tmp_path / "saved").eval()
    wide = small.pixels(2, 3, 28, 70)
    with torch.no_grad():
        assert again.get_vision_tower()(wide).equal(model.get_vision_tower()(wide))


def test_weights_of_ones_own(folders, tmp_path):
    """A file beside a name that timm has, whose positions are interpolated too."""
    from safetensors.torch import load_file, save_file

    model = timm.create_model("vit_tiny_patch16_224", num_classes=7)
    save_file({name: value + 0.01 for name, value in model.state_dict().items()}, tmp_path / "mine.safetensors")
    values = {
        "mm_vision_tower": "timm:vit_tiny_patch16_224",
        "vision_tower_weights": str(tmp_path / "mine.safetensors"),
    }
    found = build_vision_tower({**values, "image_size": 96}).vision_tower.state_dict()
    file = load_file(tmp_path / "mine.safetensors")
    assert found["pos_embed"].shape == (1, 37, 192) and file["pos_embed"].shape == (1, 197, 192)
    assert len(found) > 100 and all(found[n].equal(file[n]) for n in found if n != "pos_embed")
    with pytest.raises(LlavaError, match=r"vision_tower_weights: found x.bin, expected a .safetensors file"):
        build_vision_tower(values | {"vision_tower_weights": "x.bin"})


# --- what is refused ---


def test_names_that_are_not_there(tmp_path):
    for name, said in {
        "vit_large_patch14_clip_337.openai": "no model .*close to it: .*vit_large_patch14_clip_336",
        "vit_large_patch14_clip_336.nobody": "no weights of that name; .*vit_large_patch14_clip_336.openai",
        "bert-base-uncased": "timm has no model bert-base-uncased",
        "faster_rcnn_resnet50": "timm has no model",
        "/no/such/folder": "found no folder /no/such/folder",
        "google/bert_uncased": "no config.json from the hub",
        str(tmp_path): "no usable config.json",
        "vit_giant_patch14_224": "publishes no weights of it",
    }.items():
        with pytest.raises(LlavaError, match=said) as caught:
            build_vision_tower({"mm_vision_tower": f"timm:{name}"})
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_folders_of_others(tmp_path):
    tiny.tower(tmp_path / "clip")
    with pytest.raises(LlavaError, match=r"model_type 'clip_vision_model', which is one of transformers"):
        build(tmp_path / "clip")
    (tmp_path / "config.json").write_text('{"architecture": "my_vit", "pretrained_cfg": {}}')
    with pytest.raises(LlavaError, match="architecture my_vit, no model of timm"):
        build(tmp_path)


def test_sizes_and_arguments_that_cannot_be(folders):
    with pytest.raises(LlavaError, match=r"unexpected keyword argument 'wings'.*tower_args"):
        build(folders("vit"), tower_args={"wings": 2})
    with pytest.raises(LlavaError, match="image_size: found 40, expected a multiple of 32"):
        build(folders("convnext"), image_size=40)


def test_weights_that_lack_blocks(tmp_path):
    from safetensors.torch import load_file, save_file

    """With a classifier, which is left out, timm itself takes any weights."""
    timm.models.save_for_hf(
        timm.create_model("vit_tiny_patch16_224", num_classes=7, **SIZES), tmp_path, safe_serialization=True
    )
    weights = load_file(tmp_path / "model.safetensors")

    def keep_without(block):
        kept = {name: value for name, value in weights.items() if f"blocks.{block}." not in name}
        save_file(kept, tmp_path / "model.safetensors")

    keep_without(2)  # which layer -2 does not use
    assert build(tmp_path).vision_tower.blocks[1].norm1.weight.equal(weights["blocks.1.norm1.weight"])
    keep_without(1)
    with pytest.raises(LlavaError, match=r"its weights lack \d+ of vit_tiny_patch16_224's, such as blocks.1"):
        build(tmp_path)
