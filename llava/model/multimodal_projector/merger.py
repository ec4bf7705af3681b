"""Four tokens to one, as in Qwen2-VL's merger: LayerNorm, concatenate, 4D -> 4D -> E.

Both kinds have the same weights (`ln_q`, `mlp.0`, `mlp.2`). `patch_merger` takes every four consecutive tokens, right
for towers that emit 2x2 blocks one after the other; `spatial_merge` takes true 2x2 neighbours of a raster grid.
`packed` does the same for frames of different grids, one after the other, in one call.
"""

import math
from functools import lru_cache

import torch
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
        return self.merge(x)

    def packed(self, x_ND, grids):
        """[N, D] of frames with these grids (h, w) -> [N/4, E]."""
        wrong = [grid for grid in grids if grid[0] * grid[1] % 4]
        if wrong:
            raise LlavaError(f"mm_projector_type patch_merger: merges 4 tokens, got a grid of {wrong[0]}")
        return self.merge(x_ND)

    def merge(self, x):
        """[..., T, D] -> [..., T/4, E]."""
        return self.mlp(self.ln_q(x).unflatten(-2, (-1, 4)).flatten(-2))


class SpatialMerge(PatchMerger):
    """[B, h*w, D] -> [B, h/2*w/2, E], every 2x2 neighbourhood to one; a square grid where none is given."""

    def forward(self, x, grid=None):
        h, w = grid or (math.isqrt(x.shape[1]),) * 2
        if h * w != x.shape[1] or h % 2 or w % 2:
            raise LlavaError(f"mm_projector_type spatial_merge: merges 2x2 tokens, got {x.shape[1]} on a {h}x{w} grid")
        return self.merge(x[:, block_order(h, w).to(x.device)])

    def packed(self, x_ND, grids):
        wrong = [grid for grid in grids if grid[0] % 2 or grid[1] % 2]
        if wrong:
            raise LlavaError(f"mm_projector_type spatial_merge: merges 2x2 tokens, got a grid of {wrong[0]}")
        order, at = [], 0
        for h, w in grids:
            order.append(block_order(h, w) + at)
            at += h * w
        return self.merge(x_ND[torch.cat(order).to(x_ND.device)])


@lru_cache(maxsize=4096)
def block_order(h: int, w: int) -> torch.Tensor:
    """[h*w] raster indices of a grid, its 2x2 neighbourhoods one after the other."""
    return torch.arange(h * w).view(h // 2, 2, w // 2, 2).transpose(1, 2).flatten()
