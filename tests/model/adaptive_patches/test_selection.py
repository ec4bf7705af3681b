"""Selections against the slow ones, the published masks, and what any selection must hold to."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.errors import LlavaError
from llava.model.adaptive_patches import (
    patch_entropy,
    select_patches_by_budget,
    select_patches_by_threshold,
    select_patches_by_threshold_v2,
)
from llava.model.adaptive_patches.selection import budget_selection, token_counts
from tests.model.adaptive_patches import slow_selection as slow
from tests.model.adaptive_patches.pictures import NUMBERS, SIZES, picture, published

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
often = settings(max_examples=400, deadline=None, derandomize=True, database=None)


def random_maps(height, width, num_scales=3, batch=1, seed=0, kinds=None, base=14):
    """{size: float64 [B, h, w]} with importances of millionths; few `kinds` of them make many ties."""
    random = np.random.default_rng(seed)
    shapes = [(batch, -(-height // 2**level), -(-width // 2**level)) for level in range(num_scales)]
    if kinds is None:
        return {base << i: torch.from_numpy(random.integers(0, 8_000_000, s) / 1e6) for i, s in enumerate(shapes)}
    return {base << i: torch.from_numpy(random.integers(0, kinds, s) * 1.1) for i, s in enumerate(shapes)}


@st.composite
def any_maps(draw):
    height, width, num_scales = draw(st.integers(1, 19)), draw(st.integers(1, 19)), draw(st.integers(1, 4))
    seed, kinds = draw(st.integers(0, 2**32)), draw(st.sampled_from([None, 1, 2, 5]))
    maps = random_maps(height, width, num_scales, batch=3, seed=seed, kinds=kinds)
    if draw(st.booleans()):  # the image ends inside the last row or column of cells
        edge = draw(st.sampled_from([(slice(None), -1), (slice(None), slice(None), -1)]))
        for size in draw(st.sampled_from([list(maps), [14], [max(maps)]])):  # or the maps do not agree on it
            maps[size][edge] = 1e6
    return maps


def arrays(maps, image):
    return [maps[size][image].numpy() for size in sorted(maps)]


def check_cover(maps, masks, labels):
    """Masks cover each base cell once, only whole patches above the base, and labels say the same."""
    covered, sizes = torch.zeros_like(labels, dtype=torch.int64), sorted(maps)
    told = torch.zeros_like(covered)
    assert list(masks) == sizes and labels.dtype == torch.uint8
    for level, size in enumerate(sizes, start=1):
        assert masks[size].dtype == torch.bool and masks[size].shape == maps[size].shape
        side = size // sizes[0]
        spread = masks[size].repeat_interleave(side, 1).repeat_interleave(side, 2)
        height, width = labels.shape[1:]
        if level > 1:
            assert not spread[:, height:].any() and not spread[:, :, width:].any()
        covered += spread[:, :height, :width]
        told += level * spread[:, :height, :width]
    assert (covered == 1).all()
    assert torch.equal(told, labels.long())


@often
@given(maps=any_maps(), shares=st.lists(st.floats(0, 1.3), min_size=3, max_size=3))
def test_budget_equals_the_slow_one(maps, shares):
    masks, labels, info = budget_selection(maps, alpha=shares)
    check_cover(maps, masks, labels)
    height, width = labels.shape[1:]
    for image, share in enumerate(shares):
        budget = min(round(share * height * width), height * width)
        expected, base = slow.by_budget(arrays(maps, image), budget)
        np.testing.assert_array_equal(labels[image], slow.labels_of(expected, height, width))
        found = {name: values[image].item() for name, values in info.items()}
        assert found == {
            "base_tokens": base,
            "base_small_tokens": height * width,
            "budget": budget,
            "k": max(0, (budget - base) // 3),
            "alpha": share,
            "used_tokens": len(expected),
        }


@often
@given(maps=any_maps(), thresholds=st.lists(st.floats(-1, 9), min_size=3, max_size=3))
def test_v1_equals_the_slow_one(maps, thresholds):
    thresholds = thresholds[: len(maps) - 1]
    masks, labels = select_patches_by_threshold(maps, thresholds)
    check_cover(maps, masks, labels)
    for image in range(3):
        expected = slow.by_threshold(arrays(maps, image), thresholds)
        np.testing.assert_array_equal(labels[image], slow.labels_of(expected, *labels.shape[1:]))


@often
@given(maps=any_maps(), alpha=st.floats(0, 2))
def test_v2_equals_the_slow_one(maps, alpha):
    masks, labels = select_patches_by_threshold_v2(maps, alpha)
    check_cover(maps, masks, labels)
    for image in range(3):
        expected = slow.by_mean(arrays(maps, image), alpha)
        np.testing.assert_array_equal(labels[image], slow.labels_of(expected, *labels.shape[1:]))


def test_the_budget_is_met_on_every_grid():
    """All grids up to 24 x 24 cells, 16 images each with a share of its own: 9,216 maps."""
    random = torch.Generator().manual_seed(0)
    within = 0
    for height in range(1, 25):
        for width in range(1, 25):
            maps = random_maps(height, width, batch=16, seed=100 * height + width, kinds=3 if width % 2 else None)
            masks, labels, info = budget_selection(maps, alpha=torch.rand(16, generator=random))
            check_cover(maps, masks, labels)
            left = info["budget"] - info["used_tokens"]
            enough = info["budget"] >= info["base_tokens"]
            assert ((left >= 0) & (left <= 2))[enough].all()
            assert (info["used_tokens"] == info["base_tokens"])[~enough].all()
            assert torch.equal(token_counts(masks), info["used_tokens"])
            within += int(enough.sum())
    assert within > 5000


@pytest.mark.parametrize(
    "pixels, alpha, expected",
    [
        ((224, 224), 0.3, {"base_tokens": 16, "budget": 77, "k": 20, "used_tokens": 76}),
        ((224, 224), 1.0, {"base_tokens": 16, "budget": 256, "k": 80, "used_tokens": 256}),
        ((224, 224), 0.0, {"base_tokens": 16, "budget": 0, "k": 0, "used_tokens": 16}),
        ((224, 224), 7.0, {"base_tokens": 16, "budget": 256, "k": 80, "used_tokens": 256, "alpha": 7.0}),
        ((252, 224), 0.0, {"base_tokens": 24, "base_small_tokens": 288, "used_tokens": 24}),
        ((336, 224), 0.2, {"base_small_tokens": 384, "budget": 77}),
        ((336, 224), 0.3, {"budget": 115}),
        ((336, 224), 0.5, {"budget": 192}),
        ((336, 224), 0.7, {"budget": 269}),
        ((336, 224), 1.0, {"budget": 384}),
    ],
)
def test_known_counts(pixels, alpha, expected):
    maps = random_maps(pixels[0] // 14, pixels[1] // 14)
    masks, labels, info = budget_selection(maps, alpha)
    assert {name: info[name].item() for name in expected} == expected
    assert sum(int(mask.sum()) for mask in masks.values()) == info["used_tokens"].item()
    if alpha >= 1:
        assert (labels == 1).all()


def test_halves_round_to_even():
    assert [budget_selection(random_maps(1, 5), alpha)[2]["budget"].item() for alpha in (0.5, 0.7, 0.9)] == [2, 4, 4]


def test_a_budget_given_as_tokens():
    maps = random_maps(16, 18, batch=3)
    _, labels = select_patches_by_budget(maps, budget=[60, 10, 10_000])
    counts = [slow.by_budget(arrays(maps, image), budget) for image, budget in enumerate((60, 10, 288))]
    for image, (patches, _) in enumerate(counts):
        np.testing.assert_array_equal(labels[image], slow.labels_of(patches, 16, 18))
    assert torch.equal(select_patches_by_budget(maps, budget=60)[1][0], labels[0])
    assert torch.equal(select_patches_by_budget(maps, budget=torch.tensor([60, 10, 288]))[1], labels)
    assert budget_selection(maps, budget=72)[2]["alpha"].tolist() == [0.25] * 3


@pytest.mark.parametrize("number", NUMBERS)
def test_published_masks(number):
    values, maps = published(), patch_entropy(picture(number), 14)
    found = {"v1": select_patches_by_threshold(maps, [3.0, 2.0])[0]}
    found |= {f"v2_{alpha}": select_patches_by_threshold_v2(maps, alpha)[0] for alpha in (0.5, 0.8, 1.0, 1.2)}
    for name, masks in found.items():
        for size in SIZES:
            assert torch.equal(masks[size], values[f"{number}.{name}.{size}"].bool()), (name, size)


def test_ties_go_to_the_larger_patch_and_then_row_by_row():
    maps = {14: torch.ones(1, 8, 8), 28: torch.ones(1, 4, 4), 56: torch.ones(1, 2, 2)}
    expected = torch.full((8, 8), 3)
    for k, (rows, cols, level) in enumerate(
        [
            (slice(0, 4), slice(0, 4), 2),
            (slice(0, 4), slice(4, 8), 2),
            (slice(4, 8), slice(0, 4), 2),
            (slice(4, 8), slice(4, 8), 2),
            (slice(0, 2), slice(0, 2), 1),
            (slice(0, 2), slice(2, 4), 1),
            (slice(0, 2), slice(4, 6), 1),
        ],
        start=1,
    ):
        expected[rows, cols] = level
        assert torch.equal(select_patches_by_budget(maps, budget=4 + 3 * k)[1][0].long(), expected)


def test_sums_that_are_equal_only_without_rounding_are_ties():
    # 0.1 + 0.2 + 0.3 + 0.6 in two orders differs in float32 and in float64; the first of equals is split
    maps = {14: torch.zeros(1, 2, 4), 28: torch.zeros(1, 1, 2)}
    for dtype in (torch.float32, torch.float64):
        for left, right in [((0.1, 0.2, 0.3, 0.6), (0.6, 0.3, 0.2, 0.1)), ((0.6, 0.3, 0.2, 0.1), (0.1, 0.2, 0.3, 0.6))]:
            maps[14] = torch.tensor([[[*left[:2], *right[:2]], [*left[2:], *right[2:]]]], dtype=dtype)
            assert select_patches_by_budget(maps, budget=5)[1][0, 0].tolist() == [1, 1, 2, 2]


def test_importances_of_any_scale_are_told_apart():
    maps = {14: torch.zeros(1, 2, 6, dtype=torch.float64), 28: torch.zeros(1, 1, 3)}
    for values in ([1e-8, 3e-8, 2e-8], [9e5, 999_999.0, 999_998.0], [-5.0, 0.0, -4.0], [-1e12, 5.0, 0.0]):
        maps[14][0] = torch.tensor(values, dtype=torch.float64).repeat_interleave(2)
        assert select_patches_by_budget(maps, budget=6)[1][0, 0, ::2].tolist() == [2, 1, 2]
        assert select_patches_by_budget(maps, budget=9)[1][0, 0, ::2].tolist() == [2, 1, 1]


def test_more_alpha_only_splits_more_under_budget_and_less_under_v2():
    maps = random_maps(21, 18, batch=4)
    budget, merged = None, None
    for alpha in (0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0):
        labels = select_patches_by_budget(maps, alpha)[1]
        assert budget is None or ((labels <= budget).all() and (labels < budget).any())
        budget = labels
        labels = select_patches_by_threshold_v2(maps, alpha)[1]
        assert merged is None or ((labels >= merged).all() and (labels > merged).any())
        merged = labels


def selections(maps):
    return [
        select_patches_by_threshold(maps, [3.0, 2.0]),
        select_patches_by_threshold_v2(maps, 0.9),
        select_patches_by_budget(maps, 0.4),
    ]


def test_a_batch_is_its_images_one_by_one():
    maps = random_maps(17, 22, batch=5, kinds=4)
    together = selections(maps)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(together, selections(maps), strict=True))
    for image in range(5):
        alone = selections({size: values[image : image + 1] for size, values in maps.items()})
        for (masks, labels), (own_masks, own_labels) in zip(together, alone, strict=True):
            assert torch.equal(labels[image], own_labels[0])
            assert all(torch.equal(masks[size][image], own_masks[size][0]) for size in masks)


def test_float32_maps_of_entropies_select_the_same():
    maps = patch_entropy(picture(1), 14)
    single = {size: values.float() for size, values in maps.items()}
    for (_, labels), (_, of_single) in zip(selections(maps), selections(single), strict=True):
        assert torch.equal(labels, of_single)


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_selects_the_same(device):
    for maps in [random_maps(33, 40, batch=4, kinds=2), patch_entropy(picture(2), 14)]:
        there = {size: values.to(device) for size, values in maps.items()}
        for (masks, labels), (other_masks, other_labels) in zip(selections(maps), selections(there), strict=True):
            assert other_labels.device.type == device
            assert torch.equal(labels, other_labels.cpu())
            assert all(torch.equal(masks[size], other_masks[size].cpu()) for size in masks)


def test_v2_without_a_whole_large_patch_merges_nothing():
    maps = {14: torch.ones(1, 3, 3), 28: torch.zeros(1, 2, 2), 56: torch.full((1, 1, 1), 1e6)}
    assert (select_patches_by_threshold_v2(maps, 5.0)[1] == 1).all()


def test_v2_takes_each_images_own_mean():
    maps = random_maps(8, 8, batch=2)
    before = select_patches_by_threshold_v2(maps, 0.9)[1][0].clone()
    for size in maps:
        maps[size][1] *= 0.01
    assert torch.equal(select_patches_by_threshold_v2(maps, 0.9)[1][0], before)
    assert torch.equal(select_patches_by_threshold_v2(maps, [0.9, 0.9])[1][0], before)


def test_one_scale_is_all_base_patches():
    maps = random_maps(3, 5, num_scales=1)
    for masks, labels in (
        select_patches_by_threshold(maps, []),
        select_patches_by_threshold_v2(maps, 3.0),
        select_patches_by_budget(maps, 0.1),
    ):
        assert (labels == 1).all() and list(masks) == [14] and masks[14].all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda maps: select_patches_by_threshold(maps, [3.0]), "thresholds: found .*expected 2 numbers for 3 scales"),
        (lambda maps: select_patches_by_threshold(maps, [3.0, math.nan]), "thresholds: found"),
        (lambda maps: select_patches_by_threshold(maps, None), "thresholds: found None, expected a list"),
        (lambda maps: select_patches_by_threshold_v2(maps, -0.1), "alpha: found -0.1, expected a number that is 0"),
        (lambda maps: select_patches_by_threshold_v2(maps, math.nan), "alpha: found nan"),
        (lambda maps: select_patches_by_threshold_v2(maps, [1.0, 1.0, 1.0]), "one for each of 2 images"),
        (lambda maps: select_patches_by_threshold_v2(maps, "1"), "alpha: found '1'"),
        (lambda maps: select_patches_by_budget(maps, -1), "alpha: found -1"),
        (lambda maps: select_patches_by_budget(maps, math.inf), "alpha: found inf"),
        (lambda maps: select_patches_by_budget(maps), "alpha, budget: found None, None, expected one of the two"),
        (lambda maps: select_patches_by_budget(maps, 0.3, budget=9), "alpha, budget: found 0.3, 9"),
        (lambda maps: select_patches_by_budget(maps, budget=-1), "budget: found -1, expected a whole number"),
        (lambda maps: select_patches_by_budget(maps, budget=7.5), "budget: found 7.5"),
        (lambda maps: select_patches_by_budget(maps, budget=[7]), "budget: .*one for each of 2 images"),
        (lambda maps: select_patches_by_budget({}, 0.3), "maps: expected"),
        (lambda maps: select_patches_by_budget({14: maps[14][0]}, 0.3), "maps: expected"),
        (lambda maps: select_patches_by_budget({14: maps[14], 56: maps[56]}, 0.3), "maps: found .*sizes that double"),
        (lambda maps: select_patches_by_budget({**maps, 28: maps[14]}, 0.3), "maps: found .*grids that halve"),
        (lambda maps: select_patches_by_budget({**maps, 28: maps[28] * math.nan}, 0.3), "maps: found NaN"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(LlavaError, match=message) as error:
        call(random_maps(8, 8, batch=2))
    assert "\n" not in str(error.value)
