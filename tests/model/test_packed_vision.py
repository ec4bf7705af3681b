"""The tower for encoders that take any size, against the stock models' own forward and their own batching."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llava.errors import LlavaError
from llava.images.geometry import NaflexResolution
from llava.images.processing import process_image
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.packed_vision import PackedVisionTower
from llava.model.visual_merge import native_resolution
from llava.tools.towers import describe
from tests.model import packed_stock, small
from tests.model.packed_stock import KINDS, MULTIPLE, PATCH


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "tower"
    packed_stock.stock(kind).save_pretrained(path)
    return path


def build(folder, **values):
    return build_vision_tower({"mm_vision_tower": str(folder), "mm_vision_select_layer": -2, **values}).eval()


def pictures(kind):
    return [small.pixels(3, *size, seed=number) for number, size in enumerate(packed_stock.sizes(kind))]


def close(a, b):
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("layer", [0, -1, -2])
def test_features_are_the_stock_ones(kind, folder, layer, attention):
    """Packed equals what the stock model makes of the pictures padded, masked or packed, in raster order."""
    tower = build(folder, mm_vision_select_layer=layer, _attn_implementation=attention)
    assert type(tower) is PackedVisionTower and tower.any_size
    images = pictures(kind)
    stock = packed_stock.classes(kind)[1].from_pretrained(folder).eval()
    expected = packed_stock.raster_states(stock, kind, images)[layer]
    found = tower(images)
    assert len(expected[0]) > 10 and all(close(a, b) for a, b in zip(found, expected, strict=True))
    assert (expected[0] - expected[3]).abs().max() > 1e-2  # two pictures of one size
    patch = PATCH.get(kind, 14)
    for image, feature in zip(images, found, strict=True):
        h, w = image.shape[1] // patch, image.shape[2] // patch
        assert tower.token_grid(*image.shape[1:]) == (h * w, (h, w)) == (len(feature), (h, w))
    assert tower.hidden_size == found[0].shape[1] == 32


def test_a_batch_and_a_list_are_one(kind, folder):
    tower = build(folder)
    images = pictures(kind)
    batch = torch.stack([images[0], images[3]])
    found, listed = tower(batch), tower(images)
    assert found.ndim == 3 and close(found[0], listed[0]) and close(found[1], listed[3])
    assert close(tower(images, packed=True), torch.cat(listed))
    assert tower.bfloat16()(images)[0].dtype == torch.float32  # as the pixels


def test_one_call_for_all_sizes_and_no_look_at_another(kind, folder):
    tower = build(folder)
    calls = []
    tower.blocks()[0].register_forward_hook(lambda *_: calls.append(1))
    images = pictures(kind)
    before = tower(images)
    images[1] = images[1] + 1.0
    after = tower(images)
    assert len(calls) == 2
    assert [a.equal(b) for a, b in zip(after, before, strict=True)] == [True, False, True, True, True]


def test_no_block_runs_that_is_not_needed(kind, folder):
    tower = build(folder, mm_vision_select_layer=1)
    ran = []
    for number, block in enumerate(tower.vision_tower.get_submodule(tower.facts.blocks)):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    tower(pictures(kind))
    assert ran == [0]


@pytest.mark.parametrize("layer", [-1, -2])
def test_gradient_reaches_what_counts_as_trained(kind, folder, layer):
    tower = build(folder, mm_vision_select_layer=layer).train()
    tower.requires_grad_(True)
    unused = {id(p) for module in tower.unused_modules() for p in module.parameters()}
    sum(feature.square().sum() for feature in tower(pictures(kind))).backward()
    without = {name for name, p in tower.named_parameters() if p.grad is None}
    assert without == {name for name, p in tower.named_parameters() if id(p) in unused}
    assert len(tower.blocks()) == (3 if layer == -1 else 2)
    assert not any("merger" in name or "head" in name for name, _ in tower.named_parameters())


def test_gradient_is_that_of_the_stock_model(kind, folder):
    tower = build(folder, mm_vision_select_layer=-1)
    tower.requires_grad_(True)
    stock = packed_stock.classes(kind)[1].from_pretrained(folder)
    images = pictures(kind)
    sum(feature.square().sum() for feature in tower(images)).backward()
    states = packed_stock.raster_states.__wrapped__(stock, kind, images)[-1]
    sum(state.square().sum() for state in states).backward()
    expected = dict(stock.named_parameters())
    compared = 0
    for name, parameter in tower.vision_tower.named_parameters():
        if parameter.grad is not None:
            theirs = expected[name].grad  # of a key's bias zero but for rounding
            assert torch.allclose(parameter.grad, theirs, atol=1e-5 + 1e-4 * theirs.abs().max(), rtol=1e-4), name
            compared += 1
    assert compared > 20


def test_save_and_load(kind, folder, tmp_path):
    """A whole checkpoint, when the encoder's folder is gone."""
    source = shutil.copytree(folder, tmp_path / "encoder")
    side = 3 * MULTIPLE.get(kind, 14)
    model = small.model(source, image_aspect_ratio="pad", mm_patch_merge_type="flat", image_size=side)
    model.get_model().describe_vision()
    with torch.no_grad():
        for parameter in model.get_vision_tower().parameters():
            parameter.mul_(1.01)
    model.save_pretrained(tmp_path / "saved")
    shutil.rmtree(source)
    again = type(model).from_pretrained(tmp_path / "saved").eval()
    before, after = model.get_vision_tower(), again.get_vision_tower()
    assert type(after) is PackedVisionTower and after.side == side
    assert after.image_processor.to_dict() == before.image_processor.to_dict()
    images = pictures(kind)
    with torch.no_grad():
        assert all(a.equal(b) for a, b in zip(after(images), before(images), strict=True))
        assert all(a.equal(b) for a, b in zip(again.encode_images(images), model.encode_images(images), strict=True))


def test_buffers_that_no_checkpoint_holds(kind, folder):
    """As they are where a model was made without computing them."""
    tower = build(folder)
    images = pictures(kind)
    before = tower(images)
    saved = set(tower.vision_tower.state_dict())
    lacking = [buffer for name, buffer in tower.vision_tower.named_buffers() if name not in saved]
    assert len(lacking) == (0 if kind == "siglip2_vision_model" else 2)
    for buffer in lacking:
        buffer.fill_(7.0)
    assert not lacking or not close(tower(images)[0], before[0])
    tower.reset_buffers()
    assert all(a.equal(b) for a, b in zip(tower(images), before, strict=True))


def test_compression(kind, folder):
    """The compressor takes pictures of its one size, listed or batched."""
    m = MULTIPLE.get(kind, 14)
    side = 24 * PATCH.get(kind, 14)
    tower = build(folder, image_size=side, use_token_compression=True)
    images = small.pixels(2, 3, side, side)
    found = tower(images)
    assert found.shape == (2, 144, 32) and all(close(a, b) for a, b in zip(tower(list(images)), found, strict=True))
    with pytest.raises(LlavaError, match="token compression"):
        tower([images[0], small.pixels(3, m, m)])


# --- whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_half_of_a_whole_qwen_vl(name, tmp_path):
    """The folder is the one that stock transformers saves; the reference is the whole model's own encoder."""
    from transformers import AutoModelForImageTextToText

    from tests.model.qwen2_vl.parts import make_folder

    make_folder(tmp_path, name)
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    kind = f"{name}_vision"
    images = pictures(kind)
    expected = packed_stock.raster_states(whole.model.visual, kind, images)[-1]
    tower = build(tmp_path, mm_vision_select_layer=-1)
    assert all(close(a, b) for a, b in zip(tower(images), expected, strict=True))
    assert tower.config.to_dict()["model_type"] == kind


@pytest.mark.parametrize("name", ["llava", "mistral3"])
def test_half_of_a_whole_pixtral(name, tmp_path):
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    vision = KINDS["pixtral"] | {"model_type": "pixtral"}
    config = AutoConfig.for_model(name, vision_config=vision, text_config={"model_type": "mistral", **text})
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(tmp_path)
    expected = packed_stock.raster_states(whole.model.vision_tower, "pixtral", pictures("pixtral"))[-1]
    tower = build(tmp_path, mm_vision_select_layer=-1)
    assert all(close(a, b) for a, b in zip(tower(pictures("pixtral")), expected, strict=True))


PREFIXES = [
    ("pixtral", "llava", "vision_tower."),
    ("pixtral", "mistral3", "model.vision_tower."),
    ("qwen2_vl_vision", "qwen2_vl", "visual."),
    ("qwen2_5_vl_vision", "qwen2_5_vl", "model.visual."),
    ("qwen3_vl_vision", "qwen3_vl_moe", "model.visual."),
    ("siglip2_vision_model", "siglip2", "vision_model."),
]


@pytest.mark.parametrize(("kind", "larger", "prefix"), PREFIXES)
def test_weights_by_prefix(kind, larger, prefix, tmp_path):
    """Under the names of the hub's checkpoints, beside a language model's; `model_type` as older ones write it."""
    packed_stock.stock(kind).save_pretrained(tmp_path)
    source = load_file(tmp_path / "model.safetensors")
    text = {"language_model.norm.weight": torch.ones(4), "model.layers.0.mlp.weight": torch.ones(4)}
    save_file({prefix + k: v for k, v in source.items()} | text, tmp_path / "model.safetensors", {"format": "pt"})
    inner = json.loads((tmp_path / "config.json").read_text())
    if larger == "qwen2_5_vl":
        del inner["model_type"]
    elif larger.startswith("qwen"):
        inner["model_type"] = larger
    (tmp_path / "config.json").write_text(json.dumps({"model_type": larger, "vision_config": inner}))
    tower = build(tmp_path)
    assert tower.config.to_dict()["model_type"] == kind
    found = tower.vision_tower.state_dict()
    assert len(found) > 20 and all(value.equal(source[name]) for name, value in found.items())


def test_what_is_refused(tmp_path):
    packed_stock.stock("qwen2_vl_vision").save_pretrained(tmp_path / "qwen")
    tower = build(tmp_path / "qwen")
    with pytest.raises(LlavaError, match="in multiples of 28 pixels, got 28x42"):
        tower([small.pixels(3, 28, 42)])
    with pytest.raises(LlavaError, match="image_size: found 42, expected a multiple of 28"):
        build(tmp_path / "qwen", image_size=42)
    weights = load_file(tmp_path / "qwen/model.safetensors")
    kept = {name: value for name, value in weights.items() if "blocks.1." not in name}
    save_file(kept, tmp_path / "qwen/model.safetensors", {"format": "pt"})
    with pytest.raises(LlavaError, match=r"weights lack \d+ of Qwen2VisionTransformerPretrainedModel"):
        build(tmp_path / "qwen")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llava", "vision_config": {"model_type": "clip_vision_model"}})
    )
    with pytest.raises(LlavaError, match="vision half of this llava is 'clip_vision_model', expected 'pixtral'"):
        build(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    with pytest.raises(LlavaError, match="packed_vision for the model_type 'dinov2', expected one of siglip2"):
        build(tmp_path, mm_vision_tower_type="packed_vision")
    with pytest.raises(LlavaError, match="hf_vision for the model_type 'qwen2_vl_vision', expected packed_vision"):
        build(tmp_path / "qwen", mm_vision_tower_type="hf_vision")


# --- sizes, pixels, costs ---------------------------------------------------------------------------------------------


def test_published_processors_give_squares(tmp_path):
    """What they call size are bounds on the pixels, or the longest edge, of a picture of any aspect."""
    published = {
        "qwen2_vl_vision": {"size": {"shortest_edge": 3136, "longest_edge": 12845056}, "resample": 3},
        "pixtral": {"size": {"longest_edge": 1024}, "patch_size": {"height": 16, "width": 16}, "resample": 3},
        "siglip2_vision_model": {"max_num_patches": 256, "patch_size": 16, "resample": 2},
    }
    for kind, values in published.items():
        packed_stock.stock(kind).save_pretrained(tmp_path / kind)
        plain = build(tmp_path / kind).image_processor
        values |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
        (tmp_path / kind / "preprocessor_config.json").write_text(json.dumps(values))
        tower = build(tmp_path / kind, image_size=112)
        processor = tower.image_processor
        assert dict(processor.size) == dict(processor.crop_size) == {"height": 112, "width": 112}
        assert not processor.do_center_crop and processor.resample == values["resample"] == plain.resample
        assert [*processor.image_mean, *processor.image_std] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
        side = {"qwen2_vl_vision": 448}.get(kind, 56)  # that of the config; 32 patches where it has none
        assert (plain.size["height"], plain.size["width"]) == (side, side)
        crop = processor.preprocess(Image.new("RGB", (300, 40)), return_tensors="pt")["pixel_values"]
        assert crop.shape == (1, 3, 112, 112)


@pytest.mark.parametrize(("projector", "unit"), [("mlp2x_gelu", 1), ("spatial_merge", 2)])
def test_native_through_the_model(kind, folder, projector, unit):
    """Pictures of any size as the pipeline makes them: every token of each comes out, in its place."""
    model = small.model(folder, image_aspect_ratio="native", mm_patch_merge_type="flat", mm_projector_type=projector)
    model.get_model().describe_vision()
    patch = PATCH.get(kind, 14)
    multiple = max(MULTIPLE.get(kind, 14), unit * patch)
    model.config.min_pixels, model.config.max_pixels = 4 * multiple**2, 12 * multiple**2
    native = native_resolution(model.config)
    assert native.multiple == multiple and isinstance(native, NaflexResolution) == kind.startswith("siglip2")
    photos = [Image.new("RGB", size, colour) for size, colour in (((60, 30), "red"), ((280, 420), "blue"))]
    tower = model.get_vision_tower()
    images = [process_image(photo, tower.image_processor, "native", native=native) for photo in photos]
    assert all(4 <= image.shape[1] * image.shape[2] // multiple**2 <= 12 for image in images)
    counter = model.visual_token_counter()
    with torch.no_grad():
        features = model.encode_images(images)
    expected = [image.shape[1] * image.shape[2] // (patch * unit) ** 2 for image in images]
    counted = [counter(tuple(i.shape), p.size, "image") for i, p in zip(images, photos, strict=True)]
    assert [len(feature) for feature in features] == expected == counted
    model.config.min_pixels = model.config.max_pixels = multiple**2 - 1
    with pytest.raises(LlavaError, match=f"max_pixels: found .*at least {multiple**2}"):
        native_resolution(model.config)


# of a block: numbers in its matrices, by the sizes in packed_stock
WEIGHTS = {
    "siglip2_vision_model": 4 * 32 * 32 + 2 * 32 * 64,
    "pixtral": 4 * 32 * 32 + 3 * 32 * 64,
    "qwen2_vl_vision": 4 * 32 * 32 + 2 * 32 * 64,
    "qwen2_5_vl_vision": 4 * 32 * 32 + 3 * 32 * 48,
    "qwen3_vl_vision": 4 * 32 * 32 + 2 * 32 * 48,
}


def test_row_of_the_table(kind, folder, tmp_path):
    """Tokens, parameters and operations of 6 x 6 patches, by hand; training's own count of the same."""
    from llava.model.shapes import shape_of
    from llava.train.flops import _vision_pairs

    patch = PATCH.get(kind, 14)
    settings = {"vision_tower": str(folder), "image_size": 6 * patch, "mm_vision_select_layer": -2}
    (tmp_path / "mine.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items()))
    row = describe(str(tmp_path / "mine.yaml"))
    frames = 2 if kind.startswith("qwen") else 1
    pairs = 2 * 36**2
    if kind == "qwen2_5_vl_vision":  # the first block in windows of 4 x 4, the second whole
        pairs = 16**2 + 8**2 + 8**2 + 4**2 + 36**2
    embedded = 2 * 36 * frames * 3 * patch**2 * 32
    positions = 2 * 36 * 16 * 32 if kind == "siglip2_vision_model" else 0  # a product with the table
    flops = embedded + positions + 2 * 2 * 36 * WEIGHTS[kind] + 4 * 32 * pairs
    # older versions of transformers multiply Pixtral's positions with its frequencies
    assert (
        row["gflops"] == pytest.approx(flops / 1e9, rel=5e-4 if kind == "pixtral" else 1e-9)
        and row["loads"] == "here"
        and row["reason"] is None
    )
    assert (row["tokens"], row["grid"], row["patch"]) == (36, [6, 6], patch) and row["any_size"]
    tower = build(folder)
    assert row["params"] == sum(p.numel() for p in tower.parameters()) and row["hidden_size"] == 32
    assert row["model_type"] == kind

    config = small.config(folder, mm_vision_config=tower.config.to_dict(), mm_vision_select_layer=-2)
    shape = shape_of(config).vision
    assert (shape.layers, shape.hidden, shape.layer_weights) == (2, 32, WEIGHTS[kind])
    assert shape.patch_values * 32 * 2 * 36 == embedded and _vision_pairs(shape, [(1, 6, 6)]) == pairs
