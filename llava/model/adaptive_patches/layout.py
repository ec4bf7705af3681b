"""The kept patches as a sequence of tokens: their levels, places and pixels.

Places count in base cells, from the top left. The order is that of the top-left cells.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from llava.errors import LlavaError
from llava.model.host import send


class KeptPatches(NamedTuple):
    """N kept patches: int64 [N] each.

    images: which image of the batch; levels: 1, 2, 3 for 1, 2, 4 base cells a side; rows, cols: the top-left cell.
    """

    images: torch.Tensor
    levels: torch.Tensor
    rows: torch.Tensor
    cols: torch.Tensor

    @property
    def centres(self):
        """(row, col) of each patch's middle, float32 [N, 2], in base cells: a base patch has its own row and column,
        one of level 2 lies half a cell further, one of level 3 one and a half."""
        middle = ((1 << (self.levels - 1)) - 1) / 2
        return torch.stack([self.rows + middle, self.cols + middle], 1)


def kept_patches(levels, order: str = "raster") -> KeptPatches:
    """Where the patches of a cover are.

    Args:
        levels: [B, H1, W1], the level of the patch that covers a base cell, as the selections return it.
        order: "raster" (image, row, column), or "cells": image, then blocks of 2x2 base cells row by row, then row and
            column in the block. In the second, which is Qwen2-VL's, the four patches that its merger joins follow each
            other; a block is either four patches of level 1, or one of level 2, or (part of) one of a higher level.

    Raises:
        LlavaError: levels of another shape, an unknown order.
    """
    if not isinstance(levels, torch.Tensor) or levels.ndim != 3 or levels.is_floating_point():
        raise LlavaError("levels: expected a tensor of whole numbers [B, H1, W1]")
    if order not in ("raster", "cells"):
        raise LlavaError(f"order: found {order!r}, expected raster or cells")
    _, height, width = levels.shape
    levels = levels.long()
    side = 1 << (levels - 1).clamp(min=0)
    rows, cols = (torch.arange(length, device=levels.device) for length in (height, width))
    # a patch lies at multiples of its own side, so that one of its cells, the first, has both there
    first = (((rows[:, None] | cols) & (side - 1)) == 0) & (levels > 0)
    if order == "raster":
        image, row, col = first.nonzero().unbind(1)
    else:
        blocks = F.pad(first, (0, width % 2, 0, height % 2)).unflatten(1, (-1, 2)).unflatten(3, (-1, 2))
        image, block_row, block_col, row, col = blocks.transpose(2, 3).nonzero().unbind(1)
        row, col = 2 * block_row + row, 2 * block_col + col
    return KeptPatches(image, levels[image, row, col], row, col)


def pooled_patches(images, kept: KeptPatches, patch_size: int):
    """The pixels of kept patches, average-pooled to the base patch; those of level 1 as they are.

    Args:
        images: [B, C, H, W], H and W multiples of the base patch.
        kept: of these images, in any order; on the host, where their number is known without waiting for the device.
        patch_size: base patch in pixels.

    Returns:
        [N, C, patch_size, patch_size] in the order of `kept`, in the images' dtype (float32 for whole numbers).

    Raises:
        LlavaError: an image that ends inside a base patch.
    """
    check_pixels(images, patch_size)
    dtype = images.dtype if images.is_floating_point() else torch.float32
    out = images.new_empty(len(kept.levels), images.shape[1], patch_size, patch_size, dtype=dtype)
    levels, places = kept.levels.unique().tolist(), []
    for level in levels:
        of_level = (kept.levels == level).nonzero()[:, 0]
        rows, cols = kept.rows[of_level] >> (level - 1), kept.cols[of_level] >> (level - 1)
        places += [of_level, kept.images[of_level], rows, cols]
    if kept.levels.device.type == "cpu":
        places = send(places, images.device)
    for level, (of_level, *where) in zip(levels, zip(*[iter(places)] * 4, strict=True), strict=True):
        # taken out first and pooled then: the pixels of a cover are read once, whatever the levels
        out[of_level] = pooled(patch_grid(images, patch_size << (level - 1))[tuple(where)], level)
    return out


def check_pixels(images, patch_size: int) -> None:
    """`LlavaError` unless whole base patches make up the images."""
    if not isinstance(images, torch.Tensor) or images.ndim != 4:
        found = list(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise LlavaError(f"images: found {found}, expected a tensor [B, C, H, W]")
    height, width = images.shape[2:]
    if height % patch_size or width % patch_size:
        raise LlavaError(
            f"images: found {height}x{width} pixels, expected multiples of the patch size {patch_size}: a patch that "
            "sticks out has no pixels there"
        )


def patch_grid(images, size: int):
    """All whole patches of `size` pixels a side, [B, h, w, C, size, size], a view of the images."""
    height, width = (side // size * size for side in images.shape[2:])
    images = images[:, :, :height, :width]
    return images.unflatten(2, (-1, size)).unflatten(4, (-1, size)).permute(0, 2, 4, 1, 3, 5)


def pooled(patches, level: int):
    """Means over squares of 2^(level - 1) pixels a side, [N, C, P, P] -> [N, C, p, p], of whole numbers in float32."""
    factor = 1 << (level - 1)
    patches = patches if patches.is_floating_point() else patches.float()
    if factor == 1 or not patches.numel():
        return patches[:, :, ::factor, ::factor]
    return F.avg_pool2d(patches, factor)
