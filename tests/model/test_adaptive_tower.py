"""Adaptive patches in the packed tower and in a model around it."""

import json
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from llava.constants import IMAGE_TOKEN_INDEX
from llava.data import dataset as data
from llava.errors import LlavaError
from llava.mm_utils import process_images
from llava.model.adaptive_patches import (
    kept_patches,
    patch_entropy,
    pooled_patches,
    select_patches_by_budget,
    select_patches_by_threshold,
    select_patches_by_threshold_v2,
)
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_encoder.builder import build_vision_tower
from llavavit import LlavaViTPackingModel
from tests import tiny
from tests.data.common import llava_parts
from tests.model import small

BUDGET = {"method": "budget", "alpha": 0.5}
OPTIONS = [BUDGET, {"method": "v1"}, {"method": "v2", "alpha": 0.8}, {**BUDGET, "num_scales": 2}]
SIZES = [(84, 112), (56, 56), (112, 140), (56, 56), (70, 42)]  # height, width; blocks that stick out among them
NATIVE = {"image_aspect_ratio": "native", "min_pixels": 28 * 28, "max_pixels": 10**6}
PROJECTORS = ["mlp2x_gelu", "spatial_merge"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return tiny.tower(tmp_path_factory.mktemp("adaptive") / "vit", kind="hevc_vit", side=112, layers=3)


def pictures(sizes, seed=0):
    """Half blank, half noise of growing contrast: what is kept differs from place to place and image to image."""
    rng, made = np.random.default_rng(seed), []
    for i, (height, width) in enumerate(sizes):
        values = np.full((height, width, 3), 40 * i, np.uint8)
        spread = np.linspace(0, 200, width // 2 - width // 2 % 14 + 14).astype(int) + 1
        values[:, -len(spread) :] = rng.integers(0, spread[None, :, None], (height, len(spread), 3))
        made.append(Image.fromarray(values))
    return made


def build(folder, **values):
    values = {"mm_vision_select_layer": -2, "mm_vision_tower_type": "hevc_vit_packing", **values}
    return build_vision_tower({"mm_vision_tower": folder, **values})


def make(encoder, **changes):
    model = small.model(encoder, **{"mm_vision_tower_type": "hevc_vit_packing", "adaptive_patches": BUDGET} | changes)
    model.get_model().describe_vision()
    return model


def prepared(tower, sizes=SIZES, seed=0):
    """(images [C, H, W] as normalised, their grey-level pixels [3, H, W] of 0..255)."""
    made = pictures(sizes, seed)
    processor = tower.image_processor
    options = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
    images = [processor.preprocess(picture, **options)["pixel_values"][0] for picture in made]
    return images, [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in made]


def chosen_labels(pixels, options):
    """The choice on the picture's own pixels, without the tower's code."""
    maps = patch_entropy(pixels[None].float(), 14, options.get("num_scales", 3))
    if options["method"] == "v1":
        return select_patches_by_threshold(maps, [3.0, 2.0])[1]
    select = select_patches_by_budget if options["method"] == "budget" else select_patches_by_threshold_v2
    return select(maps, options["alpha"])[1]


def direct(folder, image, labels):
    """One image through the encoder by itself: [n, D], and what was kept of it."""
    model = LlavaViTPackingModel.from_pretrained(folder).eval()
    kept = kept_patches(labels)
    rows = pooled_patches(image[None], kept, 14).flatten(1)
    places = []
    for level, row, col in zip(kept.levels.tolist(), kept.rows.tolist(), kept.cols.tolist(), strict=True):
        side = 2 ** (level - 1)
        places.append((0.0, row + (side - 1) / 2, col + (side - 1) / 2))
    with torch.no_grad():
        out = model(rows, torch.tensor([[1, 1, len(rows)]]), torch.tensor(places), hidden_state_indices=[2])
    return out.hidden_states[0], kept


# --- the tower ---


@pytest.mark.parametrize("options", OPTIONS)
def test_each_image_is_chosen_pooled_and_encoded_alone(encoder, options):
    tower = build(encoder, adaptive_patches=options)
    images, pixels = prepared(tower)
    found, dims = tower(images, return_spatial_dims=True)
    assert dims == [None] * len(images)
    counts = set()
    for image, grey, features in zip(images, pixels, found, strict=True):
        expected, kept = direct(encoder, image, chosen_labels(grey, options))
        assert features.shape == expected.shape and torch.allclose(features, expected, atol=1e-5)
        counts |= set(kept.levels.tolist())
    assert counts >= {1, 2}  # something was merged, and not all
    packed = tower(images, packed=True)
    assert isinstance(packed, torch.Tensor) and torch.allclose(packed, torch.cat(found), atol=1e-6)
    batch = torch.stack([images[1], images[3]])
    assert [len(part) for part in tower(batch)] == [len(found[1]), len(found[3])]


@pytest.mark.parametrize("options", [{"method": "budget", "alpha": 1.0}, {"method": "v1", "thresholds": [0, 0]}])
def test_all_patches_kept_is_the_plain_tower(encoder, options):
    tower, plain = build(encoder, adaptive_patches=options), build(encoder)
    images = [*prepared(tower)[0], small.pixels(3, 3, 28, 42)]
    for a, b in zip(tower(images), plain(images), strict=True):
        assert torch.equal(a, b)


def test_a_clip_keeps_all_its_patches(encoder):
    tower, plain = build(encoder, adaptive_patches={"method": "budget", "alpha": 0.0}), build(encoder)
    image = prepared(tower)[0][0]
    clip = image[None].repeat(3, 1, 1, 1)
    (frames, one), dims = tower([clip, image], return_spatial_dims=True)
    assert torch.allclose(frames, plain([clip])[0], atol=1e-6) and len(frames) == 3 * 6 * 8
    assert dims == [(6, 8), None] and len(one) == 2 + 4  # two 56-pixel patches, four 28-pixel ones below


def test_the_choice_knows_no_dtype(encoder):
    """The tower's own is applied to the pixels that were chosen; images in bfloat16 are refused."""
    tower = build(encoder, adaptive_patches=BUDGET)
    images = prepared(tower)[0]
    one = tower.choose_patches(images)
    half = tower.to(torch.bfloat16).choose_patches(images)
    assert torch.equal(one.levels, half.levels) and torch.equal(one.positions, half.positions)
    assert half.rows.dtype == torch.float32 and tower(images)[0].dtype == torch.float32
    float16 = tower.choose_patches([image.half() for image in images])
    assert torch.equal(float16.levels, one.levels)
    with pytest.raises(LlavaError, match="bfloat16"):
        tower([image.bfloat16() for image in images])


def test_gradient_reaches_the_encoder(encoder):
    tower = build(encoder, adaptive_patches=BUDGET)
    images = prepared(tower)[0]
    assert tower(images)[0].grad_fn is None
    tower.vision_tower.requires_grad_(True)
    tower(images, packed=True).square().sum().backward()
    weights = tower.vision_tower
    assert weights.patch_embed.proj.weight.grad.abs().sum() > 0
    assert weights.encoder.layers[1].self_attn.qkv.weight.grad.abs().sum() > 0


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (0.3, "found 0.3, expected a mapping"),
        ({"method": "budget", "alhpa": 0.3}, "found 'alhpa', expected some of method, alpha"),
        ({"alpha": 0.3}, "method: found None, expected one of v1, v2, budget"),
        ({"method": "best", "alpha": 0.3}, "method: found 'best'"),
        ({"method": "budget"}, "alpha: missing"),
        ({"method": "budget", "alpha": -1}, "alpha: found -1"),
        ({"method": "budget", "alpha": "0.3"}, "alpha: found '0.3'"),
        ({"method": "budget", "alpha": [0.5, 0.2]}, r"alpha: found \[0.5, 0.2\]"),
        ({"method": "budget", "alpha": [0.5]}, r"alpha: found \[0.5\]"),
        ({"method": "v1", "alpha": 0.3}, "alpha: has no part in method v1"),
        ({"method": "v2", "alpha": 1, "thresholds": [1, 2]}, "thresholds: has no part in method v2"),
        ({"method": "v1", "thresholds": [1]}, "thresholds: found"),
        ({"method": "v1", "importance": "laplacian"}, "thresholds: missing"),
        ({"method": "budget", "alpha": 1, "importance": "colour"}, "importance: found 'colour'"),
        ({"method": "budget", "alpha": 1, "importance": "reconstruction"}, "reconstruction"),
        ({"method": "budget", "alpha": 1, "num_scales": 0}, "num_scales: found 0"),
        ({"method": "all", "alpha": 1}, "alpha: found 1 with method all"),
    ],
)
def test_options_that_cannot_be(encoder, options, words):
    with pytest.raises(LlavaError, match=f"adaptive_patches: .*{words}|adaptive_patches: {words}") as error:
        build(encoder, adaptive_patches=options)
    assert "\n" not in str(error.value)


def test_other_towers_have_patches_of_one_size(encoder, tmp_path):
    clip = tiny.tower(tmp_path / "clip")
    for folder, kind in ((encoder, "hevc_vit"), (clip, "clip")):
        with pytest.raises(LlavaError, match="expected mm_vision_tower_type hevc_vit_packing"):
            build(folder, mm_vision_tower_type=kind, adaptive_patches=BUDGET)
    compressed = {"use_token_compression": True, "compression_input_size": 8, "compression_output_size": 4}
    with pytest.raises(LlavaError, match="use_token_compression, expected one of the two"):
        build(encoder, adaptive_patches=BUDGET, **compressed)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_aspect_ratio": "anyres_max_9"}, "'anyres_max_9', expected square, pad or native"),
        ({"mm_projector_type": "pooler", **NATIVE}, "mm_projector_type 'pooler'"),
        ({"mm_projector_type": "patch_merger", **NATIVE}, "mm_projector_type 'patch_merger'"),
    ],
)
def test_layouts_without_a_place_for_kept_patches(encoder, changes, words):
    with pytest.raises(LlavaError, match=words):
        make(encoder, **changes)


def test_several_crops_and_odd_grids_are_refused(encoder):
    model = make(encoder, **NATIVE)
    with pytest.raises(LlavaError, match="an image of 3 crops, expected one"):
        model._visual_tokens([small.pixels(3, 3, 56, 56)], ["image"], [(56, 56)])
    model = make(encoder, mm_projector_type="spatial_merge", **NATIVE)
    with pytest.raises(LlavaError, match="merges 2x2 tokens, the tower's grid is 5x4"):
        model.encode_images([small.pixels(3, 70, 56)])


# --- in a model ---


def slow_tokens(model, folder, image, grey, options, projector):
    """Visual tokens of one image before any newline, token by token."""
    features, kept = direct(folder, image, chosen_labels(grey, options))
    project = model.get_model().mm_projector
    if projector == "mlp2x_gelu":
        return project(features[None])[0]
    at = {(r, c): i for i, (r, c) in enumerate(zip(kept.rows.tolist(), kept.cols.tolist(), strict=True))}
    tokens = []
    for row in range(0, image.shape[1] // 14, 2):
        for col in range(0, image.shape[2] // 14, 2):
            first = at.get((row, col))
            if first is None:  # inside a 56-pixel patch
                continue
            four = [first] * 4
            if kept.levels[first] == 1:
                four = [at[row, col], at[row, col + 1], at[row + 1, col], at[row + 1, col + 1]]
            tokens.append(project.mlp(torch.cat([project.ln_q(features[i]) for i in four])))
    return torch.stack(tokens)


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("merge", ["flat", "spatial_unpad"])
@pytest.mark.parametrize("options", OPTIONS[:2])
def test_visual_tokens_are_the_slow_formula(encoder, projector, merge, options):
    """A newline, where there is one, ends the image: kept patches form no rows."""
    model = make(encoder, mm_projector_type=projector, mm_patch_merge_type=merge, adaptive_patches=options, **NATIVE)
    sizes = [(84, 112), (56, 56), (112, 140)]
    images, pixels = prepared(model.get_vision_tower(), sizes)
    image_sizes = [(w, h) for h, w in sizes]
    row = [5, IMAGE_TOKEN_INDEX, 6, IMAGE_TOKEN_INDEX, IMAGE_TOKEN_INDEX, 7]
    with torch.no_grad():
        found = model.prepare_inputs_labels_for_multimodal(
            torch.tensor([row]), None, None, None, None, images, ["image"] * 3, image_sizes
        )[4][0]
        embed, newline = model.get_input_embeddings(), getattr(model.get_model(), "image_newline", None)
        expected, counts, used = [], [], zip(images, pixels, strict=True)
        for token in row:
            if token != IMAGE_TOKEN_INDEX:
                expected.append(embed(torch.tensor([token])))
                continue
            tokens = slow_tokens(model, encoder, *next(used), options, projector)
            expected += [tokens] + ([newline[None]] if merge == "spatial_unpad" else [])
            counts.append(len(tokens) + (merge == "spatial_unpad"))
        expected = torch.cat(expected)
    assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)
    counter = pickle.loads(pickle.dumps(model.visual_token_counter()))
    pairs = list(zip(images, image_sizes, strict=True))
    assert [counter.of_pixels(image, size) for image, size in pairs] == counts
    unit = 28 if projector == "spatial_merge" else 14
    whole = [(h // unit) * (w // unit) + (merge == "spatial_unpad") for h, w in sizes]
    assert [counter(tuple(image.shape), size) for image, size in pairs] == whole
    assert sum(counts) < sum(whole)


@pytest.mark.parametrize("projector", PROJECTORS)
def test_all_patches_kept_is_the_plain_model(encoder, projector):
    settings = {**NATIVE, "mm_projector_type": projector, "mm_patch_merge_type": "flat"}
    model = make(encoder, adaptive_patches={"method": "budget", "alpha": 1}, **settings)
    plain = make(encoder, adaptive_patches=None, **settings)
    images = prepared(model.get_vision_tower(), SIZES[:4])[0]
    sizes = [(1, 1)] * 4
    for a, b in zip(*(m._visual_tokens(images, ["image"] * 4, sizes) for m in (model, plain)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("projector", PROJECTORS)
def test_clip_beside_an_image(encoder, projector):
    model = make(encoder, mm_projector_type=projector, mm_newline_position="no_token", **NATIVE)
    plain = make(encoder, mm_projector_type=projector, mm_newline_position="no_token", adaptive_patches=None, **NATIVE)
    clip, image = small.pixels(3, 3, 56, 84), prepared(model.get_vision_tower())[0][0]
    with torch.no_grad():
        video, kept = model._visual_tokens([clip, image], ["video", "image"], [(84, 56), (112, 84)])
        expected = plain._visual_tokens([clip], ["video"], [(84, 56)])[0]
    assert torch.allclose(video, expected, atol=1e-6)
    counter = model.visual_token_counter()
    assert counter.of_pixels(clip, (84, 56), "video") == len(video) == counter(clip.shape, (84, 56), "video")
    assert counter.of_pixels(image, (112, 84)) == len(kept)


@pytest.mark.parametrize("projector", PROJECTORS)
def test_answers_do_not_depend_on_the_batch(encoder, projector):
    model = make(encoder, mm_projector_type=projector, **NATIVE)
    images = process_images(pictures(SIZES[:3]), model.get_vision_tower().image_processor, model.config)
    sizes = [(w, h) for h, w in SIZES[:3]]
    row = [3, IMAGE_TOKEN_INDEX, 4]
    options = dict(do_sample=False, max_new_tokens=6, pad_token_id=0)
    together = model.generate(torch.tensor([row] * 3), images=images, image_sizes=sizes, **options)
    for i in range(3):
        alone = model.generate(torch.tensor([row]), images=images[i : i + 1], image_sizes=sizes[i : i + 1], **options)
        assert torch.equal(together[i : i + 1, : alone.shape[1]], alone)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
def test_training_with_and_without_images(encoder):
    """Mixed sizes, a text-only row, checkpointed blocks: the same loss and gradients as row by row."""
    model = make(encoder, mm_projector_type="spatial_merge", **NATIVE)
    model.train().requires_grad_(True)
    images = prepared(model.get_vision_tower(), SIZES[:2])[0]
    ids = torch.tensor([[3, IMAGE_TOKEN_INDEX, 4, 5], [6, 7, 8, 9], [3, IMAGE_TOKEN_INDEX, 9, 5]])
    labels = torch.where(ids > 3, ids, -100)
    sizes = [(1, 1)] * 2

    def gradients(batches):
        model.zero_grad()
        total = 0
        for rows, used in batches:
            out = model(
                input_ids=ids[rows],
                attention_mask=torch.ones_like(ids[rows]),
                labels=labels[rows],
                images=[images[i] for i in used],
                image_sizes=[sizes[i] for i in used],
                modalities=["image"] * len(used),
                num_items_in_batch=8,
            )
            out.loss.backward()
            total += out.loss.item()
        return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    loss, together = gradients([([0, 1, 2], [0, 1])])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    apart = gradients([([0], [0]), ([1], []), ([2], [1])])
    assert abs(loss - apart[0]) < 1e-5
    name = "model.vision_tower.vision_tower.patch_embed.proj.weight"
    assert together[name].abs().sum() > 0
    assert all(torch.allclose(together[key], apart[1][key], atol=1e-5) for key in together)


# --- checkpoints ---


def saved(model, folder):
    model.save_pretrained(folder)
    for path in tiny.TOKENIZER.iterdir():
        shutil.copy(path, folder)
    return folder


def load(folder, **options):
    return load_pretrained_model(str(folder), None, "llava_qwen", device_map="cpu", torch_dtype="float32", **options)[1]


def test_checkpoint_keeps_the_choice_and_another_can_be_asked_for(tmp_path, encoder):
    model = make(encoder, vocab_size=703, **NATIVE)
    folder = saved(model, tmp_path / "llava")
    assert json.loads((folder / "config.json").read_text())["adaptive_patches"] == BUDGET
    image = prepared(model.get_vision_tower(), [(112, 112)])[0][0]
    expected = model.get_vision_tower()([image])[0]
    assert torch.equal(load(folder).get_vision_tower()([image])[0], expected)
    for alpha, count in ((0.2, 13), (0.5, 31), (1.0, 64)):  # 4 + 3k
        again = load(folder, overwrite_config={"adaptive_patches": {"method": "budget", "alpha": alpha}})
        assert len(again.get_vision_tower()([image])[0]) == count
    for nothing in (None, {"method": "all"}):
        every = load(folder, overwrite_config={"adaptive_patches": nothing})
        assert every.get_vision_tower().patch_chooser is None
        # rows of patches of one size end with a newline each
        assert every.visual_token_counter()(tuple(image.shape), (112, 112)) == 64 + 8
    with pytest.raises(LlavaError, match="expected square, pad or native"):
        load(folder, overwrite_config={"image_aspect_ratio": "anyres"})


@pytest.mark.parametrize("nothing", [None, {"method": "all"}])
def test_a_run_may_keep_all_patches_of_a_model_that_chose(encoder, nothing):
    """Config and tower are then those of a model that never did."""
    model = make(encoder, **NATIVE)
    given = SimpleNamespace(vision_tower=encoder, adaptive_patches=nothing)
    model.get_model().initialize_vision_modules(given)
    assert model.config.adaptive_patches is None and model.get_vision_tower().patch_chooser is None
    given.adaptive_patches = {"method": "v1"}
    model.get_model().initialize_vision_modules(given)
    assert model.config.adaptive_patches == {"method": "v1"} and model.get_vision_tower().patch_chooser is not None


def test_evaluation_and_chat_in_bfloat16(tmp_path, encoder):
    """Pixels stay in float32 up to the choice, which is that of a float32 model; chat counts what is kept."""
    from llava.inference.engine import Inference

    folder = saved(make(encoder, vocab_size=703, conversation_template="qwen_1_5", **NATIVE), tmp_path / "llava")
    made, chosen = pictures(SIZES[:2]), []
    for dtype in ("float32", "bfloat16"):
        inference = Inference.load(str(folder), device="cpu", dtype=dtype)
        assert inference.model.dtype == getattr(torch, dtype)
        row = [5, IMAGE_TOKEN_INDEX, 6]
        inputs = inference.inputs([row, row], [[picture] for picture in made])
        assert all(image.dtype == torch.float32 for image in inputs["images"])
        chosen.append(inference.model.get_vision_tower().choose_patches(inputs["images"]).lengths)
        length = inference.family.sequence_length(inputs, inference.loaded)
        assert length == (4, sum(chosen[-1]) + 2)  # a newline ends each image
        answers = inference.answer(inputs, max_new_tokens=3)
        assert len(answers) == 2
    assert chosen[0] == chosen[1] and sum(chosen[0]) < 48 + 16


# --- truncation ---


@pytest.mark.parametrize("room", [40, 12])
def test_truncation_counts_what_is_kept(tmp_path, encoder, room):
    """49 patches at most beside the text; a limit between that and the kept ones cuts nothing."""
    from transformers import AutoTokenizer

    model = make(encoder, **{**NATIVE, "mm_patch_merge_type": "flat"})
    tower = model.get_vision_tower()
    pictures([(98, 98)])[0].save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat is shown?"}, {"from": "gpt", "value": "A temple in China."}]
    (tmp_path / "a.json").write_text(json.dumps([{"id": "a", "image": "a.png", "conversations": turns}]))
    kept = len(tower([prepared(tower, [(98, 98)])[0][0]])[0])
    assert 12 < kept < 40

    def samples(**options):
        from llava.data.records import load_records
        from llava.model.visual_merge import native_resolution

        parts = llava_parts(
            AutoTokenizer.from_pretrained(tiny.TOKENIZER),
            tower.image_processor,
            model.visual_token_counter(),
            image_folder=str(tmp_path),
            image_aspect_ratio="native",
            native_resolution=native_resolution(model.config),
            **options,
        )
        return data.LazySupervisedDataset(load_records(str(tmp_path / "a.json"), 0), *parts)

    text = len(samples()[0]["input_ids"]) - 1
    cut = samples(model_max_length=text + room)
    sample = cut[0]
    assert cut.stats["truncated"] == (room < kept)
    if room > kept:
        assert len(sample["input_ids"]) == text + 1
