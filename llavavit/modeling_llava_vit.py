"""HEVC-ViT on padded batches: `LlavaViTModel`, and `OneVisionEncoderModel`, the same under its released name.

Shapes: B samples, T frames, h x w patches of a frame, L = T*h*w patches of a sample, K of them visible, D width.
Inside, a batch is B samples of equal length packed one after the other (see `layers.py`).
"""

import torch
import torch.nn as nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from .configuration_llava_vit import LlavaViTConfig, OneVisionEncoderConfig
from .conversion import load_any_layout
from .inputs import as_grid, as_indices, as_positions, check_indices, check_pixels, check_rows, read_grid
from .layers import (
    Encoder,
    PatchProjection,
    PoolingHead,
    ProbeAttention,
    SeparateAttention,
    TracedLengths,
    build_norm,
    describe_lengths,
    frames_to_patches,
    grid_positions,
    unravel,
)


class LlavaViTPreTrainedModel(PreTrainedModel):
    """What the padded and the packed model share: norms, encoder and head around their own patch embedding."""

    config_class = LlavaViTConfig
    base_model_prefix = "llava_vit"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    attention_class = SeparateAttention

    def __init__(self, config):
        super().__init__(config)
        self.layernorm_pre = build_norm(config)
        self.encoder = Encoder(config, self.attention_class)
        if config.use_head:
            self.layernorm_post = build_norm(config)
            self.head = PoolingHead(config)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As transformers'; weights and config of another layout (see `conversion.py`) are converted on the way."""
        found = load_any_layout(cls.config_class, pretrained_model_name_or_path, kwargs)
        if found is not None:
            kwargs["config"], kwargs["state_dict"] = found
            pretrained_model_name_or_path = None
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, PoolingHead):
            init.normal_(module.probe)
        elif isinstance(module, ProbeAttention):
            init.xavier_uniform_(module.in_proj_weight)
            init.zeros_(module.in_proj_bias)

    def encode_packed(self, rows, grid_thw, patch_positions=None, output_hidden_states=None, hidden_state_indices=None):
        """Encode packed patches, as `LlavaViTPackingModel.forward` describes it."""
        check_rows(rows, self.config.num_channels * self.config.patch_size**2)
        grid_thw = as_grid(grid_thw)
        if torch.compiler.is_compiling():
            cu_seqlens, places_N3 = torch.ops.llavavit.packing_plan(rows, grid_thw)
            lengths = TracedLengths(cu_seqlens, None)
        else:
            grid = read_grid(grid_thw, len(rows))
            lengths = [t * h * w for t, h, w in grid]
            places_N3 = grid_positions(grid, rows.device) if patch_positions is None else None
        if patch_positions is not None:
            places_N3 = as_positions(patch_positions, (rows.shape[0],), rows.device)
        return self.run(self.embed(rows), places_N3, lengths, output_hidden_states, hidden_state_indices)

    def run(self, x_ND, positions_N3, lengths, output_hidden_states=None, hidden_state_indices=None):
        """From embedded patches to the model's outputs, packed.

        Args:
            x_ND: [N, D] embedded patches of all samples.
            positions_N3: [N, 3] their places (t, h, w).
            lengths: tokens of each sample, on the host, or `TracedLengths`.
            output_hidden_states, hidden_state_indices: as in `forward`.

        Returns:
            BaseModelOutputWithPooling with `last_hidden_state` [N, D], `pooler_output` [samples, D] or None and
            `hidden_states`, a tuple of [N, D] or None.
        """
        last = self.config.num_hidden_layers
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if hidden_state_indices is not None:
            wanted = list(hidden_state_indices)
            if any(not 0 <= i <= last for i in wanted) or not wanted:
                raise ValueError(f"hidden_state_indices: found {wanted}, expected indices from 0 to {last}")
        else:
            wanted = range(last + 1) if output_hidden_states else [last]
        keep = sorted(set(wanted))
        states = dict(zip(keep, self.encoder(self.layernorm_pre(x_ND), positions_N3, lengths, keep), strict=True))
        hidden_states = tuple(states[i] for i in wanted)
        if hidden_state_indices is not None:
            return BaseModelOutputWithPooling(hidden_states=hidden_states)
        x_ND, pooled_SD = states[last], None
        if self.config.use_head:
            x_ND = self.layernorm_post(x_ND)
            pooled_SD = self.head(x_ND, *describe_lengths(lengths, x_ND.device))
        return BaseModelOutputWithPooling(
            last_hidden_state=x_ND,
            pooler_output=pooled_SD,
            hidden_states=hidden_states if output_hidden_states else None,
        )


class Embeddings(nn.Module):
    """[N, C*p*p] -> [N, D]."""

    def __init__(self, config):
        super().__init__()
        self.patch_embedding = PatchProjection(config)

    def forward(self, rows):
        return self.patch_embedding(rows)


class LlavaViTModel(LlavaViTPreTrainedModel):
    """HEVC-ViT: 3D rotary positions, no class token, no position embedding, and an attention-pooling head.

    Weight names and numbers are the published ones.
    """

    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.patch_embedding

    def embed(self, rows):
        """[N, C*p*p] -> [N, D]."""
        return self.embeddings(rows)

    @can_return_tuple
    def forward(
        self,
        pixel_values,
        visible_indices=None,
        patch_positions=None,
        output_hidden_states=None,
        hidden_state_indices=None,
        grid_thw=None,
    ):
        """Encode images or clips of one size; or, given `grid_thw`, packed ones of any sizes.

        Args:
            pixel_values: [B, C, H, W] or [B, C, T, H, W]; H and W multiples of the patch size. With `grid_thw`
                [N, C*p*p]; then input and output are those of `LlavaViTPackingModel.forward`.
            visible_indices: [B, K] which patches enter the encoder, counted over the sample's T*h*w in raster order.
            patch_positions: (t, h, w) of every token that enters the encoder, [B, L, 3], or [B, K, 3] together with
                `visible_indices`; not given: their places in the sample.
            output_hidden_states: return the input of every block and the output of the last, all before
                `layernorm_post`; None: as the config says.
            hidden_state_indices: return these hidden states alone, in this order, and run no further than the last.
            grid_thw: [S, 3] (frames, rows, columns) in patches of packed samples.
            return_dict: False for a tuple.

        Returns:
            BaseModelOutputWithPooling: `last_hidden_state` [B, L or K, D], `pooler_output` [B, D] (None without head),
            `hidden_states` tuple of [B, L or K, D] or None.

        Raises:
            ValueError: shapes that do not fit together, sizes that are not multiples of the patch.
        """
        if grid_thw is not None:
            if visible_indices is not None:
                raise ValueError("visible_indices: have no meaning for packed patches; leave out the rows instead")
            return self.encode_packed(
                pixel_values, grid_thw, patch_positions, output_hidden_states, hidden_state_indices
            )
        check_pixels(pixel_values, self.config.num_channels)
        is_clip = pixel_values.ndim == 5
        clips = pixel_values if is_clip else pixel_values[:, :, None]
        batch, _, t, height, width = clips.shape
        h, w = height // self.config.patch_size, width // self.config.patch_size
        rows = frames_to_patches(clips.transpose(1, 2).flatten(0, 1), self.config.patch_size)
        x_BLD = self.embed(rows).unflatten(0, (batch, t * h * w))
        grid = (self.rope_frames(t, patch_positions) if is_clip else 1, h, w)
        x_BKD, positions_BK3 = self.select_tokens(x_BLD, grid, visible_indices, patch_positions)
        count = x_BKD.shape[1]
        out = self.run(
            x_BKD.flatten(0, 1),
            positions_BK3.flatten(0, 1),
            TracedLengths(None, count) if torch.compiler.is_compiling() else [count] * batch,
            output_hidden_states,
            hidden_state_indices,
        )
        states, hidden_states = out.last_hidden_state, out.hidden_states
        return BaseModelOutputWithPooling(
            last_hidden_state=None if states is None else states.unflatten(0, (batch, -1)),
            pooler_output=out.pooler_output,
            hidden_states=hidden_states and tuple(state.unflatten(0, (batch, -1)) for state in hidden_states),
        )

    def rope_frames(self, t: int, patch_positions) -> int:
        """Frames of the grid that tokens of a clip of `t` frames have their places in."""
        return t

    def select_tokens(self, x_BLD, grid, visible_indices, patch_positions):
        """The tokens that enter the encoder, [B, K, D], and their places [B, K, 3]."""
        tokens = x_BLD.shape[1]
        if visible_indices is not None:
            visible_indices = as_indices(visible_indices, x_BLD.shape[0], (tokens,), x_BLD.device)
            check_indices(visible_indices, tokens)
            x_BLD = _gather(x_BLD, visible_indices)
        return x_BLD, _places(x_BLD, grid, visible_indices, patch_positions)


class OneVisionEncoderModel(LlavaViTModel):
    """OneVision-Encoder, as released: `LlavaViTModel` with its own meaning of `visible_indices` for clips.

    They count in a grid of `rope_temporal_size` frames. As many indices as the clip has patches leave all its tokens in
    place and only say where they stand in that grid (few frames spread over a long time); fewer choose tokens and
    places alike.
    """

    config_class = OneVisionEncoderConfig
    base_model_prefix = "onevision_encoder"

    def rope_frames(self, t, patch_positions):
        frames = self.config.rope_temporal_size or t
        if t > frames and patch_positions is None:
            raise ValueError(
                f"pixel_values: found a clip of {t} frames, expected at most rope_temporal_size {frames} of them, or "
                "patch_positions"
            )
        return frames

    def select_tokens(self, x_BLD, grid, visible_indices, patch_positions):
        tokens, places = x_BLD.shape[1], grid[0] * grid[1] * grid[2]
        if visible_indices is not None:
            visible_indices = as_indices(visible_indices, x_BLD.shape[0], (tokens, places), x_BLD.device)
            places_only = visible_indices.shape[1] == tokens
            check_indices(visible_indices, places if places_only else tokens)
            if not places_only:
                x_BLD = _gather(x_BLD, visible_indices)
        return x_BLD, _places(x_BLD, grid, visible_indices, patch_positions)


def _gather(x_BLD, indices_BK):
    return x_BLD.gather(1, indices_BK[..., None].expand(-1, -1, x_BLD.shape[-1]))


def _places(x_BKD, grid, visible_indices, patch_positions):
    """[B, K, 3] as given, or as the indices say, or in raster order."""
    batch, count = x_BKD.shape[:2]
    if patch_positions is not None:
        return as_positions(patch_positions, (batch, count), x_BKD.device)
    if visible_indices is None:
        visible_indices = torch.arange(count, device=x_BKD.device).expand(batch, -1)
    return unravel(visible_indices, *grid[1:])
