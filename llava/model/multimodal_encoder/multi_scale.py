"""S2 (arXiv 2403.13043): a tower that looks at a picture at several scales.

Shapes: B images, D channels of a token.
"""

import torch
import torch.nn.functional as F

from llava.errors import LlavaError

from .base import FixedGrid, VisionTower
from .plain_config import plain_config


class MultiScale:
    """Before a tower's class in a list of bases: tiles of the smallest scale are encoded (and compressed), put back as
    one map per scale, area-pooled to the base grid and concatenated on channels.

    The encoder itself only ever sees its own size, so that any tower whose tokens form a square takes part.
    """

    any_size = False

    def read_config(self, args):
        text = getattr(args, "s2_scales", None) or "336,672,1008"
        try:
            self.s2_scales = sorted(int(scale) for scale in str(text).split(","))
        except ValueError:
            raise LlavaError(f's2_scales: found {text!r}, expected sizes in pixels like "336,672,1008"') from None
        super().read_config(args)
        self.config = plain_config(self.config)
        base, own = self.s2_scales[0], self.grid_pixels[0]
        if base != own or any(scale % base for scale in self.s2_scales):
            raise LlavaError(
                f"s2_scales: found {text!r}, expected multiples of the encoder's {own} pixels, the smallest first"
            )
        if "cls_patch" in self.select_feature:
            raise LlavaError("s2: a class token has no place in a multi-scale map; use mm_vision_select_feature patch")
        largest, processor = self.s2_scales[-1], self.image_processor
        square, size = {"height": largest, "width": largest}, dict(processor.size)
        by_edge = size.get("shortest_edge") is not None  # the shorter side, and then a square cut out
        processor.size = {"shortest_edge": largest} if by_edge else square
        if getattr(processor, "crop_size", None) is not None:
            processor.crop_size = square

    def features(self, images):
        base, side = self.s2_scales[0], self.num_patches_per_side
        if images.shape[-1] != images.shape[-2]:
            raise LlavaError(
                f"the vision tower takes images of {self.image_size}x{self.image_size} pixels, got "
                f"{tuple(images.shape[-2:])}; check the image processor's size"
            )
        maps = []
        for scale in self.s2_scales:
            scaled = images
            if images.shape[-1] != scale:
                # interpolated in float32: bicubic has no half-precision kernel everywhere
                scaled = F.interpolate(images.float(), size=(scale, scale), mode="bicubic").to(images.dtype)
            n = scale // base
            tiles = scaled.unflatten(3, (n, base)).unflatten(2, (n, base))  # [B, C, n, base, n, base]
            tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
            features = super().features(tiles)  # of the base scale's size, so that each is compressed by itself
            grid = features.unflatten(0, (-1, n, n)).unflatten(3, (side, side))  # [B, n, n, side, side, D]
            grid = grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
            maps.append(F.adaptive_avg_pool2d(grid.float(), side).to(images.dtype))
        return torch.cat(maps, dim=1).flatten(2).transpose(1, 2)

    def features_list(self, images):
        return VisionTower.features_list(self, images)  # not that of a tower that packs what it is given

    def grids(self, height, width):
        tiles = sum((scale // self.s2_scales[0]) ** 2 for scale in self.s2_scales)
        return super().grids(self.s2_scales[0], self.s2_scales[0]) * tiles

    @property
    def token_grid(self):
        return FixedGrid(self.num_patches_per_side)

    @property
    def hidden_size(self):
        return super().hidden_size * len(self.s2_scales)

    @property
    def image_size(self):
        return self.s2_scales[-1]


def multi_scale(tower_class: type[VisionTower], what: str) -> type[VisionTower]:
    """A tower's class with several scales; `what` is the tower in messages.

    Raises:
        LlavaError: a class that has more to do with a picture's size, or with a clip, than to encode squares.
    """
    if tower_class.sees_time is True or tower_class.takes_adaptive_patches is True:
        raise LlavaError(f"s2: found true, but {what} sees clips or chooses patches; expected s2: false")
    return type(f"{tower_class.__name__}S2", (MultiScale, tower_class), {"__module__": tower_class.__module__})
