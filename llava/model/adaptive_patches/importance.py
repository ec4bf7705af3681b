"""How much each patch of a picture holds: entropy, Laplacian or reconstruction error, at several patch sizes.

All three take images [B, C, H, W] of 0..255 (C 3 or 1, any number type) and return {size: float64 map [B, ceil(H/size),
ceil(W/size)]} for the sizes patch_size * 1, 2, 4, ... A patch that sticks out over the image's edge has importance
`OUTSIDE`.

Two patches with the same pixels must get the same number on every device, or ties between them fall differently. So
every sum is a sum of integers, which no order of summation changes, and what precedes it is either exact in float32 or
a chain of single operations that IEEE 754 rounds in one way. Work goes band by band: no temporary grows with the image.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F

from llava.errors import LlavaError

OUTSIDE = 1e6  # importance of a patch that sticks out over the edge
GREY = (0.2989, 0.5870, 0.1140)
ENTROPY_STEP, PIXEL_STEP = 1e-6, 1e-9  # what importances are rounded to: in bits; of 0..1 pixels
LOG_ONE = 1 << 32  # fixed point of count * log2(count): 10 bits below the rounding, room for patches of 8,192 pixels
GREY_ONE = 1 << 16  # fixed point of grey levels: float32's own step at 128..255
PIXEL_ONE = 4  # pixels are rounded to quarters of a level where they are resampled
CPU_ENTRIES, GPU_ENTRIES = 1 << 18, 1 << 23  # numbers held at a time: what a cache takes; enough to fill a GPU


def patch_entropy(images, patch_size: int, num_scales: int = 3, bins: int = 512) -> dict[int, torch.Tensor]:
    """Shannon entropy of a patch's grey levels in bits, rounded to 1e-6.

    grey = 0.2989 R + 0.5870 G + 0.1140 B, bin = floor(grey * bins / 256), clamped to 0..bins - 1.

    Args:
        images: [B, C, H, W], 0..255.
        patch_size: base patch in pixels.
        num_scales: how many sizes, each twice the one before.
        bins: of the histogram.

    Raises:
        LlavaError: arguments that cannot be, pixels that are NaN or infinite.
    """
    _check(images, patch_size, num_scales)
    if type(bins) is not int or bins < 1:
        raise LlavaError(f"bins: found {bins!r}, expected a positive whole number")
    sizes = [patch_size << level for level in range(num_scales)]
    tables = [_count_logs(size**2).to(images.device) for size in sizes]
    maps, width = _empty_maps(images, sizes), images.shape[3] // patch_size
    for batch, top, bottom in _bands(images, patch_size, num_scales, max(bins, patch_size**2)):
        grey = _grey(images[batch, :, top:bottom, : width * patch_size])
        counts = _histograms(grey, patch_size, bins)
        for level, (size, table) in enumerate(zip(sizes, tables, strict=True)):
            if level:
                counts = _add_quads(counts)
            logs = table.index_select(0, counts.reshape(-1)).view(counts.shape).sum(-1)
            # H = -sum c/A log2(c/A) = (A log2 A - sum c log2 c) / A
            entropy = _quotient(table[-1] - logs, size**2 * LOG_ONE)
            _fill(maps[size], batch, top // size, _rounded(entropy, ENTROPY_STEP))
    return maps


def patch_laplacian(images, patch_size: int, num_scales: int = 3) -> dict[int, torch.Tensor]:
    """Mean |8 grey - its eight neighbours| over a patch, of grey levels as 0..1, the image reflected at its edges.

    At most 8; rounded to 1e-9. Arguments and errors as `patch_entropy`.
    """
    _check(images, patch_size, num_scales)
    sizes = [patch_size << level for level in range(num_scales)]
    height, width = images.shape[2:]
    maps, used = _empty_maps(images, sizes), width // patch_size * patch_size
    columns = _reflected(-1, width + 1, width, images.device)
    for batch, top, bottom in _bands(images, patch_size, num_scales, patch_size**2):
        rows = _reflected(top - 1, bottom + 1, height, images.device)
        grey = (_grey(images[batch][:, :, rows]) * GREY_ONE).round().int()[:, :, columns]
        across = grey[:, :, :-2] + grey[:, :, 1:-1] + grey[:, :, 2:]
        box = across[:, :-2] + across[:, 1:-1] + across[:, 2:]
        edges = (9 * grey[:, 1:-1, 1:-1] - box).abs_()[:, :, :used]
        sums = edges.unflatten(1, (-1, patch_size)).unflatten(3, (-1, patch_size)).sum((2, 4), dtype=torch.int64)
        for level, size in enumerate(sizes):
            if level:
                sums = _add_quads(sums)
            mean = _quotient(sums, size**2 * 255 * GREY_ONE)
            _fill(maps[size], batch, top // size, _rounded(mean, PIXEL_STEP))
    return maps


def patch_reconstruction_error(images, patch_size: int, num_scales: int = 3) -> dict[int, torch.Tensor]:
    """Mean squared error of a patch after the image was scaled down and up again, both bilinear, pixels as 0..1.

    The scale is 1 for the base size, whose error is therefore 0, then 1/2, 1/4, ...: what becomes of a patch that is
    kept as one token. Where a side is no multiple of the scale's inverse, the rows or columns left over take no part.
    Rounded to 1e-9. Arguments and errors as `patch_entropy`.
    """
    _check(images, patch_size, num_scales)
    sizes = [patch_size << level for level in range(num_scales)]
    maps, (height, width) = _empty_maps(images, sizes), images.shape[2:]
    maps[patch_size][:, : height // patch_size, : width // patch_size] = 0
    for batch, top, bottom in _bands(images, patch_size, num_scales, patch_size**2 * images.shape[1]):
        for size in sizes[1:]:
            factor, rows = size // patch_size, (bottom - top) // size * size
            if not rows or width < size:
                continue
            # a row of the small image is made of `factor` rows; upsampling looks one row up and one down
            first, last = max(top - factor, 0), min(top + rows + factor, height // factor * factor)
            pixels = (images[batch, :, first:last, : width // factor * factor].float() * PIXEL_ONE).round()
            # whole numbers, and weights that are binary fractions: both resamplings are exact in float32
            small = F.interpolate(pixels, scale_factor=1 / factor, mode="bilinear")
            again = F.interpolate(small, scale_factor=float(factor), mode="bilinear")
            one = 4 * (2 * factor) ** 2  # 2x2 means, then weights in units of 1 / (2 factor) along both sides
            difference = ((pixels - again) * one)[:, :, top - first :][:, :, :rows, : width // size * size].long()
            squares = difference.square_().sum(1).unflatten(1, (-1, size)).unflatten(3, (-1, size)).sum((2, 4))
            area = size**2 * images.shape[1] * (255 * PIXEL_ONE * one) ** 2
            _fill(maps[size], batch, top // size, _rounded(_quotient(squares, area), PIXEL_STEP))
    return maps


def _check(images, patch_size, num_scales) -> None:
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or images.shape[1] not in (1, 3):
        found = list(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise LlavaError(f"images: found {found}, expected a tensor [B, 3 or 1, H, W]")
    if 0 in images.shape[2:] or images.dtype.is_complex:
        raise LlavaError(f"images: found {images.dtype} {list(images.shape)}, expected numbers in at least one pixel")
    for name, value in {"patch_size": patch_size, "num_scales": num_scales}.items():
        if type(value) is not int or value < 1:
            raise LlavaError(f"{name}: found {value!r}, expected a positive whole number")
    if images.is_floating_point() and images.numel() and not all(end.isfinite() for end in images.aminmax()):
        raise LlavaError("images: found pixels that are NaN or infinite, expected 0..255")


def _empty_maps(images, sizes) -> dict[int, torch.Tensor]:
    batch, _, height, width = images.shape
    shapes = {size: (batch, -(-height // size), -(-width // size)) for size in sizes}
    return {size: images.new_full(shape, OUTSIDE, dtype=torch.float64) for size, shape in shapes.items()}


def _fill(target, batch, row: int, values) -> None:
    _, height, width = values.shape
    target[batch, row : row + height, :width] = values


def _bands(images, patch_size: int, num_scales: int, entries: int):
    """(slice of images, first row, row behind the last) of pieces of whole base patches.

    A piece begins at a multiple of the largest size and holds about as many base patches, of `entries` numbers each,
    as the device handles well.
    """
    rows, columns = images.shape[2] // patch_size, images.shape[3] // patch_size
    if not rows or not columns:
        return
    room = (GPU_ENTRIES if images.is_cuda else CPU_ENTRIES) // entries
    step = 1 << (num_scales - 1)
    step *= max(room // (columns * step), 1)
    together = max(room // (columns * rows), 1)
    for first in range(0, images.shape[0], together):
        for row in range(0, rows, step):
            batch = slice(first, min(first + together, images.shape[0]))
            yield batch, row * patch_size, min(row + step, rows) * patch_size


def _grey(images):
    """[b, C, h, w] -> [b, h, w] in float32.

    The published order, one operation at a time: fused ones round differently, and a colour that lies exactly between
    two bins would then change its bin from one device to another.
    """
    if images.shape[1] == 1:
        return images[:, 0].float()
    images = images.contiguous()  # a picture's channels lie side by side: reading every third number is slow
    red, green, blue = (channel.float() * weight for channel, weight in zip(images.unbind(1), GREY, strict=True))
    return red.add_(green).add_(blue)


def _histograms(grey, patch_size: int, bins: int):
    """[b, h * patch_size, w * patch_size] -> counts [b, h, w, bins], int32."""
    batch, height, width = grey.shape
    rows, columns = height // patch_size, width // patch_size
    # a power of two takes one exact product; a conversion to whole numbers drops what is behind the point
    binned = grey * (bins / 256) if bins & (bins - 1) == 0 else (grey * bins).div_(256)
    index = binned.clamp_(0, bins - 1).long()
    # each patch counts in bins of its own
    index += torch.arange(width, device=grey.device) // patch_size * bins
    index += torch.arange(batch * height, device=grey.device).view(batch, height, 1) // patch_size * (columns * bins)
    # half the memory of bincount, which on a GPU would also wait for the largest index
    counts = torch.zeros(batch * rows * columns * bins, dtype=torch.int32, device=grey.device)
    counts.scatter_add_(0, index.view(-1), counts.new_ones(1).expand(index.numel()))
    return counts.view(batch, rows, columns, bins)


@lru_cache(maxsize=16)
def _count_logs(area: int):
    """count * log2(count) for 0..area in fixed point, int64 [area + 1]; made on the CPU, whatever uses it."""
    return torch.tensor([0] + [round(count * math.log2(count) * LOG_ONE) for count in range(1, area + 1)])


def _add_quads(values):
    """Sums over 2x2 of [b, h, w, ...]; an odd row or column at the end is left out."""
    height, width = values.shape[1] // 2 * 2, values.shape[2] // 2 * 2
    rows = values[:, :height:2, :width] + values[:, 1:height:2, :width]
    return rows[:, :, ::2] + rows[:, :, 1::2]


def _reflected(first: int, last: int, length: int, device):
    """Places first..last - 1 along a side, those outside mirrored at its end pixels."""
    places = torch.arange(first, last, device=device).abs()
    return torch.where(places < length, places, 2 * (length - 1) - places).clamp_(0)


def _rounded(values, step: float):
    per_unit = round(1 / step)
    return _quotient((values * per_unit).round(), per_unit)


def _quotient(values, divisor: int):
    """values / divisor in float64, each rounded once.

    The divisor is a tensor: on CUDA a number would be turned into its reciprocal and multiplied, which rounds twice.
    """
    return values.double() / torch.full((), divisor, dtype=torch.float64, device=values.device)
