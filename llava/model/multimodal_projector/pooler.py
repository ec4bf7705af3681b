"""LLaVA-NeXT's pooler projector: a 2x2 convolution with stride 2, then GELU and a linear layer."""

import torch
import torch.nn as nn


class PoolerProjector(nn.Module):
    """[B, h*w, D] -> [B, (h//2)*(w//2), E]."""

    def __init__(self, d_vision: int, d_text: int):
        super().__init__()
        self.conv_pool = nn.Conv2d(d_vision, d_text, kernel_size=2, stride=2)
        self.proj = nn.Sequential(nn.GELU(), nn.Linear(d_text, d_text))

    def forward(self, x, grid):
        x = self.conv_pool(x.transpose(1, 2).unflatten(2, grid))
        return self.proj(x.flatten(2).transpose(1, 2))

    def packed(self, x_ND, grids):
        """[N, D] of frames with these grids (h, w), one after the other -> [sum (h//2)*(w//2), E]."""
        frames = x_ND.split([h * w for h, w in grids])
        pooled = [self.conv_pool(x.T.unflatten(1, grid)).flatten(1).T for x, grid in zip(frames, grids, strict=True)]
        return self.proj(torch.cat(pooled))
