"""Four tokens to one, as in Qwen2-VL's merger: LayerNorm, concatenate, 4D -> 4D -> E.

Both kinds have the same weights (`ln_q`, `mlp.0`, `mlp.2`). `patch_merger` takes every four consecutive tokens, right
for towers that emit 2x2 blocks one after the other; `spatial_merge` takes true 2x2 neighbours of a raster grid.
"""

import math

import torch.nn as nn

from llava.errors import LlavaError


class PatchMerger(nn.Module):
    """[B, T, D] -> [B, T/4, E], every four consecutive tokens to one."""

    def __init__(self, d_vision: int, d_text: int):
        super().__init__()
        self.ln_q = nn.LayerNorm(d_vision, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(4 * d_vision, 4 * d_vision), nn.GELU(), nn.Linear(4 * d_vision, d_text))

    def forward(self, x, grid=None):
        if x.shape[1] % 4:
            raise LlavaError(f"mm_projector_type patch_merger: merges 4 tokens, an image has {x.shape[1]}")
        return self.mlp(self.ln_q(x).unflatten(1, (-1, 4)).flatten(2))


class SpatialMerge(PatchMerger):
    """[B, h*w, D] -> [B, h/2*w/2, E], every 2x2 neighbourhood to one; a square grid where none is given."""

    def forward(self, x, grid=None):
        h, w = grid or (math.isqrt(x.shape[1]),) * 2
        if h * w != x.shape[1] or h % 2 or w % 2:
            raise LlavaError(f"mm_projector_type spatial_merge: merges 2x2 tokens, got {x.shape[1]} on a {h}x{w} grid")
        blocks = self.ln_q(x).unflatten(1, (h // 2, 2, w // 2, 2)).transpose(2, 3)
        return self.mlp(blocks.flatten(3, 5).flatten(1, 2))
