"""Which patches of a clip are kept."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llava.errors import LlavaError
from llava.images.clip import Clip
from llava.images.video_patches import METHODS, kept_patches, patch_energy, select

QUICK = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def clip_of(energy, height, width) -> Clip:
    frames = np.zeros((len(energy), height, width, 3), np.uint8)
    zeros = np.zeros(len(energy), np.float32)
    return Clip(frames, np.arange(len(energy)), energy, None, "difference", 1.0, list(zeros), zeros, 2)


# --- energy of patches ---


@pytest.mark.parametrize(
    ("size", "factor", "patch"), [((48, 64), 4, 16), ((42, 56), 2, 14), ((50, 39), 1, 16), ((12, 12), 2, 3)]
)
def test_patch_energy_is_the_sum_over_its_pixels(size, factor, patch):
    blocks = np.random.default_rng(0).random((3, size[0] // factor, size[1] // factor), np.float32)
    pixels = np.repeat(np.repeat(blocks, factor, 1), factor, 2)
    h, w = size[0] // patch, size[1] // patch
    wanted = pixels[:, : h * patch, : w * patch].reshape(3, h, patch, w, patch).sum((2, 4), dtype=np.float64)
    found = patch_energy(clip_of(blocks, *size), patch)
    assert found.shape == (3, h, w) and found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_patches_that_cut_through_blocks_share_them():
    blocks = np.arange(6, dtype=np.float32).reshape(1, 1, 6)  # of 5 x 2.5 pixels
    found = patch_energy(clip_of(blocks, 5, 15), 5)
    np.testing.assert_allclose(found, [[[2.5 * 5, 12.5 * 5, 22.5 * 5]]])
    found = patch_energy(clip_of(blocks, 4, 15), 4)
    np.testing.assert_allclose(
        found[0, 0], [4 * (2.5 * 0 + 1.5 * 1), 4 * (1 * 1 + 2.5 * 2 + 0.5 * 3), 4 * (2 * 3 + 2 * 4)]
    )


def test_equal_patches_stay_equal():
    energy = patch_energy(clip_of(np.full((5, 45, 80), 0.1, np.float32), 180, 320), 14)
    assert len(np.unique(energy)) == 1


@pytest.mark.parametrize("patch", [0, 17])
def test_no_patch_fits(patch):
    with pytest.raises(LlavaError, match="patch: found"):
        patch_energy(clip_of(np.zeros((1, 4, 4), np.float32), 16, 16), patch)


# --- selection ---


def slow(energy, count, first_full):
    """The best `count`, by sorting all; no cuts."""
    _, height, width = energy.shape
    ranked = sorted(np.ndindex(*energy.shape), key=lambda place: (-energy[place], place))
    if first_full:
        first = [(0, h, w) for h in range(height) for w in range(width)]
        ranked = first + [place for place in ranked if place[0]]
    return sorted(ranked[:count])


levels = st.sampled_from([0.0, 0.25, 0.5, 1.0, 7.0])
energies = hnp.arrays(np.float32, hnp.array_shapes(min_dims=3, max_dims=3, max_side=6), elements=levels)


@QUICK
@given(energies, st.floats(0.01, 1), st.booleans())
def test_the_best_are_kept(energy, budget, first_full):
    count = max(energy[0].size, int(np.floor(budget * np.prod(energy.shape))))
    still = np.zeros(len(energy))
    kept = select(energy, method="codec", budget=budget, first_full=first_full, changed_T=still)
    assert kept.dtype == np.int32 and kept.tolist() == [list(place) for place in slow(energy, count, first_full)]
    assert np.array_equal(
        kept, select(energy, method="saliency", budget=budget, first_full=first_full, changed_T=still)
    )


@QUICK
@given(energies, st.sampled_from(METHODS), st.floats(0.01, 1), st.booleans(), st.floats(0, 1))
def test_what_holds_for_every_choice(energy, method, budget, first_full, scene_cut):
    options = {"method": method, "budget": budget, "first_full": first_full}
    kept = select(energy, scene_cut=scene_cut, **options)
    frames, height, width = energy.shape
    wanted = energy.size if method == "all" else max(height * width, int(np.floor(budget * frames * height * width)))
    assert kept.shape == (wanted, 3) and wanted == kept_patches(energy.shape, **options)
    rows = [tuple(row) for row in kept.tolist()]
    assert rows == sorted(set(rows))
    assert (kept >= 0).all() and (kept < energy.shape).all()
    if first_full or method in ("all", "uniform_frames"):
        assert (kept[:, 0] == 0).sum() == height * width
    assert np.array_equal(kept, select(energy.copy(), scene_cut=scene_cut, **options))


@QUICK
@given(energies, st.integers(1, 250))
def test_counts(energy, tokens):
    one, total = energy[0].size, energy.size
    for name, value, wanted in (
        ("max_tokens", tokens, min(tokens, total)),
        ("frame_equivalents", tokens / 7, min(max(one, int(np.floor(tokens / 7 * one))), total)),
    ):
        if name == "max_tokens" and tokens < one:
            with pytest.raises(LlavaError, match=f"max_tokens: found {tokens}, expected at least {one}"):
                select(energy, method="codec", max_tokens=tokens)
        else:
            assert len(select(energy, method="codec", **{name: value})) == wanted
    assert len(select(energy, method="codec", max_tokens=tokens, first_full=False)) == min(tokens, total)


def test_ties_go_to_the_first():
    energy = np.ones((4, 2, 3), np.float32)
    kept = select(energy, method="codec", max_tokens=10, changed_T=np.zeros(4))
    assert kept.tolist() == np.argwhere(np.ones((4, 2, 3)))[:10].tolist()


def test_uniform_frames():
    energy = np.zeros((64, 3, 4), np.float32)
    kept = select(energy, method="uniform_frames", frame_equivalents=8)
    assert sorted(set(kept[:, 0].tolist())) == np.linspace(0, 63, 8, dtype=int).tolist() and len(kept) == 96
    kept = select(energy, method="uniform_frames", max_tokens=100)
    assert len(kept) == 100 and np.bincount(kept[:, 0]).max() == 12 and (np.bincount(kept[:, 0]) == 12).sum() == 8
    assert len(select(energy, method="all")) == 64 * 12


def with_a_cut(strength=1.0):
    """Ten frames of 4x5 in which little happens, but in the sixth, which is new."""
    energy = np.random.default_rng(0).random((10, 4, 5)).astype(np.float32) * 0.2
    energy[0], energy[3, 1, 1], energy[5] = 0, 3, strength
    return energy, (np.arange(10) == 5).astype(np.float32)


def frames_kept(kept):
    return np.bincount(kept[:, 0], minlength=10).tolist()


def test_a_cut_is_kept_whole_if_half_of_what_is_left_pays_for_it():
    energy, changed = with_a_cut(0.1)
    kept = frames_kept(select(energy, method="codec", frame_equivalents=3, changed_T=changed))
    assert kept[0] == 20 and kept[5] == 20 and sum(kept) == 60
    kept = frames_kept(select(energy, method="codec", max_tokens=59, changed_T=changed))
    assert kept[0] == 20 and kept[5] < 20 and sum(kept) == 59
    kept = frames_kept(select(energy, method="codec", frame_equivalents=3, changed_T=0.9 * changed))
    assert kept[5] < 20  # not more than scene_cut
    kept = frames_kept(select(energy, method="codec", frame_equivalents=3, changed_T=0.9 * changed, scene_cut=0.8))
    assert kept[5] == 20


def test_cuts_of_most_energy_come_first():
    energy = np.zeros((10, 4, 5), np.float32)
    energy[2], energy[4], energy[7] = 1, 2, 2
    changed = energy.any((1, 2)).astype(np.float32)
    kept = frames_kept(select(energy, method="codec", frame_equivalents=3, changed_T=changed))
    assert kept == [20, 0, 0, 0, 20, 0, 0, 20, 0, 0]  # 4 as a cut, then the best
    energy[7] = 2.5
    kept = frames_kept(select(energy[:, :1], method="codec", max_tokens=18, changed_T=changed))
    assert kept[7] == 5 and kept[4] == 5 and sum(kept) == 18


def test_without_measured_changes_a_cut_is_told_from_the_energy():
    energy, _ = with_a_cut(1.0)
    energy[3, 1, 1] = 1
    energy[5, 0, 0] = 0
    kept = frames_kept(select(energy, method="codec", frame_equivalents=3))
    assert kept[5] == 20  # nineteen of twenty patches change
    energy[5, 0, 1] = 0
    kept = select(energy, method="codec", frame_equivalents=3)
    assert frames_kept(kept)[5] < 20 or [5, 0, 0] not in kept.tolist()
    assert not frames_kept(select(np.zeros((10, 4, 5)), method="codec", frame_equivalents=2))[5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "found no budget, expected one of budget, max_tokens, frame_equivalents"),
        ({"budget": 0.5, "max_tokens": 40}, "found budget and max_tokens, expected one"),
        ({"budget": 0}, "budget: found 0, expected a number above 0"),
        ({"budget": 1.5}, "budget: found 1.5, expected a share"),
        ({"budget": "0.5"}, "budget: found '0.5', expected a number"),
        ({"budget": float("nan")}, "budget: found nan"),
        ({"budget": True}, "budget: found True"),
        ({"max_tokens": 20.5}, "max_tokens: found 20.5, expected a whole number"),
        ({"max_tokens": 19}, "max_tokens: found 19, expected at least 20"),
        ({"max_tokens": 19, "first_full": False, "method": "uniform_frames"}, "max_tokens: found 19"),
        ({"frame_equivalents": -1}, "frame_equivalents: found -1"),
        ({"budget": 0.5, "method": "best"}, "method: found 'best', expected one of codec, uniform_frames"),
        ({"budget": 0.5, "scene_cut": 2}, "scene_cut: found 2"),
        ({"budget": 0.5, "method": "all", "max_tokens": 3}, "found budget and max_tokens"),
    ],
)
def test_bad_choices(options, message):
    with pytest.raises(LlavaError, match=message):
        select(np.zeros((3, 4, 5), np.float32), **{"method": "codec", **options})


@pytest.mark.parametrize("energy", [np.zeros((4, 5)), np.zeros((0, 4, 5)), np.full((1, 2, 2), np.nan)])
def test_bad_energies(energy):
    with pytest.raises(LlavaError, match="energy: found shape"):
        select(energy, method="codec", budget=0.5)
