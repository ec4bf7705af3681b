"""Sizes and layouts of pictures: which resolution, how much padding, which crops. No model and no tensors.

Sizes are (width, height) throughout, as in LLaVA-NeXT.
"""

import ast
import math
import re
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image

from llava.errors import LlavaError


def resolution_fit(original_size, resolution):
    """(effective, wasted) pixels of an image fitted into a candidate resolution, both sizes (width, height).

    Effective: what the image holds after scaling, but no more than it had. Wasted: the rest of the candidate.
    """
    width, height = original_size
    scale = min(resolution[0] / width, resolution[1] / height)
    effective = min(int(width * scale) * int(height * scale), width * height)
    return effective, resolution[0] * resolution[1] - effective


def select_best_resolution(original_size, possible_resolutions):
    """The candidate that keeps most of the image, then wastes least (LLaVA-NeXT "anyres").

    Args:
        original_size: (width, height) of the image.
        possible_resolutions: list of (width, height) candidates.

    Returns:
        (width, height) of the best candidate; the earliest one on a tie.
    """
    return _best_resolution(tuple(original_size), tuple(map(tuple, possible_resolutions)))


@lru_cache(maxsize=65536)
def _best_resolution(original_size, candidates):
    def score(candidate):
        effective, wasted = resolution_fit(original_size, candidate)
        return effective, -wasted

    return max(candidates, key=score)


@lru_cache(maxsize=64)
def _parse_grid(spec: str, crop_size: int) -> tuple[tuple[int, int], ...]:
    if "x" in spec:
        # "(1x1),...,(6x6)": every multiple of the crop size between the first and the last pair
        pairs = [(int(a), int(b)) for a, b in re.findall(r"\((\d+)x(\d+)\)", spec)]
        if not pairs:
            raise LlavaError(f'image_grid_pinpoints: found {spec!r}, expected a range like "(1x1),...,(6x6)"')
        (w0, h0), (w1, h1) = pairs[0], pairs[-1]
        grid = [(w * crop_size, h * crop_size) for w in range(w0, w1 + 1) for h in range(h0, h1 + 1)]
    else:
        try:
            grid = [(int(w), int(h)) for w, h in ast.literal_eval(spec)]
        except (ValueError, SyntaxError, TypeError):
            raise LlavaError(
                f"image_grid_pinpoints: found {spec!r}, expected a list of [width, height] pairs"
            ) from None
    if not grid:
        raise LlavaError(f"image_grid_pinpoints: {spec!r} holds no resolution")
    return tuple(grid)


def parse_grid_pinpoints(grid_pinpoints, crop_size: int) -> tuple[tuple[int, int], ...]:
    """Candidate resolutions as (width, height) in pixels.

    Args:
        grid_pinpoints: a list of [width, height], the same as a string, or a range such as "(1x1),...,(6x6)" counted
            in crops.
        crop_size: side of a crop in pixels; only ranges need it.
    """
    if grid_pinpoints is None:
        raise LlavaError("image_grid_pinpoints: missing; image_aspect_ratio anyres needs a list of resolutions")
    if not isinstance(grid_pinpoints, str):
        grid_pinpoints = str([list(pair) for pair in grid_pinpoints])
    return _parse_grid(grid_pinpoints, crop_size)


def get_anyres_image_grid_shape(image_size, grid_pinpoints, patch_size):
    """How many crops (across, down) an image of (width, height) is cut into; `patch_size` is the crop's side."""
    width, height = select_best_resolution(image_size, parse_grid_pinpoints(grid_pinpoints, patch_size))
    return width // patch_size, height // patch_size


def resize_and_pad_image(image, target_resolution):
    """Resize `image` to fit (width, height) keeping its aspect ratio, the free side rounded up; centre it on black."""
    target_width, target_height = target_resolution
    scale_w, scale_h = target_width / image.width, target_height / image.height
    if scale_w < scale_h:
        size = target_width, min(math.ceil(image.height * scale_w), target_height)
    else:
        size = min(math.ceil(image.width * scale_h), target_width), target_height
    canvas = Image.new("RGB", (target_width, target_height), (0, 0, 0))
    canvas.paste(image.resize(size), ((target_width - size[0]) // 2, (target_height - size[1]) // 2))
    return canvas


def divide_to_patches(image, patch_size):
    """Cut `image` into squares of side `patch_size`, row by row."""
    return [
        image.crop((x, y, x + patch_size, y + patch_size))
        for y in range(0, image.height, patch_size)
        for x in range(0, image.width, patch_size)
    ]


def expand2square(pil_img, background_color):
    """Centre the image on a square canvas of the given colour; a square image is returned as it is."""
    width, height = pil_img.size
    if width == height:
        return pil_img
    side = max(width, height)
    canvas = Image.new(pil_img.mode, (side, side), background_color)
    canvas.paste(pil_img, ((side - width) // 2, (side - height) // 2))
    return canvas


@dataclass(frozen=True)
class NativeResolution:
    """Sizes for `image_aspect_ratio: native`: the image's own, to the nearest that the model can take.

    multiple: pixels that both sides must be multiples of: the patch, times 2 where the projector merges 2x2 tokens.
    min_pixels, max_pixels: bounds on width * height; an image beyond them is scaled, keeping its aspect.
    """

    multiple: int
    min_pixels: int
    max_pixels: int

    def __post_init__(self):
        square = self.multiple**2
        if not 0 < self.min_pixels <= self.max_pixels or self.max_pixels < square:
            raise LlavaError(
                f"min_pixels, max_pixels: found {self.min_pixels}, {self.max_pixels}, expected the first not above the "
                f"second, and that at least {square}, the smallest image this model takes"
            )

    def __call__(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) to resize an image to."""
        unit, area = self.multiple, width * height
        across, down = max(round(width / unit), 1), max(round(height / unit), 1)
        if across * down * unit**2 < self.min_pixels:
            scale = math.sqrt(self.min_pixels / area) / unit
            across, down = math.ceil(width * scale), math.ceil(height * scale)
        if across * down * unit**2 > self.max_pixels:
            scale = math.sqrt(self.max_pixels / area) / unit
            limit = self.max_pixels // unit**2  # where a side cannot go below one unit, the other gives way
            across, down = (min(max(math.floor(side * scale), 1), limit) for side in (width, height))
        return across * unit, down * unit


class NaflexResolution(NativeResolution):
    """Sizes of Siglip 2's NaFlex checkpoints (arXiv 2502.14786): the most that a number of patches holds.

    The published rule scales a picture, its aspect kept and both sides rounded up to whole patches, by the largest
    factor at which it has at most `max_num_patches`, here `max_pixels` in patches, small pictures too. It is followed
    to the digit where `min_pixels` is as much; pictures between the two bounds keep their size, rounded up.
    """

    def __call__(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) to resize an image to."""
        square = self.multiple**2
        scale = self._largest_scale(width, height, self.max_pixels // square)
        if scale > 1.0 and self.min_pixels < self.max_pixels:
            smallest = self._largest_scale(width, height, max(self.min_pixels // square, 1))
            scale = max(smallest, 1.0)
        across, down = self._patches(width, height, scale)
        return across * self.multiple, down * self.multiple

    def _patches(self, width: int, height: int, scale: float) -> tuple[int, int]:
        across, down = (max(math.ceil(side * scale / self.multiple), 1) for side in (width, height))
        return across, down

    def _largest_scale(self, width: int, height: int, budget: int) -> float:
        """The factor, by halving an interval as often as the published rule does, since sizes hang on it."""
        low, high = 1e-6, 100.0
        while high - low >= 1e-5:
            middle = (low + high) / 2
            across, down = self._patches(width, height, middle)
            low, high = (middle, high) if across * down <= budget else (low, middle)
        return low
