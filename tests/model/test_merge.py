"""Merging images into text, against the slow reference, over random batches."""

import contextlib
import pickle
import random

import pytest
import torch

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import LlavaError
from tests.model import slow_merge, small

SIDE = 42  # pixels of a crop: 3 x 3 tokens, so that rounding up and down differ
CROPS = 24
GRIDS = {
    "(1x1),...,(3x3)": [(SIDE * i, SIDE * j) for i in (1, 2, 3) for j in (1, 2, 3)],
    ((84, 42), (42, 84), (84, 84), (126, 42)): [(84, 42), (42, 84), (84, 84), (126, 42)],
    "[(42, 84), (84, 42), (84, 84), (126, 84)]": [(42, 84), (84, 42), (84, 84), (126, 84)],
}
KINDS = [
    *("flat", "spatial", "spatial_unpad", "spatial_nobase", "spatial_unpad_nobase"),
    *("spatial_maxpool2x2", "spatial_maxpool2x2_nobase", "spatial_unpad_maxpool2x2"),
]
ASPECTS = ["anyres", "anyres_max_1", "anyres_max_2", "anyres_max_9", "pad"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small.model(small.tower(tmp_path_factory.mktemp("clip"), side=SIDE))


@pytest.fixture(scope="module")
def store(model):
    """(pixels [CROPS, 3, SIDE, SIDE], their projected features [CROPS, 9, D])."""
    pixels = small.pixels(CROPS, 3, SIDE, SIDE)
    with torch.no_grad():
        return pixels, torch.cat([model.encode_images(crop[None]) for crop in pixels])


@contextlib.contextmanager
def configured(model, **values):
    before = {key: getattr(model.config, key, None) for key in values}
    try:
        for key, value in values.items():
            setattr(model.config, key, value)
        yield
    finally:
        for key, value in before.items():
            setattr(model.config, key, value)


class Batch:
    """A random batch: what goes in, and per row what its image tokens stand for."""

    def __init__(self, rng, rules, candidates, store, max_rows=4):
        self.rng, self.rules, self.candidates = rng, rules, candidates
        self.pixels, self.features = store
        self.images, self.sizes, self.modalities, self.visual = [], [], [], []
        # what a row without an image brings: nothing, a dummy that says so, or (every such row) one that does not
        self.dummies = rng.choice(["none", "text", "maybe", "image"])
        rows = [self.row() for _ in range(rng.randint(1, max_rows))]
        length = max(len(row) for row in rows)
        padded_left = rng.random() < 0.5
        self.ids, self.mask = [], []
        for row in rows:
            pad = [small.PAD] * (length - len(row))
            keep = [int(token == IMAGE_TOKEN_INDEX or rng.random() > 0.05) for token in row]
            self.ids.append(pad + row if padded_left else row + pad)
            self.mask.append([0] * len(pad) + keep if padded_left else keep + [0] * len(pad))
        self.labels = [[rng.choice([IGNORE_INDEX, rng.randint(3, 99)]) for _ in row] for row in self.ids]

    def take(self, count):
        first = self.rng.randint(0, CROPS - count)
        return self.pixels[first : first + count], [list(f) for f in self.features[first : first + count]]

    def image(self, newline):
        rng = self.rng
        size = (rng.randint(5, 400), rng.randint(5, 400))
        modality = "video" if rng.random() < 0.3 else "image"
        if modality == "video":
            pixels, features = self.take(rng.randint(1, 4))
            tokens = slow_merge.video_tokens(features, (3, 3), newline, self.rules)
        else:
            count = 1
            if rng.random() < 0.7:  # else one crop, as images of a multi-image sample have
                across, down = 2, 2
                if "anyres" in self.rules["image_aspect_ratio"]:
                    best = slow_merge.best_resolution(size, self.candidates)
                    across, down = best[0] // SIDE, best[1] // SIDE
                count += across * down
            pixels, features = self.take(count)
            tokens = slow_merge.image_tokens(features, (3, 3), size, SIDE, newline, self.rules, self.candidates)
            pixels = pixels[0] if count == 1 and rng.random() < 0.5 else pixels
        self.bring(pixels, size, modality)
        return tokens

    def bring(self, pixels, size, modality):
        self.images.append(pixels)
        self.sizes.append(size)
        self.modalities.append(modality)

    def row(self):
        rng = self.rng
        number = rng.choice([0, 0, 1, 1, 2, 3])
        row, visual = [rng.randint(3, 99), rng.randint(3, 99)], []
        for _ in range(number):
            row += [rng.randint(3, 99) for _ in range(rng.randint(0, 3))] + [IMAGE_TOKEN_INDEX]
            visual.append(self.image(self.rules["newline"]))
        row += [rng.randint(3, 99) for _ in range(rng.randint(0, 4))]
        dummy = self.dummies == "image" or self.dummies == "text" or (self.dummies == "maybe" and rng.random() < 0.5)
        if number == 0 and dummy:
            self.bring(self.take(rng.randint(1, 2))[0], (SIDE, SIDE), "image" if self.dummies == "image" else "text")
        self.visual.append(visual)
        return row

    def given_modalities(self):
        """The list as it is, or cut where only images follow (the rest counts as images), or a single word."""
        names = list(self.modalities)
        if self.rng.random() < 0.5:
            while len(names) > 1 and names[-1] == "image":
                names.pop()
        return "image" if set(names) == {"image"} and self.rng.random() < 0.5 else names


def check(model, batch, rules, side, limit, with_mask, with_labels, with_positions):
    table = model.get_input_embeddings().weight.detach()
    ids, labels = torch.tensor(batch.ids), torch.tensor(batch.labels)
    keep = batch.mask if with_mask else [[1] * len(row) for row in batch.ids]
    wanted = slow_merge.merge_rows(batch.ids, keep, batch.labels, batch.visual, lambda i: table[i], limit, side)
    mask_dtype = batch.rng.choice([torch.bool, torch.long])
    mask = torch.tensor(batch.mask).to(mask_dtype) if with_mask else None
    positions = torch.arange(ids.shape[1])[None].expand_as(ids) if with_positions else None
    cache = object()
    with torch.no_grad():
        none, new_positions, new_mask, new_cache, embeds, new_labels = model.prepare_inputs_labels_for_multimodal(
            ids,
            positions,
            mask,
            cache,
            labels if with_labels else None,
            batch.images,
            batch.given_modalities(),
            batch.sizes,
        )
    assert none is None and new_cache is cache
    assert embeds.shape == wanted[0].shape and embeds.dtype == torch.float32
    assert torch.allclose(embeds, wanted[0], atol=1e-5)
    if with_labels:
        assert torch.equal(new_labels, wanted[1]) and new_labels.dtype == labels.dtype
    else:
        assert new_labels is None
    if with_mask:
        assert torch.equal(new_mask.bool(), wanted[2]) and new_mask.dtype == mask_dtype
    else:
        assert new_mask is None
    if with_positions:
        assert torch.equal(new_positions, wanted[3]) and new_positions.dtype == torch.long
    else:
        assert new_positions is None
    count = pickle.loads(pickle.dumps(model.visual_token_counter()))
    real = [(i, m) for i, m in enumerate(batch.modalities) if m != "text"]
    if batch.dummies != "image":
        found = [count(batch.images[i].shape, batch.sizes[i], m) for i, m in real]
        assert found == [len(tokens) for row in batch.visual for tokens in row]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aspect", ASPECTS)
def test_random_batches(model, store, kind, aspect):
    rng = random.Random(f"{kind} {aspect}")
    for _ in range(12):
        grid = rng.choice(list(GRIDS))
        rules = {
            "mm_patch_merge_type": kind,
            "image_aspect_ratio": aspect,
            "mm_newline_position": rng.choice(
                ["grid", "frame", "one_token", "no_token"]
                if "unpad" in kind or kind == "flat"
                else ["one_token", "no_token"]
            ),
            "mm_spatial_pool_mode": rng.choice(["bilinear", "average", "max"]),
        }
        rules["newline"] = model.model.image_newline.detach()
        batch = Batch(rng, rules, GRIDS[grid], store)
        side, limit = rng.choice(["left", "right"]), rng.choice([None, rng.randint(1, 60)])
        with configured(
            model,
            image_grid_pinpoints=grid,
            tokenizer_padding_side=side,
            tokenizer_model_max_length=limit,
            **{key: value for key, value in rules.items() if key != "newline"},
        ):
            flags = (rng.random() < 0.8, rng.random() < 0.7, rng.random() < 0.4)
            check(model, batch, rules, side, limit, *flags)


def merged(model, ids, images, modalities=("image",), sizes=None, mask=None, labels=None):
    ids = torch.tensor(ids)
    with torch.no_grad():
        return model.prepare_inputs_labels_for_multimodal(ids, None, mask, None, labels, images, modalities, sizes)


def test_cut_inside_and_before_an_image(model, store):
    """Nine tokens and a newline after two of text: the limit falls into them, on their edge, before them."""
    pixels, features = store
    newline = model.model.image_newline.detach()
    for limit in (1, 2, 7, 11, 12, 13, 14, 15):
        for side in ("left", "right"):
            with configured(model, tokenizer_model_max_length=limit, tokenizer_padding_side=side):
                out = merged(model, [[5, 6, IMAGE_TOKEN_INDEX, 7, 8]], [pixels[0]], sizes=[(9, 9)])[4][0]
            table = model.get_input_embeddings().weight.detach()
            whole = torch.cat([table[[5, 6]], features[0], newline[None], table[[7, 8]]])
            assert torch.allclose(out, whole[:limit], atol=1e-5)


def test_plain_batch_skips_merging(model, store):
    """[N, 3, H, W]: the features as they are, without newline, whatever the merge kind."""
    pixels, features = store
    out = merged(model, [[5, IMAGE_TOKEN_INDEX, 6], [IMAGE_TOKEN_INDEX, 7, 8]], pixels[:2])[4]
    table = model.get_input_embeddings().weight.detach()
    assert torch.allclose(out[0], torch.cat([table[[5]], features[0], table[[6]]]), atol=1e-5)
    assert torch.allclose(out[1], torch.cat([features[1], table[[7, 8]]]), atol=1e-5)
    # a text row's dummy in such a batch
    out = merged(model, [[5, 6, 7], [IMAGE_TOKEN_INDEX, 7, 8]], pixels[:2])[4]
    assert torch.allclose(out[1], torch.cat([features[1], table[[7, 8]]]), atol=1e-5)
    out = merged(model, [[IMAGE_TOKEN_INDEX, 7], [5, 6]], pixels[:2], ["image", "text"])[4]
    assert torch.allclose(out[0, :9], features[0], atol=1e-5)


def test_five_dimensional_tensor_is_a_list(model, store):
    pixels, _ = store
    stacked = torch.stack([pixels[0:5], pixels[5:10], pixels[10:15]])
    ids, sizes = [[5, IMAGE_TOKEN_INDEX, 6], [7, 8, 9], [IMAGE_TOKEN_INDEX, 6, 6]], [(84, 80), (9, 9), (60, 60)]
    for modalities in (["image", "text", "image"], ["video", "image", "image"]):
        a = merged(model, ids, stacked, modalities, sizes)[4]
        b = merged(model, ids, list(stacked), modalities, sizes)[4]
        assert torch.equal(a, b) and a.shape[1] > 40


def test_nothing_to_merge(model, store):
    """Without images, or decoding one token: everything comes back as it was."""
    ids, mask, labels, cache = torch.tensor([[5, 6]]), torch.ones(1, 2), torch.tensor([[5, 6]]), object()
    for given, images in ((ids, None), (ids[:, :1], [store[0][0]])):
        out = model.prepare_inputs_labels_for_multimodal(given, None, mask, cache, labels, images)
        assert out[0] is given and out[1] is None and out[2] is mask and out[3] is cache
        assert out[4] is None and out[5] is labels


def test_half_precision(model, store):
    """Embeddings keep the language model's dtype; pixels may have any."""
    other = small.model(model.config.mm_vision_tower).bfloat16()
    for images in ([store[0][0]], [store[0][0].bfloat16()], store[0][:1]):
        assert merged(other, [[5, IMAGE_TOKEN_INDEX, 6]], images, sizes=[(9, 9)])[4].dtype == torch.bfloat16


X = IMAGE_TOKEN_INDEX


@pytest.mark.parametrize(
    "ids, count, modalities",
    [
        ([[5, X, X]], 1, ["image"]),
        ([[5, X, 6]], 2, ["image", "image"]),
        ([[5, X, 6], [5, 6, 7]], 3, ["image"]),
        ([[5, 6, 7]], 2, ["image"]),
        ([[5, X, 6]], 0, []),
    ],
)
def test_counts_that_do_not_match(model, store, ids, count, modalities):
    with pytest.raises(LlavaError) as fault:
        merged(model, ids, list(store[0][:count]), modalities, [(9, 9)] * count)
    tokens = sum(row.count(X) for row in ids)
    assert f"{tokens} <image> tokens in {len(ids)} rows, but {count} images" in str(fault.value)
    assert "\n" not in str(fault.value)


def test_a_video_may_have_a_size_for_each_frame(model, store):
    """LLaVA-NeXT's tutorial: `image_sizes=[frame.size for frame in frames]`, a number each where they are arrays."""
    pixels, picture, clip = store[0], (84, 84), ["video"]
    with configured(model, mm_patch_merge_type="spatial_unpad", mm_newline_position="grid"):
        plain = merged(model, [[5, X, 6]], [pixels[:4]], clip)
        for sizes in ([(60, 40)] * 4, [7200] * 4, [(60, 40)], [None], [(60, 40)] * 9, []):
            assert torch.equal(merged(model, [[5, X, 6]], [pixels[:4]], clip, sizes)[4], plain[4])
        ids, images, kinds = (
            [[5, X, 6, X], [X, 7, X, 8]],
            [pixels[:4], pixels[:5], pixels[9], pixels[4:7]],
            ["video", "image", "image", "video"],
        )
        one_each = [(60, 40), picture, (9, 30), (60, 40)]
        a_frame = [*[(60, 40)] * 4, picture, (9, 30), *[(60, 40)] * 3]
        expected = merged(model, ids, images, kinds, one_each)
        assert torch.equal(merged(model, ids, images, kinds, a_frame)[4], expected[4])
        # a row without an image token brings a dummy
        ids, images, kinds = [*ids, [5, 6, 7, 8]], [*images, pixels[0]], [*kinds, "text"]
        with_dummy = merged(model, ids, images, kinds, [*a_frame, (9, 9)])
        assert torch.equal(with_dummy[4], merged(model, ids, images, kinds, [*one_each, (9, 9)])[4])
        said = "image_sizes: found 3, expected one .* for each of 5 images, or 10 with one for each frame"
        with pytest.raises(LlavaError, match=said):
            merged(model, ids, images, kinds, one_each[:3])


def test_faults_of_an_image(model, store):
    pixels, ids = store[0], [[5, X, 6]]
    with pytest.raises(LlavaError, match=r"image of 84x84 came as 3 crops .* expected 2x2"):
        merged(model, ids, [pixels[:4]], sizes=[(84, 84)])
    with pytest.raises(LlavaError, match="image_sizes"):
        merged(model, [[5, X, X]], [pixels[:5], pixels[0]], sizes=[(84, 84)])
    with configured(model, mm_patch_merge_type="unpad"), pytest.raises(LlavaError, match="mm_patch_merge_type: found"):
        merged(model, ids, [pixels[:5]], sizes=[(84, 84)])
    with configured(model, mm_newline_position="row"), pytest.raises(LlavaError, match="mm_newline_position: found"):
        merged(model, ids, [pixels[:5]], ["video"], [(84, 84)])
    with configured(model, mm_spatial_pool_mode="mean"), pytest.raises(LlavaError, match="mm_spatial_pool_mode: found"):
        merged(model, ids, [pixels[:5]], ["video"], [(84, 84)])
    for position in ("grid", "frame"):
        with (
            configured(model, mm_patch_merge_type="spatial", mm_newline_position=position),
            pytest.raises(LlavaError, match="needs a newline token"),
        ):
            merged(model, ids, [pixels[:5]], ["video"], [(84, 84)])
    with configured(model, image_grid_pinpoints=None), pytest.raises(LlavaError, match="image_grid_pinpoints: missing"):
        merged(model, ids, [pixels[:5]], sizes=[(84, 84)])


def test_class_token_has_no_grid(model, store):
    tower = model.get_vision_tower()
    tower.select_feature = "cls_patch"
    try:
        assert merged(model, [[5, X, 6]], [store[0][0]], sizes=[(9, 9)])[4].shape[1] == 2 + 10 + 1
        assert model.visual_token_counter()((3, SIDE, SIDE), (9, 9), "image") == 11
        with pytest.raises(LlavaError, match="class token has no token grid"):
            merged(model, [[5, X, 6]], [store[0][:5]], sizes=[(84, 84)])
    finally:
        tower.select_feature = "patch"


def test_config_without_projector_type(model, store):
    """As LLaVA's first checkpoints are: the kinds that are not named have their defaults."""
    with configured(model, mm_projector_type=None, mm_patch_merge_type=None, image_aspect_ratio=None):
        del model.config.mm_projector_type
        assert merged(model, [[5, X, 6]], [store[0][0]], sizes=[(9, 9)])[4].shape[1] == 2 + 9


def test_a_sliver_keeps_a_row(model, store):
    """One row of nine tokens, against at most nine, is not scaled down to none."""
    grid = [[3 * SIDE, SIDE]]
    with configured(
        model, image_aspect_ratio="anyres_max_1", image_grid_pinpoints=grid, mm_patch_merge_type="spatial_unpad"
    ):
        assert model.visual_token_counter()((4, 3, SIDE, SIDE), (3000, 5)) == 9 + 9 + 1
    grid = [[6 * SIDE, SIDE]]
    with configured(
        model, image_aspect_ratio="anyres_max_1", image_grid_pinpoints=grid, mm_patch_merge_type="spatial_unpad"
    ):
        assert model.visual_token_counter()((7, 3, SIDE, SIDE), (3000, 5)) == 9 + 12 + 1


def test_a_row_of_padding_alone(model, store):
    """A row whose tokens are all masked becomes padding; the others are as they were."""
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    out = merged(model, [[5, X, 6], [0, 0, 0]], [store[0][0]], sizes=[(9, 9)], mask=mask)
    assert out[2].sum(1).tolist() == [12, 0] and out[4][1].abs().sum() == 0
    assert torch.equal(out[4][0], merged(model, [[5, X, 6]], [store[0][0]], sizes=[(9, 9)])[4][0])
