"""What becomes of a photo, as far as a model's files say: what a family tells `explain_image`."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


class View(NamedTuple):
    """What image processing makes of a photo.

    pixels: [K, 3, H, W] as the encoder sees them, the base view first where there are crops.
    made: the tensors that the image processor returns, for people.
    levels: where patches are chosen, [rows, columns]: 1, 2, 3 for 1, 2, 4 base patches a side; else None.
    tokens: where patches are chosen, what they become in the language model; else None.
    """

    pixels: Any
    made: str
    levels: Any = None
    tokens: int | None = None


class Sizes(NamedTuple):
    """Of photos that keep their size: what both sides are multiples of, and bounds on width * height, in pixels."""

    multiple: int
    min_pixels: int
    max_pixels: int


@dataclass(frozen=True, kw_only=True)
class Geometry(ABC):
    """All that decides what becomes of a photo.

    source, handling, layout: for people, where it comes from, how a photo is handled, how tokens are made of patches.
    processor: the image processor.
    rules: the model's `MergeRules`.
    token_grid: (height, width) of a crop in pixels -> (tokens, (h, w) or None), after encoder and projector.
    native: `Sizes`, or anything with its attributes, where photos keep their size; else None.
    patch: pixels of the encoder's patch.
    choice: the `PatchChoice` where patches are kept by what they hold, else None.
    marks: tokens of the text in front of the visual tokens and behind them.
    stock: whether transformers' LLaVA processors count the same.
    """

    source: str
    handling: str
    layout: str
    processor: Any
    rules: Any
    token_grid: Callable
    native: Any
    patch: int
    choice: Any = None
    marks: tuple[str, ...] = ()
    stock: bool = False

    @property
    def merges(self) -> bool:
        """Whether 2x2 patches become one token."""
        return getattr(self.token_grid, "merges", False)

    def patches(self, pixels) -> tuple[int, int]:
        """(rows, columns) of the encoder's patches of pixels [K, 3, H, W]."""
        return pixels.shape[-2] // self.patch, pixels.shape[-1] // self.patch

    @abstractmethod
    def view(self, photo, alone: bool = True) -> View:
        """The pipeline's own view of an RGB photo; `alone`: or as one of several in a sample.

        Raises:
            LlavaError, ValueError, ZeroDivisionError: a shape that the image processor does not take.
        """


@dataclass(frozen=True, kw_only=True)
class RowGeometry(Geometry):
    """Of an image processor whose `pixel_values` are rows of patches, 2x2 of which become one token (Qwen2-VL's)."""

    @classmethod
    def of(cls, images, **described) -> "RowGeometry":
        """From an image processor; `described` are the fields that it does not tell."""
        from llava.model.multimodal_encoder.base import PatchGrid
        from llava.model.multimodal_projector.builder import ProjectedGrid
        from llava.model.visual_merge import MergeRules

        bounds = images.size["shortest_edge"], images.size["longest_edge"]
        return cls(
            handling="its own size, without crops",
            processor=images,
            rules=MergeRules(image_aspect_ratio="native"),
            token_grid=ProjectedGrid(PatchGrid(images.patch_size), "patch_merger"),
            native=Sizes(images.patch_size * images.merge_size, *bounds),
            patch=images.patch_size,
            **described,
        )

    def view(self, photo, alone=True):
        from llava.model.qwen2_vl.layout import token_counts

        made = self.processor(images=[photo], return_tensors="pt")
        whole, grid, levels = made, made["image_grid_thw"], made.get("image_patch_levels")
        names = [f"pixel_values {list(made['pixel_values'].shape)}", f"image_grid_thw {grid.tolist()}"]
        if levels is None:
            return View(self._picture(whole["pixel_values"], grid), ", ".join(names))
        whole = self.processor(images=[photo], return_tensors="pt", adaptive_patches=None)
        names.append(f"image_patch_levels {list(levels.shape)}")
        levels_hw, tokens = levels.view(grid[0, 1:].tolist()), token_counts(levels, grid)[0][1]
        return View(self._picture(whole["pixel_values"], grid), ", ".join(names), levels_hw, tokens)

    def _picture(self, rows, grid):
        """[1, 3, H, W] of rows [h * w, 3 * frames * patch * patch], which come 2x2 by 2x2; the frames are alike."""
        side, merge = self.patch, self.processor.merge_size
        _, h, w = grid[0].tolist()
        blocks = rows.view(h // merge, w // merge, merge, merge, 3, -1, side, side)[..., 0, :, :]
        return blocks.permute(4, 0, 2, 5, 1, 3, 6).reshape(1, 3, h * side, w * side)
