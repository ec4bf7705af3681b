"""From vision channels to the language model's: LLaVA's projectors and two token mergers.

Shapes: B images, T tokens on an h x w grid, D vision channels, E language model channels.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import torch.nn as nn

from llava.errors import LlavaError

from .merger import PatchMerger, SpatialMerge, SpatialMergeProjector
from .pooler import PoolerProjector

__all__ = ["PatchMerger", "PoolerProjector", "SpatialMerge", "SpatialMergeProjector", "build_vision_projector"]

KINDS = "linear, identity, mlpNx_gelu, mlpNx_resMx_gelu, pooler, patch_merger, spatial_merge"
MERGERS = {"pooler": PoolerProjector, "patch_merger": PatchMerger, "spatial_merge": SpatialMerge}


class ResBlock(nn.Module):
    """y + MLP(y) with y = LayerNorm(x): LLaVA's block adds to the normalised input, not to the input."""

    def __init__(self, channels: int):
        super().__init__()
        self.pre_norm = nn.LayerNorm(channels)
        self.proj = nn.Sequential(nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels))

    def forward(self, x):
        x = self.pre_norm(x)
        return x + self.proj(x)


def build_vision_projector(config, **kwargs) -> nn.Module:
    """Projector for `config.mm_projector_type` from `config.mm_hidden_size` to `config.hidden_size` channels.

    The config is an object with these attributes, or a mapping.

    It is called as `projector(x)` with x [B, T, D] -> [B, T', E]; kinds in `MERGERS` are given `grid=(h, w)` too and
    leave a quarter of the tokens; images that differ in size come packed, as x [N, D] with `grids=[(h, w), ...]`.

    Raises:
        LlavaError: unknown kind, or one of the widths is missing.
    """
    config = SimpleNamespace(**config) if isinstance(config, Mapping) else config
    kind = getattr(config, "mm_projector_type", None) or "linear"
    for name in ("mm_hidden_size", "hidden_size"):
        if getattr(config, name, None) is None:
            raise LlavaError(f"{name}: found none in the config, expected a number of channels")
    d_vision, d_text = config.mm_hidden_size, config.hidden_size
    if kind == "linear":
        return nn.Linear(d_vision, d_text)
    if kind == "identity":
        if d_vision != d_text:
            raise LlavaError(
                f"mm_projector_type identity: the tower has {d_vision} channels, the language model {d_text}"
            )
        return nn.Identity()
    if kind in MERGERS:
        return MERGERS[kind](d_vision, d_text)
    match = re.fullmatch(r"mlp(\d+)x(?:_res(\d+)x)?_gelu", kind)
    if not match or int(match.group(1)) < 1:
        raise LlavaError(f"mm_projector_type: found {kind!r}, expected one of {KINDS}")
    layers = [nn.Linear(d_vision, d_text)]
    for _ in range(1, int(match.group(1))):
        layers += [nn.GELU(), nn.Linear(d_text, d_text)]
    layers += [ResBlock(d_text) for _ in range(int(match.group(2) or 0))]
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class ProjectedGrid:
    """Token layout after tower and projector; picklable (see `FixedGrid`)."""

    tower: object
    kind: str

    @property
    def merges(self) -> bool:
        """Whether four tokens become one."""
        return self.kind in MERGERS

    def __call__(self, height: int, width: int):
        tokens, grid = self.tower(height, width)
        if not self.merges:
            return tokens, grid
        if grid is None:
            raise LlavaError(f"mm_projector_type {self.kind}: needs a token grid; a class token has no place in one")
        h, w = grid
        if self.kind != "pooler" and (h % 2 or w % 2):
            raise LlavaError(f"mm_projector_type {self.kind}: merges 2x2 tokens, the tower's grid is {h}x{w}")
        return (h // 2) * (w // 2), (h // 2, w // 2)
