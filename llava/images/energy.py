"""Where something happens in a frame: motion and residual as maps of 0..1, fused (OneVision-Encoder's formulas)."""

import math
from typing import NamedTuple

import numpy as np

from llava.images.motion import camera_motion, exported_field, leftover, matched_fields, median_vector, whole_shift

BLOCK = 8  # pixels of the picture on a side of what one vector stands for
FUSIONS = ("weighted", "max", "sum", "geomean")
_PERCENTILE = 95.0
_LARGEST = 110_000  # pixels of a map, unless it is a quarter of the picture's size already
_ENOUGH = 0.75  # of the blocks have a vector, or those of a decoder do not tell how the camera moved ...
_ALIKE = 0.5  # ... and move with it, within a pixel of the picture
_CELL, _LEVELS = 4, 5  # for changes: cells of so many pixels a side, grey levels


class Luma(NamedTuple):
    """Small luma maps: what they are small by, and their sizes in pixels.

    Attributes:
        picture: (width, height) of the pictures.
        factor: 4, 2 or 1, the less the smaller the picture is, so that small things stay visible.
        height, width: of the map.
        block: map pixels on a side of a block of vectors (`BLOCK` pixels of the picture).
        search: map pixels on a side of a block that is searched for, and how far it is.
    """

    picture: tuple[int, int]
    factor: int
    height: int
    width: int
    block: int
    search: tuple[int, int]

    @classmethod
    def of(cls, width: int, height: int) -> "Luma":
        """For pictures of (width, height)."""
        factor = next((each for each in (1, 2) if width * height <= _LARGEST * each**2), 4)
        small = (max(round(side / factor), 1) for side in (height, width))
        return cls((width, height), factor, *small, BLOCK // factor, {4: (4, 3), 2: (4, 4), 1: (8, 7)}[factor])

    def padded(self, values: np.ndarray) -> np.ndarray:
        """Sides that are multiples of all blocks, by repeating the last row and column."""
        down, across = (-side % self.search[0] for side in values.shape)
        return np.pad(values, ((0, down), (0, across)), "edge") if down or across else values


class Moved(NamedTuple):
    """How a frame differs from the one displayed before it.

    Attributes:
        residual: uint8 [h, w], luma levels left after moving the earlier frame by the vectors.
        vectors: float32 [rows, columns, 2] of (dx, dy) in pixels of the picture, or None.
        exported: the vectors come from the decoder.
    """

    residual: np.ndarray
    vectors: np.ndarray | None
    exported: bool


def moved(now, before, luma: Luma, exported: np.ndarray | None, distances: tuple[int, ...]) -> Moved:
    """By the decoder's vectors if there are any, else by block matching; both are over one displayed frame.

    Args:
        now, before: uint8 [h, w] of `luma`.
        exported: the decoder's vectors, or None; they are taken if most blocks have one and move alike.
        distances: how many frames back these may point. Nothing tells which it was: a block takes the one that fits.
            Blocks without a vector, and those that fit better so, move with the camera.
    """
    height, width = now.shape
    now, before = luma.padded(now), luma.padded(before)
    block, factor = luma.block, np.float32(luma.factor)
    if exported is not None:
        given = _given_fields(now, before, luma, exported, distances)
        if given is not None:
            residual, field = leftover(now, before, *given, block)
            return Moved(residual[:height, :width], field * factor, True)
    side, radius = luma.search
    cameras, fields = matched_fields(now, before, side, radius)
    camera = camera_motion(now, before, cameras)
    residual, field = leftover(now, before, camera, fields, side, still=cameras[0])
    times = side // block
    field = np.repeat(np.repeat(field, times, 0), times, 1)
    return Moved(residual[:height, :width], field * factor, False)


def _given_fields(now, before, luma: Luma, exported, distances) -> tuple[np.ndarray, list] | None:
    """The camera's motion and the fields to choose from; None where the decoder's vectors do not tell the first."""
    block, factor = luma.block, np.float32(luma.factor)
    raw, known = exported_field(exported, now.shape[0] // block, now.shape[1] // block, BLOCK)
    if known.mean() < _ENOUGH:
        return None
    common = median_vector(raw, known)
    camera = camera_motion(now, before, [common / (factor * distance) for distance in distances])
    fields = [raw / (factor * distance) for distance in distances]
    nearest = fields[0].copy() if len(fields) == 1 else _nearest(fields, camera)
    nearest[~known] = camera
    alike = np.abs(nearest - camera) <= 1 / factor
    if (alike[..., 0] & alike[..., 1]).mean() < _ALIKE:
        return None
    return camera, [nearest, *fields] if len(fields) > 1 else [nearest]


def _nearest(fields: list, camera: np.ndarray) -> np.ndarray:
    """Of each block the vector of these that is nearest the camera's motion."""
    off = [np.abs(field - camera).sum(-1) for field in fields]
    return np.take_along_axis(np.stack(fields), np.argmin(off, 0)[None, ..., None], 0)[0]


def residual_energy(levels: np.ndarray) -> np.ndarray:
    """|luma difference| in levels -> 0..1: of the 95th percentile, which counts as at least one level."""
    shares = np.minimum(np.arange(256, dtype=np.float32) / max(_percentile(levels), 1.0), 1)
    return shares.astype(np.float32)[levels]


def motion_energy(vectors: np.ndarray) -> np.ndarray:
    """[rows, columns, 2] -> 0..1 [rows, columns]: lengths without the median vector (the camera's), of their 95th
    percentile, which counts as at least 1e-6."""
    own = vectors - median_vector(np.ascontiguousarray(vectors, np.float32))
    lengths = np.sqrt(own[..., 0] ** 2 + own[..., 1] ** 2)
    return np.minimum(lengths / np.float32(max(np.percentile(lengths, _PERCENTILE), 1e-6)), np.float32(1))


def _percentile(levels: np.ndarray) -> float:
    """numpy's, of uint8, by counting."""
    ends = np.cumsum(np.bincount(levels.reshape(-1), minlength=256))
    place = _PERCENTILE / 100 * (levels.size - 1)
    low, high = (int(np.searchsorted(ends, at, side="right")) for at in (math.floor(place), math.ceil(place)))
    return low + (high - low) * (place - math.floor(place))


def fuse(motion: np.ndarray, residual: np.ndarray, how: str, weights: tuple[float, float]) -> np.ndarray:
    """One map of 0..1 of both: weighted mean by (motion, residual), max, sum cut off at 1, or geometric mean."""
    if how == "max":
        return np.maximum(motion, residual)
    if how == "sum":
        return np.minimum(motion + residual, 1)
    if how == "geomean":
        return np.sqrt(motion * residual)
    of_motion, of_residual = (np.float32(weight / sum(weights)) for weight in weights)
    return motion * of_motion + residual * of_residual


def frame_energy(found: Moved, block: int, how: str, weights: tuple[float, float]) -> np.ndarray:
    """float32 [h, w] of 0..1; that of the residual alone where there are no vectors."""
    residual = residual_energy(found.residual)
    if found.vectors is None:
        return residual
    motion = motion_energy(found.vectors)
    height, width = residual.shape
    spread = np.repeat(np.repeat(motion, block, 0), block, 1)[:height, :width]
    return fuse(spread, residual, how, weights)


def thumbnail(values: np.ndarray) -> np.ndarray:
    """float32, about 64 pixels on the longer side, of a map [h, w]."""
    factor = min(max(round(max(values.shape) / 64), 1), *values.shape)
    height, width = (side // factor for side in values.shape)
    total = np.zeros((height, values.shape[1]), np.float32)
    for at in range(factor):
        total += values[at : height * factor : factor]
    return total[:, : width * factor].reshape(height, width, factor).sum(-1) / factor**2


def changed_share(now: np.ndarray, earlier: np.ndarray) -> float:
    """How much of a thumbnail is not in an earlier one, whichever way the camera turned meanwhile, 0..1.

    Counted in cells of 4x4 pixels, those that differ by more than 5 levels on average, under the shift of the whole
    picture at which they are fewest. A pixel differs by what it lies outside of what is between the earlier one and
    its neighbours half a pixel around (Birchfield and Tomasi's measure), so that parts of a pixel do not count.
    """
    height, width = earlier.shape
    wide = np.pad(earlier, 1, "edge")
    around = [(earlier + wide[y : y + height, x : x + width]) / 2 for y in range(3) for x in range(3)]
    low, high = np.minimum.reduce(around), np.maximum.reduce(around)
    still = _changed(now, low, high)
    if still < 0.5 or min(now.shape) < 8:
        return still
    down, across = whole_shift(_half(now), _half(earlier), 4)
    shifts = [(2 * down + y, 2 * across + x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    return min(still, *(_changed(*_overlap(now, low, high, y, x)) for y, x in shifts))


def _half(values: np.ndarray) -> np.ndarray:
    height, width = (side // 2 * 2 for side in values.shape)
    return sum(values[y:height:2, x:width:2] for y in (0, 1) for x in (0, 1)) / 4


def _overlap(now, low, high, down: int, across: int) -> list[np.ndarray]:
    """What both show if the content moved so."""
    height, width = now.shape
    y, x = slice(max(down, 0), height + min(down, 0)), slice(max(across, 0), width + min(across, 0))
    back = slice(max(-down, 0), height + min(-down, 0)), slice(max(-across, 0), width + min(-across, 0))
    return [now[y, x], low[back], high[back]]


def _changed(now: np.ndarray, low: np.ndarray, high: np.ndarray) -> float:
    off = np.maximum(np.maximum(now - high, low - now), 0)
    height, width = (side // _CELL for side in off.shape)
    if not height or not width:
        return float(off.mean() > _LEVELS)
    rows = off[: height * _CELL].reshape(height, _CELL, -1).sum(1)
    cells = rows[:, : width * _CELL].reshape(height, width, _CELL).sum(-1)
    return float((cells > _LEVELS * _CELL**2).mean())
