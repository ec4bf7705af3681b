"""The HEVC-ViT encoder as plain formulas on weights in the source layout: slow, and what conversions are held against.

It shares no code with `llavavit`: no module of it is imported, and every step is put differently there.

Shapes: B samples, T frames of h x w patches, L = T*h*w tokens of a sample, K of them encoded, D width, H heads, E
channels of a head.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Outputs(NamedTuple):
    """What an encoder returns.

    last_hidden_state: [B, K, D] after `ln_post`; without a head, the last hidden state.
    pooler_output: [B, D], or None without a head.
    hidden_states: every block's input and the last block's output, each [B, K, D], before `ln_post`.
    """

    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor | None
    hidden_states: tuple[torch.Tensor, ...]


class Weights:
    """Source-layout weights by name, each brought to `dtype` when it is asked for, so that one copy is held."""

    def __init__(self, state: dict, dtype: torch.dtype):
        self.state, self.dtype = state, dtype

    def __call__(self, name: str) -> torch.Tensor:
        return self.state[name].to(self.dtype)

    def __contains__(self, name: str) -> bool:
        return name in self.state

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self(f"{name}.weight").T + self(f"{name}.bias")

    def norm(self, x: torch.Tensor, name: str, eps: float) -> torch.Tensor:
        """LayerNorm; RMSNorm where there is no bias."""
        if f"{name}.bias" not in self:
            return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * self(f"{name}.weight")
        x = x - x.mean(-1, keepdim=True)
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * self(f"{name}.weight") + self(f"{name}.bias")


@torch.no_grad()
def encode(
    state: dict,
    pixels: torch.Tensor,
    *,
    num_heads: int,
    layer_norm_eps: float,
    head_norm_eps: float,
    rope_theta: float,
    indices: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> Outputs:
    """Encode images or clips, in the dtype of `pixels`.

    Args:
        state: source-layout weights (`conv1.weight`, `ln_pre.weight`, `transformer.layers.0.attn.in_proj.weight`, ...).
        pixels: [B, C, height, width] or [B, C, T, height, width], in multiples of the patch.
        num_heads: attention heads, which weights do not tell.
        layer_norm_eps, head_norm_eps: eps of the norms and of the pooling head's norm.
        rope_theta: base of the rotary frequencies.
        indices: [B, K] tokens to encode, counted in raster order; None: all.
        positions: [B, K, 3] places (t, h, w) of the encoded tokens; None: where they are.
    """
    weights = Weights(state, pixels.dtype)
    clips = pixels if pixels.ndim == 5 else pixels[:, :, None]
    x, places = embed(weights, clips)
    if indices is not None:
        rows = torch.arange(len(x))[:, None]
        x, places = x[rows, indices], places[rows, indices]
    angles = rotary_angles(places if positions is None else positions, x.shape[-1] // num_heads, rope_theta)

    x = weights.norm(x, "ln_pre", layer_norm_eps)
    hidden_states, layer = [x], 0
    while f"transformer.layers.{layer}.ln_1.weight" in weights:
        name = f"transformer.layers.{layer}"
        x = x + self_attention(weights, weights.norm(x, f"{name}.ln_1", layer_norm_eps), f"{name}.attn", angles)
        x = x + mlp(weights, weights.norm(x, f"{name}.ln_2", layer_norm_eps), f"{name}.mlp.0", f"{name}.mlp.2")
        hidden_states.append(x)
        layer += 1
    if "head.probe" not in weights:
        return Outputs(x, None, tuple(hidden_states))
    x = weights.norm(x, "ln_post", layer_norm_eps)
    return Outputs(x, pool(weights, x, num_heads, head_norm_eps), tuple(hidden_states))


def embed(weights: Weights, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, C, T, height, width] -> embedded patches [B, L, D] and their places (t, h, w) [B, L, 3]."""
    kernel = weights("conv1.weight")
    maps = [F.conv2d(frame, kernel, stride=kernel.shape[-1]) for frame in clips.unbind(2)]  # T of [B, D, h, w]
    h, w = maps[0].shape[-2:]
    x = torch.cat([frame.flatten(2).transpose(1, 2) for frame in maps], dim=1)
    places = torch.tensor([(t, row, column) for t in range(len(maps)) for row in range(h) for column in range(w)])
    return x, places.expand(len(x), -1, -1)


def rotary_angles(places: torch.Tensor, channels: int, theta: float) -> torch.Tensor:
    """Angle of each of a head's E channels at places [B, K, 3] -> float64 [B, K, 1, E].

    The first half of the channels: a quarter of them turn with t, then 3/8 with h, 3/8 with w, each run of n with
    frequencies theta^(-i/n). The second half is like the first.
    """
    half = channels // 2
    frequencies = [(0, theta ** (-i / (half // 4))) for i in range(half // 4)]
    for axis in (1, 2):
        count = half * 3 // 8
        frequencies += [(axis, theta ** (-i / count)) for i in range(count)]
    angles = [places[..., axis].double() * frequency for axis, frequency in frequencies + frequencies]
    return torch.stack(angles, dim=-1)[:, :, None]


def turn(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate [B, K, H, E]: channels 2i and 2i + 1 are a pair, each turned by its own angle."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = slice(0, None, 2), slice(1, None, 2)
    turned = torch.empty_like(x)
    turned[..., first] = x[..., first] * cos[..., first] - x[..., second] * sin[..., first]
    turned[..., second] = x[..., second] * cos[..., second] + x[..., first] * sin[..., second]
    return turned


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k / sqrt(E)) v of each head: q [B, Q, H, E], k and v [B, K, H, E] -> [B, Q, H*E]."""
    scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhqk,bkhe->bqhe", scores.softmax(-1), v).flatten(2)


def self_attention(weights: Weights, x: torch.Tensor, name: str, angles: torch.Tensor) -> torch.Tensor:
    parts = weights.linear(x, f"{name}.in_proj")  # [B, K, 3*D]: queries, keys, values
    q, k, v = parts.unflatten(-1, (3, -1, angles.shape[-1])).unbind(2)
    return weights.linear(attend(turn(q, angles), turn(k, angles), v), f"{name}.out_proj")


def mlp(weights: Weights, x: torch.Tensor, first: str, second: str) -> torch.Tensor:
    """Two linear layers with a GELU (the exact one) between them."""
    x = weights.linear(x, first)
    return weights.linear(0.5 * x * (1 + torch.erf(x / math.sqrt(2))), second)


def pool(weights: Weights, x: torch.Tensor, num_heads: int, eps: float) -> torch.Tensor:
    """[B, K, D] -> [B, D]: multi-head attention of a learned probe to all tokens, then an MLP on top."""
    probe = weights("head.probe").expand(len(x), -1, -1)
    matrix, bias = weights("head.attention.in_proj_weight").chunk(3), weights("head.attention.in_proj_bias").chunk(3)
    q, k, v = (
        (tokens @ matrix[i].T + bias[i]).unflatten(-1, (num_heads, -1)) for i, tokens in enumerate((probe, x, x))
    )
    pooled = weights.linear(attend(q, k, v), "head.attention.out_proj")
    pooled = pooled + mlp(weights, weights.norm(pooled, "head.norm", eps), "head.mlp.fc1", "head.mlp.fc2")
    return pooled[:, 0]
