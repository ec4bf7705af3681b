"""Adaptive patches for a packed tower: which patches of its images it sees, chosen from the pixels (APT).

Large patches where an image holds little, average-pooled to one token each; base patches elsewhere. How many tokens an
image becomes then depends on what it shows. Shapes: N kept patches of all samples, one sample after the other in
raster order of their top-left cells; M tokens after 2x2 merging.
"""

from dataclasses import dataclass

import torch

from llava.errors import LlavaError
from llava.model.adaptive_patches import PatchTokenizer, kept_patches, pooled_patches
from llava.model.adaptive_patches.selection import check_alpha, check_thresholds
from llava.model.adaptive_patches.tokenizer import IMPORTANCES, SELECTIONS
from llavavit.layers import frames_to_patches, grid_positions

from .builder import uses_compression

MEMBERS = ("method", "alpha", "thresholds", "importance", "num_scales")
THRESHOLDS = (3.0, 2.0)  # v1's published ones: bits of entropy for two and four base patches a side


@dataclass
class ChosenPatches:
    """What the encoder gets of some images and clips.

    rows: [N, C * p * p] pixels of the kept patches, in the images' dtype.
    positions: [N, 3] float32 (t, row, column) of their middles in base patches; a base patch has its own.
    corners: [N, 2] row and column of the top-left base patch.
    levels: [N], 1, 2, 3 for 1, 2, 4 base patches a side.
    lengths: tokens of each sample.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    corners: torch.Tensor
    levels: torch.Tensor
    lengths: list[int]

    def merged(self) -> tuple[torch.Tensor, list[int]]:
        """For a projector that makes one token of each 2x2 base patches: four tokens for each of its own, and counts.

        A larger patch stands in for the four, as in Qwen2-VL with adaptive patches. The grids have even sides.

        Returns:
            index [4 * M] into the N tokens, in raster order of the 2x2 blocks, and the tokens of each sample, which
            add up to M.
        """
        sample = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths)).to(self.levels.device)
        frame, (row, col) = self.positions[:, 0].long(), self.corners.unbind(1)
        place = sample
        for digit, bits in ((frame, 12), (row // 2, 14), (col // 2, 14), (row % 2, 1), (col % 2, 1)):
            place = place << bits | digit
        order = place.argsort()
        times = torch.where(self.levels == 1, 1, 4)
        counts = torch.zeros(len(self.lengths), dtype=torch.long, device=times.device).index_add_(0, sample, times)
        return order.repeat_interleave(times[order]), (counts // 4).tolist()


@dataclass(frozen=True)
class PatchChooser:
    """The choice with its settings; picklable, without weights, and the same on every device.

    patch: side of the base patch in pixels.
    mean, std: what the images were normalised with.
    method, alpha, thresholds, importance, num_scales: as `adaptive_patches` in a config. alpha may be a pair: in
        training each image draws its own from that range, elsewhere the middle is taken.
    """

    patch: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    method: str
    alpha: float | tuple[float, float] | None = None
    thresholds: tuple[float, ...] | None = None
    importance: str = "entropy"
    num_scales: int = 3

    @classmethod
    def from_options(cls, options: dict, patch: int, processor) -> "PatchChooser":
        """From `adaptive_patches` of a config, for a tower of base patch `patch` with this image processor."""
        if not processor.do_rescale:
            raise LlavaError("adaptive_patches: the image processor does not rescale, expected pixels of 0..1")
        plain = not processor.do_normalize
        mean, std = ((0.0,) * 3, (1.0,) * 3) if plain else (processor.image_mean, processor.image_std)
        return cls(patch, tuple(mean), tuple(std), **read_options(options))

    def __str__(self) -> str:
        value = self.thresholds if self.alpha is None else self.alpha
        numbers = " to ".join(map(str, value)) if isinstance(value, tuple) and self.alpha else value
        return f"{self.method}, {'thresholds' if self.alpha is None else 'alpha'} {numbers}"

    def levels(self, images, alphas):
        """The level of the patch over each base patch, uint8 [B, h, w], of images [B, C, H, W] and one alpha each."""
        tokenizer = PatchTokenizer(
            self.num_scales,
            self.patch,
            self.thresholds,
            self.mean,
            self.std,
            method=self.importance,
            patch_selection_method=self.method,
        )
        return tokenizer.construct_masks(tokenizer.compute_importance_maps(images), alphas)[1]

    def alphas(self, count: int, training: bool) -> list[float] | None:
        """One for each image; None where the method has no alpha."""
        if not isinstance(self.alpha, tuple):
            return None if self.alpha is None else [self.alpha] * count
        low, high = self.alpha
        shares = torch.rand(count).tolist() if training else [0.5] * count
        return [low + (high - low) * share for share in shares]

    @torch.no_grad()
    def choose(self, images, training: bool = False) -> ChosenPatches:
        """Choose the patches of a list of images [C, H, W] and of clips [T, C, H, W], which keep all of theirs."""
        parts: list[tuple] = [()] * len(images)
        by_shape: dict[torch.Size, list[int]] = {}
        for i, image in enumerate(images):
            if image.ndim == 4:
                parts[i] = self._whole_clip(image)
            else:
                by_shape.setdefault(image.shape, []).append(i)
        alphas = self.alphas(len(images), training)
        for indices in by_shape.values():
            batch = torch.stack([images[i] for i in indices])
            kept = kept_patches(self.levels(batch, None if alphas is None else [alphas[i] for i in indices]))
            rows = pooled_patches(batch, kept, self.patch).flatten(1)
            corners = torch.stack([kept.rows, kept.cols], 1)
            positions = torch.cat([rows.new_zeros(len(rows), 1, dtype=torch.float32), kept.centres], 1)
            counts = kept.images.bincount(minlength=len(indices)).tolist()
            fields = (field.split(counts) for field in (rows, positions, corners, kept.levels))
            for i, part in zip(indices, zip(*fields, strict=True), strict=True):
                parts[i] = part
        return ChosenPatches(*map(torch.cat, zip(*parts, strict=True)), lengths=[len(part[0]) for part in parts])

    def _whole_clip(self, clip) -> tuple:
        grid = len(clip), clip.shape[-2] // self.patch, clip.shape[-1] // self.patch
        positions = grid_positions([grid], clip.device)
        levels = torch.ones(len(positions), dtype=torch.long, device=clip.device)
        return frames_to_patches(clip, self.patch), positions.float(), positions[:, 1:], levels

    def count(self, image, merging: bool) -> int:
        """Tokens of one image [C, H, W]: kept patches, or what 2x2 merging leaves of them.

        Where alpha is drawn from a range, the most that it can come to.
        """
        most = self.alpha
        if isinstance(most, tuple):
            most = max(most) if self.method == "budget" else min(most)
        return count_tokens(self.levels(image[None], None if most is None else [most]), merging)


def count_tokens(levels, merging: bool) -> int:
    """Kept patches of levels [B, h, w], or what 2x2 merging leaves of them: four base patches are one token then."""
    kept = kept_patches(levels).levels
    return int(torch.where(kept == 1, 1, 4).sum()) // 4 if merging else len(kept)


def read_options(options) -> dict:
    """The members of `adaptive_patches`, checked, as `PatchChooser` takes them.

    Raises:
        LlavaError: a member or value that cannot be, one that is missing, or one that the method does not use.
    """
    name = "adaptive_patches"
    if not isinstance(options, dict):
        raise LlavaError(f"{name}: found {options!r}, expected a mapping such as {{method: budget, alpha: 0.3}}")
    unknown = [member for member in options if member not in MEMBERS]
    if unknown:
        raise LlavaError(f"{name}: found {', '.join(map(repr, unknown))}, expected some of {', '.join(MEMBERS)}")
    method, importance = options.get("method"), options.get("importance", "entropy")
    for member, value, known in (("method", method, SELECTIONS), ("importance", importance, IMPORTANCES)):
        if value not in known:
            raise LlavaError(f"{name}: {member}: found {value!r}, expected one of {', '.join(known)}")
    used, unused = ("thresholds", "alpha") if method == "v1" else ("alpha", "thresholds")
    if options.get(unused) is not None:
        raise LlavaError(f"{name}: {unused}: has no part in method {method}, expected none")
    num_scales, thresholds, alpha = options.get("num_scales", 3), options.get("thresholds"), options.get("alpha")
    if type(num_scales) is not int or not 1 <= num_scales <= 8:
        raise LlavaError(f"{name}: num_scales: found {num_scales!r}, expected a whole number from 1 to 8")
    if used == "thresholds" and thresholds is None and (importance, num_scales) == ("entropy", len(THRESHOLDS) + 1):
        thresholds = THRESHOLDS
    if options.get(used) is None and thresholds is None:
        raise LlavaError(f"{name}: {used}: missing, which method {method} needs")
    try:
        if used == "alpha":
            alpha = _read_alpha(alpha)
        else:
            thresholds = tuple(check_thresholds(thresholds, num_scales))
        # the rest of what does not go together
        PatchTokenizer(num_scales, 1, thresholds, [0.0], [1.0], method=importance, patch_selection_method=method)
    except LlavaError as error:
        raise LlavaError(f"{name}: {error}") from None
    return {
        "method": method,
        "alpha": alpha,
        "thresholds": thresholds,
        "importance": importance,
        "num_scales": num_scales,
    }


def _read_alpha(alpha) -> float | tuple[float, float]:
    if not isinstance(alpha, (list, tuple)):
        return check_alpha(alpha, 1)[0]
    pair = check_alpha(list(alpha), 2) if len(alpha) == 2 else ()
    if not pair or pair[0] > pair[1]:
        raise LlavaError(f"alpha: found {alpha!r}, expected a number, or [lowest, highest] to draw from in training")
    return tuple(pair)


def check_combination(cfg) -> None:
    """Refuse what adaptive patches do not go together with in a model's config or a run's arguments."""
    options = getattr(cfg, "adaptive_patches", None)
    if options is None:
        return
    read_options(options)
    aspect_ratio = getattr(cfg, "image_aspect_ratio", None) or "square"
    if "anyres" in aspect_ratio:
        raise LlavaError(
            f"adaptive_patches: found image_aspect_ratio {aspect_ratio!r}, expected square, pad or native: crops that "
            "keep unlike numbers of tokens cannot be put together into one map"
        )
    projector = getattr(cfg, "mm_projector_type", None) or "linear"
    if projector in ("pooler", "patch_merger"):
        raise LlavaError(
            f"adaptive_patches: found mm_projector_type {projector!r}, expected spatial_merge or one that takes each "
            "token by itself: kept patches form no grid"
        )
    if uses_compression(cfg):
        raise LlavaError("adaptive_patches: found use_token_compression, expected one of the two")
