"""The steps of a photo through the model's image handling, observed rather than computed anew.

The photo goes through the pipeline's own functions. Where a step has a result that they do not return, a marked input
tells: a white photo shows where it lies on the canvas, and features that carry their own place show which visual token
stands for what.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image

from llava.errors import LlavaError
from llava.images.geometry import (
    expand2square,
    get_anyres_image_grid_shape,
    parse_grid_pinpoints,
    resize_and_pad_image,
    resolution_fit,
    select_best_resolution,
)
from llava.images.processing import processor_sides
from llava.model.visual_merge import merge_visual_tokens, unpad_image

BASE, MAP, NEWLINE, ROW, COLUMN = range(5)  # channels of a marked feature


class Candidate(NamedTuple):
    """A resolution of the grid; pixels that it keeps of the photo and that it wastes."""

    width: int
    height: int
    effective: int
    wasted: int


@dataclass
class Walk:
    """What became of a photo. Sizes are (width, height) in pixels, maps (rows, columns) in tokens.

    pixels, made, levels: as `llava.families.geometry.View` has them.
    candidates, best: of anyres, best first; None and [] elsewhere.
    canvas: what the photo is laid on before it is cut or resized, and `box` (left, top, right, bottom) its place there.
    crops: (down, across).
    crop_grid: tokens (h, w) of one crop, None where a class token is among them.
    full, unpadded, final: the map of all crops, without padding, and as it is kept; None where there is no map.
    cells: for a map, [rows, columns, 2]: the place (row, column) on the full map that each kept token stands for.
    among_others: tokens where the photo is one of several in a sample; None where that makes no difference.
    """

    size: tuple[int, int]
    pixels: torch.Tensor
    made: str
    levels: torch.Tensor | None
    candidates: list[Candidate]
    best: tuple[int, int] | None
    canvas: tuple[int, int] | None
    box: tuple[int, int, int, int] | None
    crops: tuple[int, int]
    crop_tokens: int
    crop_grid: tuple[int, int] | None
    full: tuple[int, int] | None
    unpadded: tuple[int, int] | None
    final: tuple[int, int] | None
    cells: torch.Tensor | None
    base_tokens: int
    map_tokens: int
    newline_tokens: int
    total: int
    among_others: int | None

    @property
    def resized(self) -> tuple[int, int] | None:
        return self.box and (self.box[2] - self.box[0], self.box[3] - self.box[1])


def walk(photo: Image.Image, geometry) -> Walk:
    """The walk of an RGB photo.

    Raises:
        LlavaError: sizes that no image processor takes, or a layout that the model refuses.
    """
    rules, processor = geometry.rules, geometry.processor
    view = _view(photo, geometry)
    pixels = view.pixels
    candidates, best, canvas, box = [], None, None, None
    crops = (1, 1)
    if "anyres" in rules.image_aspect_ratio:
        grid = parse_grid_pinpoints(rules.image_grid_pinpoints, processor_sides(processor)[1])
        candidates = [Candidate(*pair, *resolution_fit(photo.size, pair)) for pair in grid]
        candidates.sort(key=lambda each: (-each.effective, each.wasted))  # stable: the earliest of equals first
        best = canvas = select_best_resolution(photo.size, grid)
        box = resize_and_pad_image(Image.new("RGB", photo.size, "white"), best).getbbox()
        crops = get_anyres_image_grid_shape(photo.size, rules.image_grid_pinpoints, pixels.shape[-1])[::-1]
    elif rules.image_aspect_ratio == "pad":
        white = expand2square(Image.new("RGB", photo.size, "white"), (0, 0, 0))
        canvas, box = white.size, white.getbbox()
    elif rules.native:
        canvas, box = (pixels.shape[-1], pixels.shape[-2]), (0, 0, pixels.shape[-1], pixels.shape[-2])
    found = {"candidates": candidates, "best": best, "canvas": canvas, "box": box, "crops": crops}
    among_others = None
    if not rules.native:
        one = _view(photo, geometry, alone=False)
        among_others = tokens(one.pixels.shape, (1, 1), photo.size, geometry, one.tokens)["total"]
    counts = tokens(pixels.shape, crops, photo.size, geometry, view.tokens)
    seen = {"pixels": pixels, "made": view.made, "levels": view.levels}
    return Walk(size=photo.size, **seen, **found, **counts, among_others=among_others)


def _view(photo, geometry, alone=True):
    try:
        return geometry.view(photo, alone)
    except LlavaError:
        raise
    except (ValueError, ZeroDivisionError) as error:
        raise LlavaError(f"found {photo.width}x{photo.height} pixels that cannot be processed ({error})") from None


def tokens(shape, crops: tuple[int, int], size: tuple[int, int], geometry, chosen: int | None = None) -> dict:
    """The fields of a `Walk` that count tokens, for pixels of `shape` [K, 3, H, W] and a photo of (width, height).

    chosen: the photo's tokens, of a tower that chooses them.
    """
    rules = geometry.rules
    per_crop, grid = geometry.token_grid(*shape[-2:])
    if chosen is not None:
        per_crop, grid = chosen, None
    whole = rules.keeps_rows or shape[0] > 1  # the tokens, or those after the base view, form a map
    marks = mark(shape[0], per_crop, grid, crops, has_base=shape[0] > 1 or not whole)
    newline = torch.eye(5, dtype=marks.dtype)[NEWLINE] if rules.unpad else None
    merged = merge_visual_tokens(marks, grid, size, "image", shape[-1], newline, rules)
    counts = {name: int((merged[:, at] > 0.5).sum()) for name, at in (("b", BASE), ("m", MAP), ("n", NEWLINE))}
    full = unpadded = final = cells = None
    if whole and grid is not None and rules.mm_patch_merge_type != "flat":
        full = crops[0] * grid[0], crops[1] * grid[1]
        unpadded = full
        if rules.unpad and not rules.native and "maxpool2x2" not in rules.mm_patch_merge_type:
            unpadded = tuple(unpad_image(torch.zeros(1, *full), size).shape[1:])
        places = merged[merged[:, MAP] > 0.5][:, [ROW, COLUMN]]
        rows = len(places[:, 0].mul(1e6).round().unique())
        # a photo so long that unpadding leaves no row or column has no map at all
        cells = places.unflatten(0, (rows, -1)) if rows else places.new_zeros(*unpadded, 2)
        final = tuple(cells.shape[:2])
    return {
        "crop_tokens": per_crop,
        "crop_grid": grid,
        **{"full": full, "unpadded": unpadded, "final": final, "cells": cells},
        **{"base_tokens": counts["b"], "map_tokens": counts["m"], "newline_tokens": counts["n"]},
        "total": len(merged),
    }


def mark(count: int, per_crop: int, grid, crops: tuple[int, int], has_base: bool) -> torch.Tensor:
    """[K, T, 5] features that say what they are: of the base view or of the map, and there at which row and column."""
    marks = torch.zeros(count, per_crop, 5, dtype=torch.float64)
    marks[:, :, MAP] = 1
    if has_base:
        marks[0, :, BASE], marks[0, :, MAP] = 1, 0
    if grid is not None:
        h, w = grid
        row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        for index, crop in enumerate(marks[1:] if has_base else marks):
            crop[:, ROW] = row.flatten() + index // crops[1] * h
            crop[:, COLUMN] = column.flatten() + index % crops[1] * w
    return marks
