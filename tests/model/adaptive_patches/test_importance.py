"""Importances against the published maps and against their formulas, patch by patch."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from llava.errors import LlavaError
from llava.model.adaptive_patches import importance, patch_entropy, patch_laplacian, patch_reconstruction_error
from tests.model.adaptive_patches.pictures import NUMBERS, SIZES, noise, picture, published

ALL = [patch_entropy, patch_laplacian, patch_reconstruction_error]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def whole_patches(values, size):
    """(row, column, values [..., size, size]) of each whole patch of an array [..., H, W]."""
    height, width = values.shape[-2:]
    for row, col in np.ndindex(height // size, width // size):
        yield row, col, values[..., row * size : (row + 1) * size, col * size : (col + 1) * size]


def check_outside(maps, sizes, height, width):
    """The shapes of the maps, and 1e6 at exactly the patches that stick out."""
    assert list(maps) == list(sizes)
    for size, values in maps.items():
        assert values.shape[1:] == (math.ceil(height / size), math.ceil(width / size))
        assert values.dtype == torch.float64
        inside = values[:, : height // size, : width // size]
        assert (inside < 100).all()
        assert int((values == 1e6).sum()) == values.numel() - inside.numel()


@pytest.mark.parametrize("number", NUMBERS)
def test_published_entropies(number):
    values, maps = published(), patch_entropy(picture(number), 14)
    for size in SIZES:
        # half a millionth of our rounding, and the rest what summing in float32 costs the published ones
        torch.testing.assert_close(
            maps[size].float(), values[f"{number}.entropy.{size}"], atol=1.5e-6, rtol=0, msg=str(size)
        )


@pytest.mark.parametrize("bins", [512, 100])
def test_entropy_is_that_of_numpy_for_each_patch(bins):
    pixels = noise(2, 3, 61, 47)
    red, green, blue = (pixels[:, c].numpy().astype(np.float32) for c in range(3))
    grey = np.float32(0.2989) * red + np.float32(0.5870) * green + np.float32(0.1140) * blue
    maps = patch_entropy(pixels, 6, bins=bins)
    check_outside(maps, (6, 12, 24), 61, 47)
    for size in maps:
        for row, col, patch in whole_patches(np.floor(grey * np.float32(bins) / np.float32(256)), size):
            for image in range(2):
                share = np.unique(patch[image], return_counts=True)[1] / size**2
                expected = -(share * np.log2(share)).sum()
                assert maps[size][image, row, col].item() == pytest.approx(expected, abs=6e-7)


def test_entropy_of_patches_done_by_hand():
    pixels = torch.zeros(1, 1, 4, 8)
    pixels[0, 0, :2, 2:4] = torch.tensor([[0.0, 64], [128, 255]])  # four levels
    pixels[0, 0, :2, 4:6] = torch.tensor([[7.0, 7], [7, 90]])  # 3 : 1
    maps = patch_entropy(pixels, 2)
    assert maps[2][0, 0].tolist() == [0.0, 2.0, 0.811278, 0.0]
    # 13, 1, 1, 1 and 12, 3, 1 of 16
    left = 13 / 16 * math.log2(16 / 13) + 3 / 16 * 4
    right = 12 / 16 * math.log2(16 / 12) + 3 / 16 * math.log2(16 / 3) + 1 / 16 * 4
    assert maps[4][0, 0].tolist() == pytest.approx([left, right], abs=6e-7)
    assert not torch.signbit(maps[2]).any()


def test_grey_levels_beyond_the_ends_count_in_the_last_bins():
    pixels = torch.tensor([-5.0, 0, 255.2, 300, 255.7, 0.4]).repeat_interleave(6).view(1, 1, 6, 6)
    # bins 0, 0, 510, 511, 511, 0
    expected = 1 / 2 + 1 / 3 * math.log2(3) + 1 / 6 * math.log2(6)
    assert patch_entropy(pixels, 6, 1)[6].item() == pytest.approx(expected, abs=6e-7)


def test_order_of_pixels_does_not_change_entropy():
    pixels = picture(0)[:, :, :56, :56]
    shuffled = pixels.flatten(2)[:, :, torch.randperm(56 * 56, generator=torch.Generator().manual_seed(1))]
    before, after = patch_entropy(pixels, 56, 1), patch_entropy(shuffled.view(pixels.shape), 56, 1)
    assert torch.equal(before[56], after[56])


def test_laplacian_is_that_of_a_convolution():
    pixels = noise(2, 3, 45, 38)
    weights = torch.tensor([0.2989, 0.5870, 0.1140], dtype=torch.float64)[:, None, None]
    grey = (pixels.double() * weights).sum(1, keepdim=True) / 255
    kernel = -torch.ones(1, 1, 3, 3, dtype=torch.float64)
    kernel[..., 1, 1] = 8
    edges = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="reflect"), kernel)[:, 0].abs()
    maps = patch_laplacian(pixels, 5)
    check_outside(maps, (5, 10, 20), 45, 38)
    for size in maps:
        for row, col, patch in whole_patches(edges.numpy(), size):
            np.testing.assert_allclose(maps[size][:, row, col], patch.mean((1, 2)), atol=1e-6, rtol=0)
    assert maps[5][0, 1, 1] == 0 and maps[5][0, 8, 6] > 0.1


@pytest.mark.parametrize("channels, num_scales", [(3, 3), (1, 4)])
def test_reconstruction_error_is_that_of_resampling_the_whole_image(channels, num_scales):
    pixels = noise(2, channels, 64, 88)
    maps = patch_reconstruction_error(pixels, 7, num_scales)
    sizes = [7 << level for level in range(num_scales)]
    check_outside(maps, sizes, 64, 88)
    unit = pixels.double() / 255
    for level, size in enumerate(sizes):
        small = F.interpolate(unit, scale_factor=0.5**level, mode="bilinear")
        squares = (F.interpolate(small, scale_factor=2**level, mode="bilinear") - unit).square().mean(1)
        for row, col, patch in whole_patches(squares.numpy(), size):
            np.testing.assert_allclose(maps[size][:, row, col], patch.mean((1, 2)), atol=1e-9, rtol=0)
    assert not maps[7][:, :9, :12].any() and maps[14][0, 3, 5] > 1e-3


@pytest.mark.parametrize("compute", ALL)
def test_one_grey_level_holds_nothing(compute):
    for values in compute(torch.full((1, 3, 56, 56), 200), 14).values():
        assert not values.any()


@pytest.mark.parametrize("compute", ALL)
def test_number_types_and_repetition_do_not_matter(compute):
    pixels = noise(2, 3, 75, 91)
    expected = compute(pixels, 5)
    for other in (pixels, pixels.float(), pixels.double(), pixels.int(), pixels.to(torch.bfloat16)):
        found = compute(other, 5)
        assert all(torch.equal(found[size], expected[size]) for size in expected)


@pytest.mark.parametrize("compute", ALL)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_images_stay_as_they_are(compute, channels):
    images = noise(1, channels, 56, 84).float()
    before = images.clone()
    compute(images, 14)
    assert torch.equal(images, before)


@pytest.mark.parametrize("compute", ALL)
def test_fractions_of_grey_levels_count(compute):
    pixels = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(0)) * 255
    assert not torch.equal(compute(pixels, 14)[28], compute(pixels.round(), 14)[28])


@pytest.mark.parametrize("compute", ALL)
@pytest.mark.parametrize("entries", [1, 20_000, 1 << 30])
def test_the_pieces_that_are_worked_on_do_not_show(compute, entries, monkeypatch):
    pixels = noise(3, 3, 115, 102)
    expected = compute(pixels, 7)
    monkeypatch.setattr(importance, "CPU_ENTRIES", entries)
    found = compute(pixels, 7)
    assert all(torch.equal(found[size], expected[size]) for size in expected)


@pytest.mark.parametrize("compute", ALL)
def test_a_batch_is_its_images_one_by_one(compute):
    pixels = noise(4, 3, 60, 57)
    together = compute(pixels, 7)
    for image in range(4):
        alone = compute(pixels[image : image + 1], 7)
        assert all(torch.equal(together[size][image], alone[size][0]) for size in alone)


@pytest.mark.parametrize("compute", ALL)
@pytest.mark.parametrize("device", DEVICES)
def test_every_device_finds_the_same(compute, device):
    pixels = torch.cat([picture(2), noise(1, 3, 224, 224)])
    expected, found = compute(pixels, 14), compute(pixels.to(device), 14)
    assert all(torch.equal(expected[size], found[size].cpu()) for size in expected)
    assert found[14].device.type == device


class ReciprocalDivision(TorchDispatchMode):
    """Divides by a number as CUDA does: times its reciprocal, rounded before the product is."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.div.Tensor, torch.ops.aten.div_.Tensor) and not isinstance(
            args[1], torch.Tensor
        ):
            product = torch.ops.aten.mul_ if function is torch.ops.aten.div_.Tensor else torch.ops.aten.mul
            return product.Tensor(args[0], 1 / args[1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("compute", ALL)
def test_a_device_that_divides_by_reciprocals_finds_the_same(compute):
    images, expected = picture(0), compute(picture(0), 14)
    with ReciprocalDivision():
        assert not torch.equal(torch.arange(1, 100).double() / 49, torch.tensor([n / 49 for n in range(1, 100)]))
        found = compute(images, 14)
    assert all(torch.equal(found[size], values) for size, values in expected.items())


@pytest.mark.parametrize("compute", ALL)
@pytest.mark.parametrize("height, width", [(5, 60), (60, 5), (1, 1), (14, 14), (27, 29)])
def test_small_images(compute, height, width):
    check_outside(compute(noise(1, 3, height, width), 14), SIZES, height, width)


@pytest.mark.parametrize("compute", ALL)
def test_no_images(compute):
    maps = compute(torch.zeros(0, 3, 28, 28), 14)
    assert {size: tuple(values.shape) for size, values in maps.items()} == {14: (0, 2, 2), 28: (0, 1, 1), 56: (0, 1, 1)}


@pytest.mark.parametrize("compute", ALL)
@pytest.mark.parametrize(
    "change, message",
    [
        ({"images": torch.zeros(3, 28, 28)}, "images: found .3, 28, 28., expected a tensor .B, 3 or 1, H, W."),
        ({"images": torch.zeros(1, 4, 28, 28)}, "images: found .1, 4, 28, 28."),
        ({"images": np.zeros((1, 3, 28, 28))}, "images: found ndarray"),
        ({"images": torch.zeros(1, 3, 0, 28)}, "at least one pixel"),
        ({"images": torch.full((1, 3, 28, 28), math.nan)}, "images: found pixels that are NaN or infinite"),
        ({"images": torch.zeros(1, 3, 30, 30).index_fill(3, torch.tensor(29), math.inf)}, "NaN or infinite"),
        ({"patch_size": 0}, "patch_size: found 0, expected a positive whole number"),
        ({"patch_size": 14.0}, "patch_size: found 14.0"),
        ({"num_scales": 0}, "num_scales: found 0"),
    ],
)
def test_bad_arguments_are_refused(compute, change, message):
    with pytest.raises(LlavaError, match=message) as error:
        compute(**{"images": torch.zeros(1, 3, 28, 28), "patch_size": 14, **change})
    assert "\n" not in str(error.value)


def test_a_histogram_without_bins_is_refused():
    with pytest.raises(LlavaError, match="bins: found 0"):
        patch_entropy(torch.zeros(1, 3, 28, 28), 14, bins=0)
