"""Which patches of a clip are kept: the first frame whole, then the best later ones (OneVision-Encoder's rule)."""

import math

import numpy as np

from llava.errors import LlavaError
from llava.images.clip import Clip

METHODS = ("codec", "uniform_frames", "saliency", "all")
_CHANGES = 0.5  # without measured changes: a patch changes that has so much of the largest energy of the clip


def patch_energy(clip: Clip, patch: int) -> np.ndarray:
    """float32 [T, h, w]: the sum of the energy over the pixels of each patch of `patch` pixels a side.

    h, w: the patches that lie wholly in a frame, from its upper left corner on.

    Raises:
        LlavaError: a frame is smaller than a patch.
    """
    height, width = clip.frames_THWC.shape[1:3]
    if patch < 1 or min(height, width) < patch:
        raise LlavaError(f"patch: found {patch} pixels, expected at least 1 and no more than a frame, {width}x{height}")
    down = _overlaps(height, clip.energy_THW.shape[1], patch)
    across = _overlaps(width, clip.energy_THW.shape[2], patch)
    # in double precision, so that equal patches stay equal whichever way the sums are taken
    return np.matmul(np.matmul(down, clip.energy_THW), across.T).astype(np.float32)


def _overlaps(pixels: int, blocks: int, patch: int) -> np.ndarray:
    """[patches, blocks]: how many pixels each patch has of each of the blocks that cover a side evenly."""
    edges = np.arange(blocks + 1) * (pixels / blocks)
    starts = np.arange(pixels // patch)[:, None] * float(patch)
    return np.clip(np.minimum(edges[1:], starts + patch) - np.maximum(edges[:-1], starts), 0, None)


def select(
    energy_Thw,
    *,
    method,
    budget=None,
    max_tokens=None,
    frame_equivalents=None,
    first_full=True,
    scene_cut=0.9,
    changed_T=None,
) -> np.ndarray:
    """int32 [K, 3]: rows (t, h, w) of the patches that are kept, sorted, no two alike.

    Args:
        energy_Thw: of each patch of T frames, as `patch_energy` gives.
        method: codec, saliency: by energy (`read_clip` with `motion`, or without), ties by (t, h, w).
            uniform_frames: whole frames, evenly spread, and what is left of K evenly over the others.
            all: every patch, whatever the budget, which may be missing then.
        budget: share of all patches; K = max(h*w, floor(budget*T*h*w)).
        max_tokens: K, or all patches if there are fewer.
        frame_equivalents: K in whole frames, likewise rounded down, and at least one.
        first_full: the first frame is kept whole; the best of all otherwise.
        scene_cut: a later frame of which more than this share changes is a cut, and kept whole if that takes at most
            half of what is left of K; those of most energy first.
        changed_T: the share of each frame that changes, `Clip.changed_T`; None: of patches with at least half the
            largest energy of the clip.

    Raises:
        LlavaError: not exactly one budget, or one out of range; max_tokens below one frame that is to be whole;
            energies that are not finite; an unknown method.
    """
    energy = np.asarray(energy_Thw, dtype=np.float32)
    if energy.ndim != 3 or not energy.size or not np.isfinite(energy).all():
        raise LlavaError(f"energy: found shape {energy.shape}, expected finite numbers [T, h, w]")
    if method not in METHODS:
        raise LlavaError(f"method: found {method!r}, expected one of {', '.join(METHODS)}")
    count = kept_patches(
        energy.shape,
        method=method,
        budget=budget,
        max_tokens=max_tokens,
        frame_equivalents=frame_equivalents,
        first_full=first_full,
    )
    if not 0 <= scene_cut <= 1:
        raise LlavaError(f"scene_cut: found {scene_cut!r}, expected a share from 0 to 1")
    if method == "all":
        kept = np.ones(energy.shape, bool)
    elif method == "uniform_frames":
        kept = _uniform(energy.shape, count)
    else:
        kept = _best(energy, count, first_full, _cuts(energy, changed_T, scene_cut))
    return np.argwhere(kept).astype(np.int32)


def kept_patches(
    shape, *, method="codec", budget=None, max_tokens=None, frame_equivalents=None, first_full=True
) -> int:
    """K, which follows from (T, h, w) and the budget alone. Arguments and errors as `select`'s."""
    frames, height, width = shape
    one, total = height * width, frames * height * width
    given = {"budget": budget, "max_tokens": max_tokens, "frame_equivalents": frame_equivalents}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0 or (name == "max_tokens" and value != int(value)):
            raise LlavaError(f"{name}: found {value!r}, expected a {'whole ' * (name == 'max_tokens')}number above 0")
    if method == "all" and len(given) <= 1:
        return total
    if len(given) != 1:
        raise LlavaError(
            f"video_patches: found {' and '.join(given) or 'no budget'}, expected one of budget, max_tokens, "
            "frame_equivalents"
        )
    if budget is not None:
        if budget > 1:
            raise LlavaError(f"budget: found {budget!r}, expected a share of all patches, at most 1")
        return max(one, math.floor(budget * frames * height * width))
    if frame_equivalents is not None:
        return min(max(one, math.floor(frame_equivalents * one)), total)
    whole = method == "uniform_frames" or first_full
    if whole and max_tokens < one:
        raise LlavaError(f"max_tokens: found {max_tokens}, expected at least {one}, the patches of one whole frame")
    return min(int(max_tokens), total)


def _uniform(shape, count: int) -> np.ndarray:
    kept = np.zeros(shape, bool)
    whole = count // kept[0].size
    kept[np.linspace(0, shape[0] - 1, whole, dtype=int)] = True
    rest = np.flatnonzero(~kept)
    kept.reshape(-1)[rest[np.linspace(0, len(rest) - 1, count - whole * kept[0].size, dtype=int)]] = True
    return kept


def _cuts(energy: np.ndarray, changed_T, scene_cut: float) -> list[int]:
    """The frames of cuts, those of most energy first."""
    if changed_T is None:
        changed_T = (energy >= max(_CHANGES * energy.max(), np.finfo(np.float32).tiny)).mean((1, 2))
    cuts = np.flatnonzero(np.asarray(changed_T) > scene_cut)
    return sorted(cuts.tolist(), key=lambda frame: (-energy[frame].sum(dtype=np.float64), frame))


def _best(energy: np.ndarray, count: int, first_full: bool, cuts: list[int]) -> np.ndarray:
    kept = np.zeros(energy.shape, bool)
    one, left = energy[0].size, count
    if first_full:
        kept[0], left = True, left - one
    for frame in cuts:
        if frame and one <= left / 2:
            kept[frame], left = True, left - one
    flat, open_ = kept.reshape(-1), np.flatnonzero(~kept)
    values = energy.reshape(-1)[open_]
    if left:
        least = np.partition(values, len(values) - left)[len(values) - left]
        flat[open_[values > least]] = True
        ties = open_[values == least]
        flat[ties[: left - np.count_nonzero(values > least)]] = True
    return kept
