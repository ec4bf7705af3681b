"""Adaptive patches for a packed tower: which patches of its images it sees, chosen from the pixels (APT).

Large patches where an image holds little, average-pooled to one token each; base patches elsewhere. How many tokens an
image becomes then depends on what it shows. Shapes: N kept patches of all samples, one sample after the other in
raster order of their top-left cells; M tokens after 2x2 merging.
"""

from dataclasses import dataclass

import torch

from llava.errors import LlavaError
from llava.model.adaptive_patches import PatchChoice, PatchTokenizer, kept_patches, pooled_patches
from llavavit.layers import frames_to_patches, grid_positions


@dataclass
class ChosenPatches:
    """What the encoder gets of some images and clips.

    rows: [N, C * p * p] pixels of the kept patches, in the images' dtype, on their device. What follows is on the host.
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
        sample = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))
        frame, (row, col) = self.positions[:, 0].long(), self.corners.unbind(1)
        place = sample
        for digit, bits in ((frame, 12), (row // 2, 14), (col // 2, 14), (row % 2, 1), (col % 2, 1)):
            place = place << bits | digit
        order = place.argsort()
        times = torch.where(self.levels == 1, 1, 4)
        counts = torch.zeros(len(self.lengths), dtype=torch.long).index_add_(0, sample, times)
        return order.repeat_interleave(times[order]), (counts // 4).tolist()


@dataclass(frozen=True)
class PatchChooser:
    """A `PatchChoice` made on a tower's images; picklable, without weights, and the same on every device.

    patch: side of the base patch in pixels.
    mean, std: what the images were normalised with.
    """

    patch: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    choice: PatchChoice

    @classmethod
    def for_processor(cls, choice: PatchChoice, patch: int, processor) -> "PatchChooser":
        """For a tower of base patch `patch` with this image processor."""
        if not processor.do_rescale:
            raise LlavaError("adaptive_patches: the image processor does not rescale, expected pixels of 0..1")
        plain = not processor.do_normalize
        mean, std = ((0.0,) * 3, (1.0,) * 3) if plain else (processor.image_mean, processor.image_std)
        return cls(patch, tuple(mean), tuple(std), choice)

    def levels(self, images, alphas: list[float] | None = None):
        """The level of the patch over each base patch, uint8 [B, h, w], of images [B, C, H, W].

        alphas: one for each image; None: the choice's own, of a range the middle.
        """
        tokenizer = PatchTokenizer.from_choice(self.choice, self.patch, self.mean, self.std)
        return tokenizer.construct_masks(tokenizer.compute_importance_maps(images), alphas)[1]

    @torch.no_grad()
    def choose(self, images, alphas: list[float] | None = None, levels: list | None = None) -> ChosenPatches:
        """Choose the patches of a list of images [C, H, W] and of clips [T, C, H, W], which keep all of theirs.

        Args:
            alphas: as `levels`; a clip's does not count.
            levels: what `levels_of` says of each, on the host; None: they are found here, and on a GPU read once for
                each shape.

        Raises:
            LlavaError: another number of alphas, any where the method has none, or levels of another shape.
        """
        if alphas is not None and (self.choice.alpha is None or len(alphas) != len(images)):
            expected = "none with method v1" if self.choice.alpha is None else f"one for each of {len(images)} images"
            raise LlavaError(f"patch_alphas: found {len(alphas)}, expected {expected}")
        parts: list[tuple] = [()] * len(images)
        by_shape: dict[torch.Size, list[int]] = {}
        for i, image in enumerate(images):
            if image.ndim == 4:
                parts[i] = self._whole_clip(image)
            else:
                by_shape.setdefault(image.shape, []).append(i)
        for indices in by_shape.values():
            batch = torch.stack([images[i] for i in indices])
            if levels is None:
                of_batch = self.levels(batch, None if alphas is None else [alphas[i] for i in indices]).cpu()
            else:
                of_batch = torch.stack([self._checked(levels[i], images[i]) for i in indices])
            kept = kept_patches(of_batch)  # on the host: small, and its sizes depend on the content
            rows = pooled_patches(batch, kept, self.patch).flatten(1)
            corners = torch.stack([kept.rows, kept.cols], 1)
            positions = torch.cat([torch.zeros(len(rows), 1), kept.centres], 1)
            counts = kept.images.bincount(minlength=len(indices)).tolist()
            fields = (field.split(counts) for field in (rows, positions, corners, kept.levels))
            for i, part in zip(indices, zip(*fields, strict=True), strict=True):
                parts[i] = part
        return ChosenPatches(*map(torch.cat, zip(*parts, strict=True)), lengths=[len(part[0]) for part in parts])

    def levels_of(self, pixels, alpha: float | None = None):
        """`levels` [h, w] of an image's pixels [C, H, W] or [1, C, H, W], for `choose`; None of a clip."""
        if pixels.ndim == 4 and len(pixels) > 1:
            return None
        return self.levels(pixels.view(1, *pixels.shape[-3:]), None if alpha is None else [alpha])[0]

    def _checked(self, levels, image):
        grid = [side // self.patch for side in image.shape[-2:]]
        if levels is None or list(levels.shape) != grid:
            found = "none" if levels is None else list(levels.shape)
            raise LlavaError(f"patch_levels: found {found}, expected {grid} for an image of these patches")
        return levels

    def _whole_clip(self, clip) -> tuple:
        grid = len(clip), clip.shape[-2] // self.patch, clip.shape[-1] // self.patch
        positions = grid_positions([grid])
        levels = torch.ones(len(positions), dtype=torch.long)
        return frames_to_patches(clip, self.patch), positions.float(), positions[:, 1:], levels

    def count(self, image, merging: bool) -> int:
        """Tokens of one image [C, H, W]: kept patches, or what 2x2 merging leaves of them.

        Where alpha is drawn from a range, the most that it can come to.
        """
        most = None
        if self.choice.draws:
            most = [max(self.choice.alpha) if self.choice.method == "budget" else min(self.choice.alpha)]
        return count_tokens(self.levels(image[None], most), merging)


def count_tokens(levels, merging: bool) -> int:
    """Kept patches of levels [B, h, w], or what 2x2 merging leaves of them: four base patches are one token then."""
    kept = kept_patches(levels).levels
    return int(torch.where(kept == 1, 1, 4).sum()) // 4 if merging else len(kept)
