"""LLaVA-NeXT's pooler projector: a 2x2 convolution with stride 2, then GELU and a linear layer."""

import torch.nn as nn
import torch.nn.functional as F

from .merger import packed_block_order


class BlockConv2d(nn.Conv2d):
    """A 2x2 convolution with stride 2 on tokens that come block by block: [..., 4 * M, D] -> [..., M, E]."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out, kernel_size=2, stride=2)

    def forward(self, x):
        blocks = x.unflatten(-2, (-1, 4)).flatten(-2)
        return F.linear(blocks, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


class PoolerProjector(nn.Module):
    """[B, h*w, D] -> [B, (h//2)*(w//2), E]; packed, [N, D] with `grids` -> [sum of (h//2)*(w//2), E]."""

    def __init__(self, d_vision: int, d_text: int):
        super().__init__()
        self.conv_pool = BlockConv2d(d_vision, d_text)
        self.proj = nn.Sequential(nn.GELU(), nn.Linear(d_text, d_text))

    def forward(self, x, grid=None, grids=None):
        order = packed_block_order(grids or [grid]).to(x.device)
        return self.proj(self.conv_pool(x.index_select(-2, order)))
