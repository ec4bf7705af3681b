"""Encoders of transformers that take any size, given the patches of all images in one row, without padding.

Each is the stock model with its own modules, weights and weight names; its forward takes packed patches, its attention
the segments of `varlen_attention`. Attention does not ask for an order, so that the tokens stay in raster order where
the stock models have them by 2x2 blocks or by windows. What comes behind the blocks (a merger, a pooling head) is left
out. Everything that depends on the sizes alone is worked out on the host, where they are known.

Shapes: N patches of all S images one after the other, C channels, p the patch's side, D width, G the side of a table
of positions. `grids` are (rows, columns) in patches of each image.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from transformers.models.pixtral.modeling_pixtral import PixtralVisionModel, generate_block_attention_mask
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionAttention, Qwen3VLVisionModel
from transformers.models.siglip2.modeling_siglip2 import (
    Siglip2Attention,
    Siglip2VisionEmbeddings,
    Siglip2VisionModel,
)
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from llava.model.host import send
from llava.model.qwen2_vl.vision import PackedAttention, PackedVisionAttention, PackedVisionAttention2_5
from llava.model.stock import named_as
from llavavit.layers import PatchProjection, grid_positions
from llavavit.varlen_attention import pack_lengths, varlen_attention

Grids = list[tuple[int, int]]


def places(grids: Grids) -> torch.Tensor:
    """[N, 2] (row, column) of the patches of images with these grids, on the host."""
    return grid_positions([(1, *grid) for grid in grids])[:, 1:]


def lengths(grids: Grids) -> list[int]:
    return [h * w for h, w in grids]


def run_blocks(blocks, hidden: torch.Tensor, indices: list[int], given) -> list[torch.Tensor]:
    """The hidden states of these indices (0: before the first block), no block being run behind the last of them.

    given: number of a block -> keyword arguments.
    """
    states = {0: hidden} if 0 in indices else {}
    for number in range(max(indices)):
        hidden = blocks[number](hidden, **given(number))
        if number + 1 in indices:
            states[number + 1] = hidden
    return [states[i] for i in indices]


# --- Siglip 2, NaFlex -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _axis_weights(side: int, length: int) -> torch.Tensor:
    """[length, side]: what each place of an axis takes of a table's `side` rows, as torch resizes with antialiasing."""
    with torch.device("cpu"):
        # along the last axis: along the one before it, with one column, torch 2.13 gets the weights wrong
        rows = torch.eye(side)[:, None, None, :]
        resized = F.interpolate(rows, (1, length), mode="bilinear", align_corners=False, antialias=True)
    return resized[:, 0, 0, :].T.contiguous()


class PackedSiglip2Embeddings(Siglip2VisionEmbeddings):
    def forward(self, rows, grids):
        """[N, C*p*p] -> [N, D]: a linear map of the patch, and the learned positions resized to each image's grid.

        All images' positions are one matrix product; the stock model resizes the table for one image after another.
        """
        weight, side = self.patch_embedding.weight, self.position_embedding_size
        rows = rows.unflatten(1, (-1, self.patch_size**2)).transpose(1, 2).flatten(1)  # channels last
        used = sorted({length for grid in grids for length in grid})
        start, at = {}, 0
        for length in used:
            start[length], at = at, at + length
        origin = torch.tensor([(start[h], start[w]) for h, w in grids])
        at_N2 = places(grids) + origin.repeat_interleave(torch.tensor(lengths(grids)), 0)
        axes_LG = torch.cat([_axis_weights(side, length) for length in used])
        axes_LG, down, across = send([axes_LG, *at_N2.unbind(1)], rows.device)
        with torch.autocast(rows.device.type if rows.device.type != "meta" else "cpu", enabled=False):
            shares = (axes_LG[down][:, :, None] * axes_LG[across][:, None, :]).flatten(1)  # [N, G * G]
            positions = shares @ self.position_embedding.weight.float()
        return self.patch_embedding(rows.to(weight.dtype)) + positions.to(weight.dtype)


class PackedSiglip2Attention(Siglip2Attention):
    def forward(self, hidden_states, attention_mask=None, segments=None, **kwargs):
        """[N, D] -> [N, D], within each image."""
        q, k, v = (
            project(hidden_states).unflatten(-1, (self.num_heads, -1))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = varlen_attention(
            q,
            k,
            v,
            *segments,
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
            backend="reference" if self.config._attn_implementation == "eager" else None,
        )
        return self.out_proj(mixed.flatten(1)), None


@named_as(Siglip2VisionModel)
class PackedSiglip2(Siglip2VisionModel):
    def __init__(self, config):
        super().__init__(config)
        if self.use_head:
            del self.head
        self.embeddings.__class__ = PackedSiglip2Embeddings  # the same weights
        for layer in self.encoder.layers:
            layer.self_attn.__class__ = PackedSiglip2Attention

    def forward(self, rows, grids: Grids, indices: list[int]) -> list[torch.Tensor]:
        """[N, C*p*p] -> hidden states of these indices, each [N, D]."""
        given = {"attention_mask": None, "segments": pack_lengths(lengths(grids), rows.device)}
        return run_blocks(self.encoder.layers, self.embeddings(rows, grids), indices, lambda number: given)


# --- Pixtral ----------------------------------------------------------------------------------------------------------


@named_as(PixtralVisionModel)
class PackedPixtral(PixtralVisionModel):
    """Its blocks know segments already: as attention `varlen`, which hands them on; as `eager` its own block mask."""

    def __init__(self, config):
        super().__init__(config)
        self.patch_conv.__class__ = PatchProjection  # the same weights, for patches

    def forward(self, rows, grids: Grids, indices: list[int]) -> list[torch.Tensor]:
        """[N, C*p*p] -> hidden states of these indices, each [N, D]."""
        (at_N2,) = send([places(grids)], rows.device)
        hidden = self.ln_pre(self.patch_conv(rows)[None])
        given = {"position_embeddings": self.patch_positional_embedding(hidden, at_N2), "attention_mask": None}
        if self.config._attn_implementation == "eager":
            given["attention_mask"] = generate_block_attention_mask(lengths(grids), hidden)
        else:
            cu_seqlens, longest = pack_lengths(lengths(grids), rows.device)
            given |= dict(
                cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens, max_length_q=longest, max_length_k=longest
            )
        states = run_blocks(self.transformer.layers, hidden, indices, lambda number: given)
        return [state[0] for state in states]


# --- the Qwen-VL encoders ---------------------------------------------------------------------------------------------


class PackedVisionAttention3(PackedAttention, Qwen3VLVisionAttention):
    """Qwen3-VL's."""


class _QwenVision:
    """What the three have in common: features before the merger."""

    attention: type

    def __init__(self, config):
        super().__init__(config)
        for name in ("merger", "deepstack_merger_list"):
            if hasattr(self, name):
                delattr(self, name)
        for block in self.blocks:
            block.attn.__class__ = self.attention  # the same weights

    def embed(self, rows):
        """[N, C*p*p] -> [N, D]; an image is a clip of two frames that are alike, as in the stock processor."""
        frames = self.config.temporal_patch_size
        channels = rows.unflatten(1, (self.config.in_channels, 1, -1))
        return self.patch_embed(channels.expand(-1, -1, frames, -1).flatten(1))

    def forward(self, rows, grids: Grids, indices: list[int]) -> list[torch.Tensor]:
        """[N, C*p*p] -> hidden states of these indices, each [N, D]."""
        (at_N2,) = send([places(grids)], rows.device)
        hidden = self.add_positions(self.embed(rows), grids)
        cu_seqlens, longest = pack_lengths(lengths(grids), rows.device)
        given = dict(cu_seqlens=cu_seqlens, max_seqlen=longest, position_embeddings=self.rotary_pos_emb(hidden, at_N2))
        return run_blocks(self.blocks, hidden, indices, lambda number: given)

    def add_positions(self, hidden, grids: Grids):
        return hidden


@named_as(Qwen2VisionTransformerPretrainedModel)
class PackedQwen2(_QwenVision, Qwen2VisionTransformerPretrainedModel):
    attention = PackedVisionAttention


@named_as(Qwen3VLVisionModel)
class PackedQwen3(_QwenVision, Qwen3VLVisionModel):
    attention = PackedVisionAttention3

    def add_positions(self, hidden, grids):
        """The learned positions, resized to each image's grid by the stock model's own function."""
        between = get_vision_interpolation_indices_and_weights(
            torch.tensor([(1, *grid) for grid in grids]),
            num_grid_per_side=self.num_grid_per_side,
            mode=self.interpolation_mode,
            align_corners=self.interpolation_align_corners,
        )
        index, weight = send([*between], hidden.device)
        return hidden + (self.pos_embed(index) * weight[:, :, None]).sum(1).to(hidden.dtype)


@named_as(Qwen2_5_VisionTransformerPretrainedModel)
class PackedQwen2_5(_QwenVision, Qwen2_5_VisionTransformerPretrainedModel):
    """Most of its blocks attend within windows: the tokens lie window by window in between."""

    attention = PackedVisionAttention2_5

    def windows(self, at_N2: torch.Tensor, grids: Grids) -> tuple[torch.Tensor, list[int]]:
        """Order [N] of the tokens window by window, and how many each window has."""
        merge = self.spatial_merge_size
        side = self.window_size // merge // self.patch_size * merge
        images = torch.arange(len(grids)).repeat_interleave(torch.tensor(lengths(grids)))
        _, window, counts = torch.cat([images[:, None], at_N2 // side], 1).unique(
            dim=0, return_inverse=True, return_counts=True
        )
        return window.argsort(stable=True), counts.tolist()

    def forward(self, rows, grids: Grids, indices: list[int]) -> list[torch.Tensor]:
        """[N, C*p*p] -> hidden states of these indices, each [N, D]."""
        at_N2 = places(grids)
        order, counts = self.windows(at_N2, grids)
        at_N2, order, back = send([at_N2[order], order, order.argsort()], rows.device)
        hidden = self.embed(rows[order])
        rotary = self.rotary_pos_emb(hidden, at_N2)
        whole, windows = (pack_lengths(counted, rows.device) for counted in (lengths(grids), counts))

        def given(number: int) -> dict:
            cu_seqlens, longest = whole if number in self.fullatt_block_indexes else windows
            return dict(cu_seqlens=cu_seqlens, max_seqlen=longest, position_embeddings=rotary)

        return [state[back] for state in run_blocks(self.blocks, hidden, indices, given)]


ENCODERS = {
    "Siglip2Vision": PackedSiglip2,
    "PixtralVision": PackedPixtral,
    "Qwen2VLVision": PackedQwen2,
    "Qwen2_5_VLVision": PackedQwen2_5,
    "Qwen3VLVision": PackedQwen3,
}
