"""Four tokens to one, as in Qwen2-VL's merger: LayerNorm, concatenate, 4D -> 4D -> E.

Both kinds have the same weights (`ln_q`, `mlp.0`, `mlp.2`). `patch_merger` takes every four consecutive tokens, right
for towers that emit 2x2 blocks one after the other; `spatial_merge` takes true 2x2 neighbours of a raster grid.
Frames of different grids go through in one call: packed one after the other, with their `grids`.
"""

import math
from functools import lru_cache

import torch
import torch.nn as nn

from llava.errors import LlavaError
from llava.model.host import send


class PatchMerger(nn.Module):
    """[B, T, D] -> [B, T/4, E], every four consecutive tokens to one; packed, [N, D] with `grids` -> [N/4, E]."""

    def __init__(self, d_vision: int, d_text: int):
        super().__init__()
        self.ln_q = nn.LayerNorm(d_vision, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(4 * d_vision, 4 * d_vision), nn.GELU(), nn.Linear(4 * d_vision, d_text))

    def forward(self, x, grid=None, grids=None):
        tokens = [x.shape[1]] if grids is None else [h * w for h, w in grids]
        wrong = [count for count in tokens if count % 4]
        if wrong:
            raise LlavaError(f"mm_projector_type patch_merger: merges 4 tokens, an image has {wrong[0]}")
        return self.merge(x)

    def merge(self, x):
        """[..., T, D] -> [..., T/4, E]."""
        return self.mlp(self.ln_q(x).unflatten(-2, (-1, 4)).flatten(-2))


class SpatialMerge(PatchMerger):
    """[B, h*w, D] -> [B, h/2*w/2, E], every 2x2 neighbourhood to one; a square grid where none is given.

    Packed, [N, D] with `grids` -> [N/4, E]; or with `order` [4 * M], four of the N tokens for each one -> [M, E].
    """

    def forward(self, x, grid=None, grids=None, order=None):
        if order is not None:
            return self.merge(x.index_select(-2, order))
        frames = grids or [grid or (math.isqrt(x.shape[1]),) * 2]
        tokens = x.shape[-2]
        if sum(h * w for h, w in frames) != tokens or any(h % 2 or w % 2 for h, w in frames):
            found = " and ".join(f"{h}x{w}" for h, w in frames[:4]) + (" and more" if len(frames) > 4 else "")
            raise LlavaError(f"mm_projector_type spatial_merge: merges 2x2 tokens, got {tokens} on a {found} grid")
        return self.merge(x.index_select(-2, send([packed_block_order(frames)], x.device)[0]))


class SpatialMergeProjector(SpatialMerge):
    """OneVision-Encoder's name and arguments for `SpatialMerge`; of its merge sizes 2 alone."""

    def __init__(self, llm_dim: int, vit_dim: int, spatial_merge_size: int = 2):
        if spatial_merge_size != 2:
            raise LlavaError(f"spatial_merge_size: found {spatial_merge_size}, expected 2")
        super().__init__(vit_dim, llm_dim)

    def forward(self, x, height: int | None = None, width: int | None = None):
        """[B, h*w, D] -> [B, h/2*w/2, E]; a square grid where none is given."""
        return super().forward(x, grid=None if height is None or width is None else (height, width))


def packed_block_order(grids) -> torch.Tensor:
    """Indices of packed frames' tokens, each frame's as `block_order` says."""
    order, at = [], 0
    for h, w in grids:
        order.append(block_order(h, w) + at)
        at += h * w
    return torch.cat(order)


@lru_cache(maxsize=4096)
def block_order(h: int, w: int) -> torch.Tensor:
    """Raster indices of a grid's 2x2 neighbourhoods, one after the other; an odd last row or column is left out."""
    whole = torch.arange(h * w).view(h, w)[: h // 2 * 2, : w // 2 * 2]
    return whole.unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).transpose(1, 2).flatten()
