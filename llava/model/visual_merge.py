"""From the features of an image's crops to the visual tokens that stand for it in the text (LLaVA-NeXT's merge kinds).

Shapes: K crops (or frames) of an image, T tokens of a crop laid out on an h x w grid, D channels, N visual tokens.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F

from llava.errors import LlavaError
from llava.images.geometry import NaflexResolution, NativeResolution, get_anyres_image_grid_shape
from llava.images.processing import PixelOptions
from llava.model.adaptive_patches import PatchChoice
from llava.model.multimodal_projector.builder import MERGERS

VIDEO_POOL_STRIDE = 2  # LLaVA-NeXT pools video frames by two, whatever mm_spatial_pool_stride says
NEWLINE_POSITIONS = ("grid", "frame", "one_token", "no_token")


@dataclass(frozen=True)
class MergeRules:
    """What a model's config says about merging; `from_config` reads the keys of the same names."""

    mm_patch_merge_type: str = "flat"
    image_aspect_ratio: str = "square"
    mm_newline_position: str = "one_token"
    mm_spatial_pool_mode: str = "bilinear"
    image_grid_pinpoints: object = field(default=None, hash=False)
    adaptive_patches: object = field(default=None, hash=False)

    @classmethod
    def from_config(cls, config) -> "MergeRules":
        values = {name: getattr(config, name, None) for name in cls.__dataclass_fields__}
        return cls(**{name: value for name, value in values.items() if value is not None})

    @property
    def unpad(self) -> bool:
        return "unpad" in self.mm_patch_merge_type

    @property
    def native(self) -> bool:
        """Whether an image is one map of its own size, without crops."""
        return self.image_aspect_ratio == "native"

    @property
    def keeps_rows(self) -> bool:
        """Whether a newline ends each row of an image that has no crops; kept patches of many sizes form no rows."""
        return self.native and self.unpad and PatchChoice.from_mapping(self.adaptive_patches) is None

    @property
    def max_crops(self) -> int | None:
        """N of anyres_max_N."""
        match = re.match(r"anyres_max_(\d+)", self.image_aspect_ratio)
        return int(match.group(1)) if match else None


def native_resolution(config) -> NativeResolution | None:
    """The sizes that images of a model keep; None where `image_aspect_ratio` is not native."""
    if getattr(config, "image_aspect_ratio", None) != "native":
        return None
    values = config.mm_vision_config
    merge = 2 if getattr(config, "mm_projector_type", None) in MERGERS else 1
    merge = max(merge, values.get("spatial_merge_size") or 1)  # the Qwen-VL encoders' own
    rule = NaflexResolution if values.get("model_type") == "siglip2_vision_model" else NativeResolution
    return rule(values["patch_size"] * merge, config.min_pixels, config.max_pixels)


def pixel_options(config) -> PixelOptions:
    """How a model's config wants pictures turned into pixels."""
    aspect_ratio, grid = (getattr(config, key, None) for key in ("image_aspect_ratio", "image_grid_pinpoints"))
    return PixelOptions(aspect_ratio, grid, native_resolution(config))


def unpad_image(tensor, original_size):
    """Cut the rows or columns that padding added to a feature map.

    Args:
        tensor: [C, H, W] map of the padded image.
        original_size: (width, height) of the image before padding.

    Returns:
        [C, H', W'] with the padding gone; LLaVA-NeXT's rounding (down).
    """
    original_width, original_height = original_size
    height, width = tensor.shape[1:]
    if original_width / original_height > width / height:
        new_height = int(original_height * (width / original_width))
        padding = (height - new_height) // 2
        return tensor[:, padding : height - padding, :]
    new_width = int(original_width * (height / original_height))
    padding = (width - new_width) // 2
    return tensor[:, :, padding : width - padding]


def _append_newline(map_CHW, newline_D):
    """One more column holding the newline token, so that every row of tokens ends with it."""
    return torch.cat([map_CHW, newline_D[:, None, None].expand(-1, map_CHW.shape[1], 1)], dim=2)


def _tokens(map_CHW):
    return map_CHW.flatten(1).transpose(0, 1)


def pool_frames(features_KTD, grid, mode="bilinear"):
    """Pool each frame's h x w grid by two: bilinear rounds sizes up, average and max round down.

    Returns [K, h', w', D].
    """
    h, w = grid
    maps = features_KTD.view(-1, h, w, features_KTD.shape[-1]).permute(0, 3, 1, 2)
    if mode == "bilinear":
        size = (math.ceil(h / VIDEO_POOL_STRIDE), math.ceil(w / VIDEO_POOL_STRIDE))
        maps = F.interpolate(maps.contiguous(), size=size, mode="bilinear")
    elif mode in ("average", "max"):
        maps = (F.avg_pool2d if mode == "average" else F.max_pool2d)(maps, VIDEO_POOL_STRIDE)
    else:
        raise LlavaError(f"mm_spatial_pool_mode: found {mode!r}, expected bilinear, average or max")
    return maps.permute(0, 2, 3, 1)


def _merge_video(frames_KHWD, newline_D, rules: MergeRules):
    """Pooled frames -> [N, D], with newline tokens where `mm_newline_position` puts them."""
    position = rules.mm_newline_position
    tokens = frames_KHWD.flatten(0, 2)
    if not rules.mm_patch_merge_type.startswith("spatial") or position == "no_token":
        return tokens
    if position not in NEWLINE_POSITIONS:
        raise LlavaError(f"mm_newline_position: found {position!r}, expected one of {', '.join(NEWLINE_POSITIONS)}")
    if position == "one_token":
        return torch.cat([tokens, newline_D[None]]) if rules.unpad else tokens
    if newline_D is None:
        raise LlavaError(
            f"mm_newline_position {position!r} needs a newline token: mm_patch_merge_type is "
            f"{rules.mm_patch_merge_type!r}, expected one with unpad"
        )
    frames, height, _, dim = frames_KHWD.shape
    if position == "grid":  # after every row of every frame
        column = newline_D.expand(frames, height, 1, dim)
        return torch.cat([frames_KHWD, column], dim=2).flatten(0, 2)
    column = newline_D.expand(frames, 1, dim)  # after every frame
    return torch.cat([frames_KHWD.flatten(1, 2), column], dim=1).flatten(0, 1)


def _merge_crops(crops_KTD, grid, image_size, crop_side, newline_D, rules: MergeRules):
    """The crops of one image (without the base) -> [N, D]."""
    h, w = grid
    if image_size is None and ("anyres" in rules.image_aspect_ratio or rules.unpad):
        raise LlavaError(
            f"image_sizes: found none, expected the (width, height) of each image: one came as {len(crops_KTD) + 1} "
            f"crops, and its size decides how they lie (image_aspect_ratio {rules.image_aspect_ratio}, "
            f"mm_patch_merge_type {rules.mm_patch_merge_type})"
        )
    if "anyres" in rules.image_aspect_ratio:
        across, down = get_anyres_image_grid_shape(image_size, rules.image_grid_pinpoints, crop_side)
    else:
        across = down = 2
    if crops_KTD.shape[0] != across * down or crops_KTD.shape[1] != h * w:
        of_size = "" if image_size is None else f" of {image_size[0]}x{image_size[1]}"
        raise LlavaError(
            f"an image{of_size} came as {crops_KTD.shape[0]} crops of {crops_KTD.shape[1]} "
            f"tokens, expected {down}x{across} crops of {h}x{w} tokens (image_aspect_ratio {rules.image_aspect_ratio})"
        )
    crops = crops_KTD.view(down, across, h, w, -1)
    if not rules.unpad and "maxpool2x2" not in rules.mm_patch_merge_type:
        return crops.permute(0, 2, 1, 3, 4).flatten(0, 3)
    map_CHW = crops.permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)
    if "maxpool2x2" in rules.mm_patch_merge_type:
        return _tokens(F.max_pool2d(map_CHW, 2))
    map_CHW = unpad_image(map_CHW, image_size)
    if rules.max_crops is not None:
        height, width = map_CHW.shape[1:]
        times = math.sqrt(height * width / (rules.max_crops * h**2))
        if times > 1.1:
            size = [max(int(height // times), 1), max(int(width // times), 1)]
            map_CHW = F.interpolate(map_CHW[None], size, mode="bilinear")[0]
    return _tokens(_append_newline(map_CHW, newline_D))


def merge_visual_tokens(features_KTD, grid, image_size, modality, crop_side, newline_D, rules: MergeRules):
    """The visual tokens of one image or clip.

    Args:
        features_KTD: [K, T, D] projected features; K crops with the base first, or K frames.
        grid: (h, w) of a crop's tokens; None where they have no grid (a class token is among them).
        image_size: (width, height) of the original image in pixels; None where it is not known.
        modality: "image" or "video".
        crop_side: side of a crop in pixels.
        newline_D: [D] the learned newline token, None where the merge kind has none.
        rules: the model's merge rules.

    Returns:
        [N, D].
    """
    kind = rules.mm_patch_merge_type
    if kind != "flat" and not kind.startswith("spatial"):
        raise LlavaError(f"mm_patch_merge_type: found {kind!r}, expected flat or a spatial kind (spatial_unpad, ...)")
    rows = rules.keeps_rows  # nothing is padded, but rows of different lengths are told apart
    needs_grid = modality == "video" or rows or (features_KTD.shape[0] > 1 and kind != "flat")
    if needs_grid and grid is None:
        raise LlavaError(
            f"mm_vision_select_feature with a class token has no token grid, which mm_patch_merge_type {kind!r} and "
            "video need; use the patch feature"
        )
    if modality == "video":
        return _merge_video(pool_frames(features_KTD, grid, rules.mm_spatial_pool_mode), newline_D, rules)
    if kind == "flat":
        return features_KTD.flatten(0, 1)
    if rows:
        map_CHW = features_KTD[0].transpose(0, 1).unflatten(1, grid)
        return _tokens(_append_newline(map_CHW, newline_D))
    if features_KTD.shape[0] == 1:
        return torch.cat([features_KTD[0], newline_D[None]]) if rules.unpad else features_KTD[0]
    crops = _merge_crops(features_KTD[1:], grid, image_size, crop_side, newline_D, rules)
    return crops if "nobase" in kind else torch.cat([features_KTD[0], crops])


@dataclass(frozen=True)
class VisualTokenCounter:
    """How many tokens one `<image>` becomes: the merge itself, run on one channel of zeros.

    Picklable and free of weights, so that data workers can hold it.

    Args:
        rules: merge rules of the model.
        token_grid: (height, width) of a crop in pixels -> (tokens, grid) after tower and projector; grid is (h, w) or
            None.
        patch: side of the encoder's patch in pixels.
        chooser: the tower's `PatchChooser`, where an image's tokens depend on what it shows; `token_grid` is then what
            they are at most.
        scales: sides in pixels of a crop as the encoder sees it, where that is not its own side (S2).
    """

    rules: MergeRules
    token_grid: Callable[[int, int], tuple[int, tuple[int, int] | None]]
    patch: int = 14
    chooser: object = field(default=None, compare=False)
    scales: tuple[int, ...] = ()

    def __call__(self, pixel_shape, image_size, modality="image") -> int:
        """Of a shape: what an image becomes, or at most becomes where the tower chooses patches.

        Args: shape [3, H, W] or [K, 3, H, W] of the pixels, (width, height) of the image, "image" or "video".
        """
        return _count(self, tuple(pixel_shape), tuple(image_size), modality)

    def of_pixels(self, pixels, image_size, modality="image") -> int:
        """What an image really becomes; `pixels` in place of their shape."""
        chosen = None
        if self.chooser is not None and modality != "video":
            chosen = self.chooser.count(pixels if pixels.ndim == 3 else pixels[0], merging=self.token_grid.merges)
        return _count(self, tuple(pixels.shape), tuple(image_size), modality, chosen)

    def of_levels(self, pixel_shape, levels, image_size, modality="image") -> int:
        """What an image really becomes, of whose patches `levels` [h, w] are chosen; None: all that its shape says."""
        from llava.model.multimodal_encoder.patch_choice import count_tokens

        chosen = None if levels is None else count_tokens(levels[None], merging=self.token_grid.merges)
        return _count(self, tuple(pixel_shape), tuple(image_size), modality, chosen)

    def patches(self, pixel_shape, pixels=None) -> int:
        """Patches of the encoder for a shape as in a call; with the pixels of an image, those that it keeps of it."""
        if pixels is not None and self.chooser is not None:
            return self.chooser.count(pixels if pixels.ndim == 3 else pixels[0], merging=False)
        crops = pixel_shape[0] if len(pixel_shape) == 4 else 1
        seen = [(side, side) for side in self.scales] or [pixel_shape[-2:]]
        return crops * sum((height // self.patch) * (width // self.patch) for height, width in seen)


@lru_cache(maxsize=65536)
def _count(counter: VisualTokenCounter, pixel_shape, image_size, modality, chosen: int | None = None) -> int:
    crops = pixel_shape[0] if len(pixel_shape) == 4 else 1
    tokens, grid = counter.token_grid(*pixel_shape[-2:])
    tokens = tokens if chosen is None else chosen
    newline = torch.zeros(1) if counter.rules.unpad else None
    zeros = torch.zeros(crops, tokens, 1)
    return merge_visual_tokens(zeros, grid, image_size, modality, pixel_shape[-1], newline, counter.rules).shape[0]
