"""What both HEVC-ViT models are made of: rotary embedding, attention, blocks, pooling head.

Shapes: N tokens of all samples, one sample after the other; D width, H heads, E channels of a head, S samples.
Attention never crosses a sample's boundary, so a batch of equal samples and a pack of unequal ones are the same thing.
"""

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .varlen_attention import autocast_dtype, pack_lengths, traced_attention, varlen_attention

# attn_implementation -> backend of `varlen_attention`
ATTENTION_BACKENDS = {"varlen": None, "sdpa": "torch", "flash_attention_2": "flash_attn", "eager": "reference"}


def attention_backend(config) -> str | None:
    """Backend for the config's `attn_implementation`.

    Raises:
        ValueError: an implementation these models do not have.
    """
    name = config._attn_implementation or "sdpa"
    if name not in ATTENTION_BACKENDS:
        raise ValueError(f"attn_implementation: found {name!r}, expected one of {', '.join(ATTENTION_BACKENDS)}")
    return ATTENTION_BACKENDS[name]


class TracedLengths(NamedTuple):
    """Lengths of samples in a graph that `torch.compile` or `torch.export` traces, which serves others as well.

    cu_seqlens: [S + 1] of packed samples; max_seqlen None. None: every sample has `max_seqlen` tokens.
    """

    cu_seqlens: torch.Tensor | None
    max_seqlen: int | None


def describe_lengths(lengths, device) -> tuple[torch.Tensor | None, int | None]:
    """(`cu_seqlens`, `max_seqlen`) as `varlen_attention` takes them."""
    return tuple(lengths) if isinstance(lengths, TracedLengths) else pack_lengths(lengths, device)


def is_traced(cu_seqlens, max_seqlen) -> bool:
    """Whether lengths are those of a graph. A block that is compiled by itself has them from the host: cut at its
    attention, it need not compute that anew in the backward pass."""
    return torch.compiler.is_compiling() and (cu_seqlens is None or max_seqlen is None)


def build_norm(config) -> nn.Module:
    """The norm that `layer_norm_type` names."""
    norm = nn.RMSNorm if config.layer_norm_type == "rms_norm" else nn.LayerNorm
    return norm(config.hidden_size, eps=config.layer_norm_eps)


# --- patches ----------------------------------------------------------------------------------------------------------


def frames_to_patches(frames: torch.Tensor, patch: int) -> torch.Tensor:
    """[F, C, h*p, w*p] -> [F*h*w, C*p*p]: patches in raster order, each flattened channel first, then rows, columns.

    Raises:
        ValueError: a size that is not a multiple of the patch.
    """
    height, width = frames.shape[-2:]
    if height % patch or width % patch or not height or not width:
        raise ValueError(f"image of {height}x{width} pixels: expected height and width in multiples of {patch}")
    x = frames.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # [F, C, h, p, w, p]
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)


class PatchProjection(nn.Conv2d):
    """Patch embedding: [N, C*p*p] -> [N, D]. A convolution in name and weight, applied as the matrix product it is."""

    def __init__(self, config):
        super().__init__(config.num_channels, config.hidden_size, config.patch_size, config.patch_size, bias=False)

    def forward(self, rows):
        return F.linear(rows.to(self.weight.dtype), self.weight.flatten(1))


# --- rotary embedding -------------------------------------------------------------------------------------------------


def grid_positions(grid: list[tuple[int, int, int]], device=None) -> torch.Tensor:
    """[N, 3] places (t, h, w) of the tokens of samples with these grids, in order."""
    sizes = torch.tensor(grid)
    counts = sizes.prod(1)
    starts = counts.cumsum(0) - counts
    samples = torch.cat([sizes, starts[:, None], counts[:, None]], 1)
    samples = samples.to(device, non_blocking=True)  # a blocking copy waits for all that the device has to do
    total = int(counts.sum())
    _, h, w, start, _ = samples.repeat_interleave(samples[:, 4], 0, output_size=total).unbind(1)
    return unravel(torch.arange(total, device=device) - start, h, w)


def unravel(index: torch.Tensor, h, w) -> torch.Tensor:
    """[...] places in frames of h x w tokens, counted in raster order -> [..., 3] as (t, h, w)."""
    return torch.stack([index // (h * w), index % (h * w) // w, index % w], dim=-1)


def rotary_table(positions: torch.Tensor, config, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), each [N, 1, E], of tokens at `positions` [N, 3] as (t, h, w); sin has the signs that `rotate` needs.

    Of a head's E/2 frequencies 4/16 turn with t, 6/16 with h, 6/16 with w, each axis with its own geometric series.
    The angles stand twice, one half after the other, while `rotate` pairs neighbouring channels: an odd mixture, and
    the one that the published weights were trained with. Frequencies are computed here and are no buffers, since
    transformers 5 leaves buffers that are not in the checkpoint uninitialised.
    """
    unit = config.head_dim // 32
    angles = []
    for axis, share in enumerate((4, 6, 6)):
        exponents = torch.arange(share * unit, dtype=torch.float32, device=positions.device) / (share * unit)
        angles.append(positions[:, axis, None] * config.rope_theta**-exponents)
    whole = torch.cat([*angles, *angles], dim=-1)[:, None]
    cos, sin = whole.cos().to(dtype), whole.sin().to(dtype)
    sin[..., ::2] *= -1
    return cos, sin


def rotate(x_NHE: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding over neighbouring channels: (x0, x1, ...) cos + (x1, x0, ...) (-sin, sin, ...)."""
    neighbours = x_NHE.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x_NHE * cos, neighbours, sin)


# --- blocks -----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention with rotary embedding; a subclass holds the projections under its layout's names."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.heads = config.num_attention_heads
        self.dropout = config.attention_dropout

    def forward(self, x_ND, rotary, cu_seqlens, max_seqlen):
        q, k, v = self.project(x_ND, rotary)
        attend = traced_attention if is_traced(cu_seqlens, max_seqlen) else varlen_attention
        out_NHE = attend(
            q,
            k,
            v,
            cu_seqlens,
            max_seqlen,
            dropout_p=self.dropout if self.training else 0.0,
            backend=attention_backend(self.config),
        )
        return self.output(out_NHE.flatten(1))


class SeparateAttention(Attention):
    """The padded model's layout: q_proj, k_proj, v_proj, out_proj."""

    def __init__(self, config):
        super().__init__(config)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size))

    def project(self, x_ND, rotary):
        q, k, v = (proj(x_ND).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(q, *rotary), rotate(k, *rotary), v

    def output(self, x_ND):
        return self.out_proj(x_ND)


class FusedAttention(Attention):
    """The packed model's layout: qkv, proj."""

    def __init__(self, config):
        super().__init__(config)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def project(self, x_ND, rotary):
        qk, v = self.qkv(x_ND).unflatten(-1, (3 * self.heads, -1)).split([2 * self.heads, self.heads], dim=1)
        return *rotate(qk, *rotary).chunk(2, dim=1), v

    def output(self, x_ND):
        return self.proj(x_ND)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(GradientCheckpointingLayer):
    """Pre-norm transformer block."""

    def __init__(self, config, attention_class):
        super().__init__()
        self.layer_norm1 = build_norm(config)
        self.self_attn = attention_class(config)
        self.layer_norm2 = build_norm(config)
        self.mlp = MLP(config)

    def forward(self, x_ND, rotary, cu_seqlens, max_seqlen):
        x_ND = x_ND + self.self_attn(self.layer_norm1(x_ND), rotary, cu_seqlens, max_seqlen)
        return x_ND + self.mlp(self.layer_norm2(x_ND))


class Encoder(nn.Module):
    def __init__(self, config, attention_class):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Block(config, attention_class) for _ in range(config.num_hidden_layers))

    def forward(self, x_ND, positions_N3, lengths, keep):
        """Run as far as the last wanted state.

        Args:
            x_ND: tokens.
            positions_N3: their places (t, h, w).
            lengths: tokens of each sample, on the host, or `TracedLengths`.
            keep: indices of the wanted states, ascending: 0 is the input, i the output of block i.

        Returns:
            Those states, each [N, D]; a tuple, since ZeRO-3 looks for tensors in what a module returns.
        """
        # the dtype of q and k, which under autocast is not that of x: a float32 table would make them float32
        cos, sin = rotary_table(positions_N3, self.config, autocast_dtype(x_ND) or x_ND.dtype)
        whole = isinstance(lengths, TracedLengths) or x_ND.device.type != "cpu"
        parts = [lengths] if whole else cache_sized(lengths, self.config.intermediate_size)
        if len(parts) == 1:
            return self.run_blocks(x_ND, (cos, sin), lengths, keep)
        sizes = [sum(part) for part in parts]
        pieces = zip(x_ND.split(sizes), cos.split(sizes), sin.split(sizes), parts, strict=True)
        states = [self.run_blocks(x, (cos, sin), part, keep) for x, cos, sin, part in pieces]
        return tuple(torch.cat(state) for state in zip(*states, strict=True))

    def run_blocks(self, x_ND, rotary, lengths, keep):
        """The wanted states of samples that go through together."""
        cu_seqlens, max_seqlen = describe_lengths(lengths, x_ND.device)
        states = [x_ND] if 0 in keep else []
        for i, layer in enumerate(self.layers[: keep[-1]], start=1):
            # by keyword: reentrant checkpointing hands on copies of positional tensors, which lack their host copy
            x_ND = layer(x_ND, rotary=rotary, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
            if i in keep:
                states.append(x_ND)
        return tuple(states)


def cache_sized(lengths: list[int], width: int) -> list[list[int]]:
    """The lengths in order, in parts whose activations of this width a CPU's cache holds: 2^20 values, or one sample.

    A forward pass over 22,000 tokens took a fifth less time than all at once. In a distributed run there is one part
    only, since sharded weights need the same module calls on all ranks.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return [lengths]
    parts: list[list[int]] = [[]]
    for length in lengths:
        if parts[-1] and (sum(parts[-1]) + length) * width > 2**20:
            parts.append([])
        parts[-1].append(length)
    return parts


# --- pooling ----------------------------------------------------------------------------------------------------------


class ProbeAttention(nn.Module):
    """`nn.MultiheadAttention` of one learned query per sample, over packed samples: one call for all of them.

    Its weights go by the names that `nn.MultiheadAttention` gives them.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, probe_D, x_ND, cu_seqlens, max_seqlen):
        samples = x_ND.shape[0] // max_seqlen if cu_seqlens is None else cu_seqlens.shape[0] - 1
        width, heads = x_ND.shape[-1], self.config.num_attention_heads
        q_D = F.linear(probe_D, self.in_proj_weight[:width], self.in_proj_bias[:width])
        k, v = F.linear(x_ND, self.in_proj_weight[width:], self.in_proj_bias[width:]).chunk(2, dim=-1)
        attend = traced_attention if is_traced(cu_seqlens, max_seqlen) else varlen_attention
        out_SHE = attend(
            q_D.unflatten(0, (heads, -1)).repeat(samples, 1, 1),
            k.unflatten(-1, (heads, -1)),
            v.unflatten(-1, (heads, -1)),
            None,
            1,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_k=max_seqlen,
            backend=attention_backend(self.config),
        )
        return self.out_proj(out_SHE.flatten(1))


class PoolingHead(nn.Module):
    """Attention pooling (as SigLIP 2's, with an RMSNorm): [N, D] of S samples -> [S, D]."""

    def __init__(self, config):
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, config.hidden_size))
        self.attention = ProbeAttention(config)
        eps = config.layer_norm_eps if config.head_norm_eps is None else config.head_norm_eps
        self.norm = nn.RMSNorm(config.hidden_size, eps=eps)
        self.mlp = MLP(config)

    def forward(self, x_ND, cu_seqlens, max_seqlen):
        pooled_SD = self.attention(self.probe[0, 0], x_ND, cu_seqlens, max_seqlen)
        return pooled_SD + self.mlp(self.norm(pooled_SD))
