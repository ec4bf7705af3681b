"""CLIP towers: one scale, and S2 (arXiv 2403.13043) with several.

The class token is token 0 of every hidden state and `patch` leaves it out.
"""

import torch
import torch.nn.functional as F
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from llava.errors import LlavaError

from .base import select_layers
from .hf_tower import HFVisionTower


class CLIPVisionTower(HFVisionTower):
    config_class, model_class, processor_class = CLIPVisionConfig, CLIPVisionModel, CLIPImageProcessorPil

    def layers(self) -> list[int]:
        return select_layers(self.select_feature, self.select_layer, self.config.num_hidden_layers + 1)

    def encode(self, images):
        features = torch.cat(self.vision_tower(images, self.layers()), dim=-1)
        return features if "cls_patch" in self.select_feature else features[:, 1:]


class CLIPVisionTowerS2(CLIPVisionTower):
    """CLIP at several scales: tiles of the smallest scale are encoded (and compressed), put back as one map per scale,
    area-pooled to the base grid and concatenated on channels."""

    def read_config(self, args):
        text = getattr(args, "s2_scales", None) or "336,672,1008"
        try:
            self.s2_scales = sorted(int(scale) for scale in str(text).split(","))
        except ValueError:
            raise LlavaError(f's2_scales: found {text!r}, expected sizes in pixels like "336,672,1008"') from None
        super().read_config(args)
        base = self.s2_scales[0]
        if base != self.config.image_size or any(scale % base for scale in self.s2_scales):
            raise LlavaError(
                f"s2_scales: found {text!r}, expected multiples of the encoder's {self.config.image_size} pixels, "
                "the smallest first"
            )
        if "cls_patch" in self.select_feature:
            raise LlavaError("s2: a class token has no place in a multi-scale map; use mm_vision_select_feature patch")
        largest = self.s2_scales[-1]
        self.image_processor.size = {"shortest_edge": largest}
        self.image_processor.crop_size = {"height": largest, "width": largest}

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

    def grids(self, height, width):
        tiles = sum((scale // self.s2_scales[0]) ** 2 for scale in self.s2_scales)
        return super().grids(self.s2_scales[0], self.s2_scales[0]) * tiles

    @property
    def hidden_size(self):
        return super().hidden_size * len(self.s2_scales)

    @property
    def image_size(self):
        return self.s2_scales[-1]
