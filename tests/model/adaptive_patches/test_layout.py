"""Places and pixels of kept patches, against a walk over the labels cell by cell."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.errors import LlavaError
from llava.model.adaptive_patches import kept_patches, pooled_patches, select_patches_by_budget
from tests.model.adaptive_patches.pictures import noise
from tests.model.adaptive_patches.test_selection import random_maps


def walk(labels, order):
    """(image, level, row, col) of each kept patch, cell by cell; a patch counts at the first cell met of it."""
    found = []
    for image, grid in enumerate(labels):
        height, width = grid.shape
        places = list(np.ndindex(height, width))
        if order == "cells":
            places.sort(key=lambda place: (place[0] // 2, place[1] // 2, place))
        seen = set()
        for row, col in places:
            side = 2 ** (int(grid[row, col]) - 1)
            patch = int(grid[row, col]), row // side * side, col // side * side
            if patch not in seen:
                seen.add(patch)
                found.append((image, *patch))
    return found


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    st.integers(1, 17), st.integers(1, 17), st.integers(1, 4), st.floats(0, 1), st.integers(0, 2**32),
    st.sampled_from(["raster", "cells"]),
)  # fmt: skip
def test_places_are_those_of_a_walk(height, width, num_scales, alpha, seed, order):
    masks, labels = select_patches_by_budget(random_maps(height, width, num_scales, batch=2, seed=seed), alpha)
    kept = kept_patches(labels, order)
    assert list(zip(*(values.tolist() for values in kept), strict=True)) == walk(labels.numpy(), order)
    assert len(kept.levels) == sum(int(mask.sum()) for mask in masks.values())


def test_centres_are_in_base_cells():
    labels = torch.full((1, 4, 8), 3, dtype=torch.uint8)
    labels[0, :, 4:] = 2
    labels[0, :2, 4:6] = 1
    kept = kept_patches(labels)
    assert kept.levels.tolist() == [3, 1, 1, 2, 1, 1, 2, 2]
    assert kept.centres.tolist() == [[1.5, 1.5], [0, 4], [0, 5], [0.5, 6.5], [1, 4], [1, 5], [2.5, 4.5], [2.5, 6.5]]


def test_blocks_of_the_merger_stay_together():
    """In the order `cells` the patches of level 1 come in fours that fill one 2x2 block."""
    labels = select_patches_by_budget(random_maps(14, 10), 0.4)[1]
    kept = kept_patches(labels, "cells")
    assert set(kept.levels.tolist()) == {1, 2, 3}
    at = 0
    while at < len(kept.levels):
        row, col = int(kept.rows[at]), int(kept.cols[at])
        assert row % 2 == 0 and col % 2 == 0
        if kept.levels[at] == 1:
            places = [(int(kept.rows[at + i]), int(kept.cols[at + i])) for i in range(4)]
            assert places == [(row, col), (row, col + 1), (row + 1, col), (row + 1, col + 1)]
            assert (kept.levels[at : at + 4] == 1).all()
            at += 4
        else:
            at += 1


@pytest.mark.parametrize("order", ["raster", "cells"])
@pytest.mark.parametrize("height, width", [(8, 12), (7, 9)])
def test_pixels_are_means_of_each_patch(order, height, width):
    pixels = noise(2, 3, 6 * height, 6 * width).float()
    labels = select_patches_by_budget(random_maps(height, width, batch=2, base=6), 0.5)[1]
    kept = kept_patches(labels, order)
    pooled = pooled_patches(pixels, kept, 6)
    assert pooled.shape == (len(kept.levels), 3, 6, 6) and set(kept.levels.tolist()) == {1, 2, 3}
    for index, (image, level, row, col) in enumerate(walk(labels.numpy(), order)):
        side = 2 ** (level - 1)
        patch = pixels[image, :, 6 * row : 6 * (row + side), 6 * col : 6 * (col + side)].double().numpy()
        means = patch.reshape(3, 6, side, 6, side).mean((2, 4))
        np.testing.assert_allclose(pooled[index], means, atol=1e-4, rtol=0)
        if level == 1:
            np.testing.assert_array_equal(pooled[index], patch)


def test_pixels_keep_their_type_and_their_gradient():
    kept = kept_patches(select_patches_by_budget(random_maps(4, 8, base=2), 0.3)[1])
    assert pooled_patches(noise(1, 3, 8, 16).to(torch.bfloat16), kept, 2).dtype == torch.bfloat16
    assert pooled_patches(noise(1, 3, 8, 16), kept, 2).dtype == torch.float32
    pixels = torch.zeros(1, 3, 8, 16, requires_grad=True)
    pooled_patches(pixels, kept, 2).sum().backward()
    assert (pixels.grad == 0.25 ** (kept.levels[0] - 1)).any() and (pixels.grad > 0).all()


def test_bad_arguments_are_refused():
    labels = torch.ones(1, 2, 2, dtype=torch.uint8)
    with pytest.raises(LlavaError, match="order: found 'rows', expected raster or cells"):
        kept_patches(labels, "rows")
    with pytest.raises(LlavaError, match="levels: expected a tensor of whole numbers"):
        kept_patches(labels[0])
    with pytest.raises(LlavaError, match="images: found 28x30 pixels, expected multiples of the patch size 14"):
        pooled_patches(torch.zeros(1, 3, 28, 30), kept_patches(labels), 14)
    with pytest.raises(LlavaError, match=r"images: found \[3, 28, 28\]"):
        pooled_patches(torch.zeros(3, 28, 28), kept_patches(labels), 14)
