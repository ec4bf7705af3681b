"""The vision encoders of Qwen2-VL and Qwen2.5-VL, for all patches of their images or for those that were kept.

N patches of all images one after the other, D channels, M merged tokens.
"""

from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLVisionAttention,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VisionTransformerPretrainedModel,
    VisionAttention,
    apply_rotary_pos_emb_vision,
)

from llava.model.host import send
from llava.model.qwen2_vl import host_plan
from llava.model.qwen2_vl.layout import PatchLayout
from llava.model.stock import FrozenForgets
from llavavit.varlen_attention import pack_lengths, varlen_attention


class PackedAttention:
    """The vision encoder's attention, all segments in one call; transformers' goes one by one without flash-attn.

    For `attn_implementation` sdpa (the usual one) and varlen; with others it is transformers'.
    """

    def forward(self, hidden_states, cu_seqlens, position_embeddings=None, max_seqlen=None, **kwargs):
        """[N, D] -> [N, D], of all images one after the other."""
        if self.config._attn_implementation not in ("sdpa", "varlen"):
            return super().forward(
                hidden_states, cu_seqlens, position_embeddings=position_embeddings, max_seqlen=max_seqlen, **kwargs
            )
        query, key, value = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(1)
        query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        if max_seqlen is None:
            max_seqlen = int(cu_seqlens.diff().max())
        mixed = varlen_attention(query, key, value, cu_seqlens, max_seqlen, scale=self.scaling)
        return self.proj(mixed.flatten(1))


class PackedVisionAttention(PackedAttention, VisionAttention):
    """Qwen2-VL's."""


class PackedVisionAttention2_5(PackedAttention, Qwen2_5_VLVisionAttention):
    """Qwen2.5-VL's."""


class AdaptiveQwen2VisionTransformer(FrozenForgets, Qwen2VisionTransformerPretrainedModel):
    """The vision encoder, for kept patches as well."""

    def __init__(self, config):
        super().__init__(config)
        for block in self.blocks:
            block.attn.__class__ = PackedVisionAttention  # the same weights

    def forward(self, hidden_states, grid_thw=None, layout: PatchLayout | None = None, **kwargs):
        """As transformers'; with a layout `hidden_states` are the kept patches, [N, C * T * p * p].

        Returns:
            last_hidden_state [N, D], pooler_output [M, D of the language model].
        """
        if layout is None:
            return _run_stock(super().forward, self, hidden_states, grid_thw, kwargs)
        hidden = self.patch_embed(hidden_states)
        centres, merge_index = send([layout.centres, layout.merge_index], hidden.device)
        rotary = self.rotary_pos_emb(hidden, centres)
        segments = pack_lengths(layout.lengths, hidden.device)
        for block in self.blocks:
            hidden = _run_block(block, hidden, segments, rotary, kwargs)
        merged = self.merger(hidden[merge_index])
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=merged)


class AdaptiveQwen2_5_VisionTransformer(FrozenForgets, Qwen2_5_VisionTransformerPretrainedModel):
    """Qwen2.5-VL's vision encoder, for kept patches as well: most of its blocks attend within windows."""

    def __init__(self, config, *inputs, **kwargs):
        super().__init__(config, *inputs, **kwargs)
        for block in self.blocks:
            block.attn.__class__ = PackedVisionAttention2_5

    def forward(self, hidden_states, grid_thw=None, layout: PatchLayout | None = None, **kwargs):
        """As `AdaptiveQwen2VisionTransformer`'s."""
        if layout is None:
            return _run_stock(super().forward, self, hidden_states, grid_thw, kwargs)
        order, window_lengths = layout.windows(self.window_size // self.patch_size)
        planned = [layout.centres[order], order, order.argsort(), layout.merge_index]
        centres, order, back, merge_index = send(planned, hidden_states.device)
        hidden = self.patch_embed(hidden_states)[order]
        rotary = self.rotary_pos_emb(hidden, centres)
        images, windows = (pack_lengths(lengths, hidden.device) for lengths in (layout.lengths, window_lengths))
        for number, block in enumerate(self.blocks):
            segments = images if number in self.fullatt_block_indexes else windows
            hidden = _run_block(block, hidden, segments, rotary, kwargs)
        hidden = hidden[back]
        merged = self.merger(hidden[merge_index])
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=merged)


def _run_stock(forward, tower, hidden_states, grid_thw, kwargs):
    """transformers' own forward of a vision encoder, given what it would read from the device."""
    grid_thw = grid_thw.cpu()
    planned = host_plan.of_grids(tower, grid_thw, hidden_states.device)
    return forward(hidden_states, grid_thw=grid_thw, **planned | kwargs)


def _run_block(block, hidden, segments, rotary, kwargs):
    """One block of a vision encoder; `segments` as `pack_lengths` gives them."""
    cu_seqlens, longest = segments
    return block(hidden, cu_seqlens=cu_seqlens, max_seqlen=longest, position_embeddings=rotary, **kwargs)
