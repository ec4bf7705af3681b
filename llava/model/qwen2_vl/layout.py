"""Where the kept patches of a batch's images are, for vision encoder, merger and language model alike."""

from dataclasses import dataclass

import torch

from llava.errors import LlavaError
from llava.model.adaptive_patches import kept_patches

MERGE = 2  # base patches a side that Qwen2-VL's merger joins into one token of the language model


@dataclass
class PatchLayout:
    """N kept patches (vision tokens) and M language-model tokens, of all images one after the other; on the host.

    Vision tokens come cell by cell (28 pixels, row-major), the four base patches of a cell in a row; so do the
    language model's tokens, by the cell that holds their top left corner.
    """

    centres: torch.Tensor  # [N, 2] float32: (row, col) of a patch's middle in base patches; a base patch has its own
    lengths: list[int]  # vision tokens of each image
    merge_index: torch.Tensor  # [4 M]: four vision tokens for each token of the language model, a large one four times
    cells: torch.Tensor  # [M, 2]: (row, col) of each of them, in cells
    tokens: list[int]  # tokens of the language model, for each image

    @classmethod
    def from_levels(cls, levels: torch.Tensor, grid_thw: torch.Tensor) -> "PatchLayout":
        """From `image_patch_levels`, the level (1, 2, 3) of the patch over each base patch, row by row, image by image.

        Args:
            levels: [sum of h * w], whole numbers.
            grid_thw: [images, 3], the full grids in base patches.

        Raises:
            LlavaError: levels of another length, or an image of several frames.
        """
        levels, grids = levels.cpu(), grid_thw.tolist()  # small, and its sizes depend on the content
        sizes = [t * h * w for t, h, w in grids]
        if sum(sizes) != len(levels) or any(t != 1 for t, _, _ in grids):
            raise LlavaError(
                f"image_patch_levels: found {len(levels)} levels, expected {sum(sizes)} for the images of "
                f"image_grid_thw {grids}, one frame each"
            )
        parts = [
            kept_patches(part.view(1, h, w), order="cells")
            for part, (_, h, w) in zip(levels.split(sizes), grids, strict=True)
        ]
        lengths = [len(part.levels) for part in parts]
        merged = [torch.where(part.levels == 1, 1, MERGE**2) for part in parts]
        index = torch.arange(sum(lengths)).repeat_interleave(torch.cat(merged))
        corners = torch.cat([torch.stack([part.rows, part.cols], 1) for part in parts])
        return cls(
            centres=torch.cat([part.centres for part in parts]),
            lengths=lengths,
            merge_index=index,
            cells=corners[index[:: MERGE**2]] // MERGE,
            tokens=[int(counts.sum()) // MERGE**2 for counts in merged],
        )

    def windows(self, side: int) -> tuple[torch.Tensor, list[int]]:
        """For attention within windows of `side` x `side` base patches, in which a patch is by its middle.

        Returns:
            order [N] of the vision tokens, window by window and image by image; vision tokens of each window.
        """
        images = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))
        places = torch.cat([images[:, None], (self.centres // side).long()], 1)
        _, window, counts = places.unique(dim=0, return_inverse=True, return_counts=True)
        return window.argsort(stable=True), counts.tolist()


def token_counts(levels, grid_thw) -> list[tuple[int, int]]:
    """(vision tokens, tokens of the language model) of each image, counted in its `image_patch_levels`.

    Args:
        levels, grid_thw: as `PatchLayout.from_levels`, as tensors, arrays or lists.
    """
    levels, found = torch.as_tensor(levels), []
    sizes = [int(t * h * w) for t, h, w in torch.as_tensor(grid_thw).tolist()]
    for part in levels.split(sizes):
        base, double, quadruple = ((part == level).sum().item() for level in (1, 2, 3))
        found.append((base + double // 4 + quadruple // 16, (base + double) // 4 + quadruple // 16))
    return found
