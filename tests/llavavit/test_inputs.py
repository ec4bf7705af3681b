"""Forms of what the encoders are given: what each means, and what is refused in one line."""

import numpy as np
import pytest
import torch

from tests.llavavit.encoders import PATCH, difference, formulas, images, make, pack

PIXELS = torch.stack(images((16, 24), (16, 24)))  # 24 patches each
CHOSEN = torch.tensor([[3, 0, 17], [23, 1, 2]])
MASK = torch.zeros(2, 24, dtype=torch.bool).scatter(1, CHOSEN, True)


def run(kind="padded", **inputs):
    with torch.no_grad():
        return make(kind)(**{"pixel_values": PIXELS} | inputs).last_hidden_state


# --- visible_indices --------------------------------------------------------------------------------------------------

SAME = {
    "int32": CHOSEN.int(),
    "uint8": CHOSEN.to(torch.uint8),
    "list": CHOSEN.tolist(),
    "array": CHOSEN.numpy(),
    "int16 array": CHOSEN.numpy().astype(np.int16),
}


@pytest.mark.parametrize("kind", ["padded", "onevision"])
@pytest.mark.parametrize("form", SAME)
def test_indices_in_other_forms(kind, form):
    assert torch.equal(run(kind, visible_indices=SAME[form]), run(kind, visible_indices=CHOSEN))


@pytest.mark.parametrize("kind", ["padded", "onevision"])
@pytest.mark.parametrize("as_list", [False, True])
def test_truth_values_are_the_indices_of_the_true_ones(kind, as_list):
    found = run(kind, visible_indices=MASK.tolist() if as_list else MASK)
    assert torch.equal(found, run(kind, visible_indices=CHOSEN.sort(1).values))
    same = run(kind, visible_indices=MASK[0])
    assert torch.equal(same, run(kind, visible_indices=CHOSEN[:1].sort(1).values.expand(2, -1)))


@pytest.mark.parametrize("kind", ["padded", "onevision"])
def test_truth_values_of_all(kind):
    assert torch.equal(run(kind, visible_indices=torch.ones(2, 24, dtype=torch.bool)), run(kind))


def test_truth_values_of_a_long_time():
    """As many as the clip has patches say where they stand in the released encoder's grid of frames."""
    clip, indices = torch.randn(1, 3, 2, 16, 24), torch.cat([torch.arange(24), torch.arange(24) + 24 * 40])[None]
    mask = torch.zeros(1, 24 * 64, dtype=torch.bool).scatter(1, indices, True)
    found, expected = (run("onevision", pixel_values=clip, visible_indices=form) for form in (mask, indices))
    assert torch.equal(found, expected) and difference(found, run("onevision", pixel_values=clip)) > 1e-2


@pytest.mark.parametrize("kind", ["padded", "onevision"])
def test_one_row_of_indices_is_for_every_sample(kind):
    found = run(kind, visible_indices=CHOSEN[0])
    assert torch.equal(found, run(kind, visible_indices=CHOSEN[:1].expand(2, -1)))


def test_order_is_kept():
    plain, turned = run(visible_indices=CHOSEN), run(visible_indices=CHOSEN.flip(1))
    assert difference(turned.flip(1), plain) < 1e-6 and difference(turned, plain) > 1e-2


def test_repeated_indices_are_tokens_of_their_own():
    """Two tokens of one patch at one place: attention counts it twice."""
    twice = torch.tensor([[5, 5, 0], [1, 2, 1]])
    model = make("padded")
    with torch.no_grad():
        found = model(PIXELS, visible_indices=twice)
    assert difference(found.last_hidden_state, formulas(model, PIXELS, twice).last_hidden_state) < 1e-5
    assert torch.allclose(found.last_hidden_state[0, 0], found.last_hidden_state[0, 1], atol=1e-6)


# --- patch_positions --------------------------------------------------------------------------------------------------

PLACES = torch.randint(0, 9, (2, 24, 3), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", [PLACES.int(), PLACES.float(), PLACES.double(), PLACES.tolist(), PLACES.numpy()])
def test_positions_in_other_forms(form):
    assert difference(run(patch_positions=form), run(patch_positions=PLACES)) < 1e-6


def test_one_table_of_positions_is_for_every_sample():
    assert torch.equal(run(patch_positions=PLACES[0]), run(patch_positions=PLACES[:1].expand(2, -1, -1)))


# --- grid_thw ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [torch.Tensor.int, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.short])
def test_grids_in_other_forms(form):
    rows, grid = pack(images((16, 12), (3, 8, 20)))
    model = make("packed")
    with torch.no_grad():
        assert torch.equal(model(rows, form(grid)).pooler_output, model(rows, grid).pooler_output)


# --- what is refused --------------------------------------------------------------------------------------------------

ROWS, GRID = pack(images((16, 24), (8, 8)))
UNEQUAL = MASK.clone().index_fill(1, torch.tensor([5]), False)
UNEQUAL[0, 5] = True
PADDED = {
    "list of pixels": (dict(pixel_values=list(PIXELS)), r"pixel_values: found list, expected \[B, 3, H, W\]"),
    "bytes of pixels": (dict(pixel_values=PIXELS.byte()), "pixel_values: found torch.uint8, expected normalised"),
    "whole numbers": (dict(pixel_values=PIXELS.long()), "pixel_values: found torch.int64"),
    "no sample": (dict(pixel_values=PIXELS[:0]), r"pixel_values: found shape \(0, 3, 16, 24\)"),
    "no frame": (dict(pixel_values=PIXELS[:, :, None][:, :, :0]), r"pixel_values: found shape \(2, 3, 0, 16, 24\)"),
    "channels last": (dict(pixel_values=PIXELS.movedim(1, -1)), r"pixel_values: found shape \(2, 16, 24, 3\)"),
    "fractions": (dict(visible_indices=CHOSEN.float()), "visible_indices: found torch.float32, expected integers"),
    "one number": (dict(visible_indices=torch.tensor(3)), r"visible_indices: found shape \(\)"),
    "number": (dict(visible_indices=3), r"visible_indices: found shape \(\), expected \[2, K\]"),
    "three dimensions": (dict(visible_indices=CHOSEN[None]), r"visible_indices: found shape \(1, 2, 3\)"),
    "rows of many lengths": (dict(visible_indices=[[1, 2], [3]]), r"visible_indices: found list, expected a tensor \("),
    "words": (dict(visible_indices=["a"]), "visible_indices: found list, expected a tensor"),
    "none of them": (dict(visible_indices=[]), r"visible_indices: found shape \(2, 0\), expected"),
    "none of each": (dict(visible_indices=CHOSEN[:, :0]), r"found shape \(2, 0\), expected \[2, K\] with K > 0"),
    "another batch": (dict(visible_indices=CHOSEN[:1]), r"visible_indices: found shape \(1, 3\), expected \[2, K\]"),
    "another device": (
        dict(visible_indices=CHOSEN.to("meta")),
        "visible_indices: is on meta, expected it on cpu as the patches",
    ),
    "one row beyond": (dict(visible_indices=torch.tensor([0, 24])), "visible_indices: found 0 to 24, expected 0 to 23"),
    "short truth": (dict(visible_indices=MASK[:, :9]), r"found shape \(2, 9\), expected \[2, 24\] of truth values"),
    "truth of another batch": (dict(visible_indices=MASK[:1]), r"found shape \(1, 24\), expected \[2, 24\] of truth"),
    "unequal truth": (dict(visible_indices=UNEQUAL), "truth values that keep 3 to 4 patches of a sample, expected as"),
    "no truth": (dict(visible_indices=MASK & False), "truth values that keep 0 to 0 patches"),
    "positions elsewhere": (dict(patch_positions=PLACES.to("meta")), "patch_positions: is on meta, expected it on cpu"),
    "true positions": (dict(patch_positions=PLACES > 3), "patch_positions: found torch.bool, expected numbers"),
    "positions of one batch": (
        dict(patch_positions=PLACES[:1]),
        r"patch_positions: found shape \(1, 24, 3\), expected",
    ),
    "two of three": (dict(patch_positions=PLACES[..., 1:]), r"patch_positions: found shape \(2, 24, 2\)"),
    "positions of all": (
        dict(patch_positions=PLACES, visible_indices=CHOSEN),
        r"patch_positions: found shape \(2, 24, 3\), expected \(2, 3, 3\)",
    ),
}
PACKED = {
    "list of rows": (dict(hidden_states=list(ROWS)), "hidden_states: found list, expected a tensor"),
    "bytes of rows": (dict(hidden_states=ROWS.byte()), "hidden_states: found torch.uint8, expected normalised"),
    "one grid": (dict(grid_thw=GRID[0]), r"grid_thw: found torch.int64 of shape \(3,\), expected integers of shape"),
    "grid of truth": (dict(grid_thw=GRID > 0), "grid_thw: found torch.bool"),
    "uneven grid": (dict(grid_thw=[[1, 4, 6], [2, 2]]), "grid_thw: found list, expected a tensor"),
    "too many": (dict(grid_thw=GRID[:1]), "with 24 patches, expected sizes of at least 1 with the 28 patches"),
    "zero": (dict(grid_thw=[[1, 4, 6], [0, 2, 2]]), "grid_thw: found .* expected sizes of at least 1"),
    "negative": (dict(grid_thw=[[1, 4, 6], [1, -2, -2]]), "grid_thw: found .* expected sizes of at least 1"),
    "positions elsewhere": (dict(patch_positions=torch.zeros(28, 3, device="meta")), "patch_positions: is on meta"),
    "positions of samples": (dict(patch_positions=torch.zeros(2, 14, 3)), r"patch_positions: found shape \(2, 14, 3\)"),
}


def refused(kind, inputs, message):
    with pytest.raises(ValueError, match=message) as error:
        make(kind)(**inputs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["padded", "onevision"])
@pytest.mark.parametrize("case", PADDED)
def test_refused_by_the_padded_encoder(kind, case):
    inputs, message = PADDED[case]
    refused(kind, {"pixel_values": PIXELS} | inputs, message)


@pytest.mark.parametrize("kind", ["packed", "padded"])
@pytest.mark.parametrize("case", PACKED)
def test_refused_by_the_packed_encoder(kind, case):
    inputs, message = PACKED[case]
    inputs = {"hidden_states": ROWS, "grid_thw": GRID} | inputs
    if kind == "padded":  # which takes packed patches too
        inputs["pixel_values"] = inputs.pop("hidden_states")
    refused(kind, inputs, message)


@pytest.mark.parametrize("size", [(17, 24), (16, 25), (3, 24), (0, 24)])
def test_sizes_of_no_whole_patches(size):
    refused("padded", {"pixel_values": torch.zeros(1, 3, *size)}, f"image of {size[0]}x{size[1]} pixels: .* of {PATCH}")
