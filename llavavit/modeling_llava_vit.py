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
from .layers import (
    Encoder,
    PatchProjection,
    PoolingHead,
    ProbeAttention,
    SeparateAttention,
    build_norm,
    frames_to_patches,
    grid_positions,
    unravel,
)
from .varlen_attention import pack_lengths


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
        width = self.config.num_channels * self.config.patch_size**2
        if rows.ndim != 2 or rows.shape[1] != width:
            raise ValueError(f"hidden_states: found shape {tuple(rows.shape)}, expected [N, {width}]")
        if grid_thw.ndim != 2 or grid_thw.shape[1] != 3 or grid_thw.is_floating_point():
            raise ValueError(
                f"grid_thw: found {grid_thw.dtype} of shape {tuple(grid_thw.shape)}, expected integers of shape [S, 3]"
            )
        grid = grid_thw.tolist()
        lengths = [t * h * w for t, h, w in grid]
        if not grid or min(min(sizes) for sizes in grid) < 1 or sum(lengths) != len(rows):
            raise ValueError(
                f"grid_thw: found {grid[:8]}{' ...' if len(grid) > 8 else ''} with {sum(lengths)} patches, expected "
                f"sizes of at least 1 with the {len(rows)} patches of hidden_states"
            )
        if patch_positions is None:
            patch_positions = grid_positions(grid, rows.device)
        elif patch_positions.shape != (len(rows), 3):
            raise ValueError(f"patch_positions: found shape {tuple(patch_positions.shape)}, expected ({len(rows)}, 3)")
        return self.run(self.embed(rows), patch_positions, lengths, output_hidden_states, hidden_state_indices)

    def run(self, x_ND, positions_N3, lengths, output_hidden_states=None, hidden_state_indices=None):
        """From embedded patches to the model's outputs, packed.

        Args:
            x_ND: [N, D] embedded patches of all samples.
            positions_N3: [N, 3] their places (t, h, w).
            lengths: tokens of each sample, on the host.
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
            pooled_SD = self.head(x_ND, *pack_lengths(lengths, x_ND.device))
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
        channels = self.config.num_channels
        if pixel_values.ndim not in (4, 5) or pixel_values.shape[1] != channels:
            raise ValueError(
                f"pixel_values: found shape {tuple(pixel_values.shape)}, expected [B, {channels}, H, W] or "
                f"[B, {channels}, T, H, W]"
            )
        is_clip = pixel_values.ndim == 5
        clips = pixel_values if is_clip else pixel_values[:, :, None]
        batch, _, t, height, width = clips.shape
        h, w = height // self.config.patch_size, width // self.config.patch_size
        rows = frames_to_patches(clips.transpose(1, 2).flatten(0, 1), self.config.patch_size)
        x_BLD = self.embed(rows).unflatten(0, (batch, t * h * w))
        grid = (self.rope_frames(t, patch_positions) if is_clip else 1, h, w)
        x_BKD, positions_BK3 = self.select_tokens(x_BLD, grid, visible_indices, patch_positions)
        if positions_BK3.shape != (*x_BKD.shape[:2], 3):
            raise ValueError(
                f"patch_positions: found shape {tuple(positions_BK3.shape)}, expected {(*x_BKD.shape[:2], 3)}, one "
                "(t, h, w) for each token that enters the encoder"
            )
        out = self.run(
            x_BKD.flatten(0, 1),
            positions_BK3.flatten(0, 1),
            [x_BKD.shape[1]] * batch,
            output_hidden_states,
            hidden_state_indices,
        )
        for name in ("last_hidden_state", "hidden_states"):
            if out.get(name) is not None:
                packed = out[name]
                single = isinstance(packed, torch.Tensor)
                out[name] = _batch(packed, batch) if single else tuple(_batch(state, batch) for state in packed)
        return out

    def rope_frames(self, t: int, patch_positions) -> int:
        """Frames of the grid that tokens of a clip of `t` frames have their places in."""
        return t

    def select_tokens(self, x_BLD, grid, visible_indices, patch_positions):
        """The tokens that enter the encoder, [B, K, D], and their places [B, K, 3]."""
        _check_indices(visible_indices, x_BLD, x_BLD.shape[1])
        if visible_indices is not None:
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
        tokens = x_BLD.shape[1]
        places_only = visible_indices is not None and visible_indices.shape[1] == tokens
        _check_indices(visible_indices, x_BLD, grid[0] * grid[1] * grid[2] if places_only else tokens)
        if visible_indices is not None and not places_only:
            x_BLD = _gather(x_BLD, visible_indices)
        return x_BLD, _places(x_BLD, grid, visible_indices, patch_positions)


def _gather(x_BLD, indices_BK):
    return x_BLD.gather(1, indices_BK[..., None].expand(-1, -1, x_BLD.shape[-1]))


def _places(x_BKD, grid, visible_indices, patch_positions):
    """[B, K, 3] as given, or as the indices say, or in raster order."""
    batch, count = x_BKD.shape[:2]
    if patch_positions is not None:
        return patch_positions
    if visible_indices is None:
        visible_indices = torch.arange(count, device=x_BKD.device).expand(batch, -1)
    return unravel(visible_indices, *grid[1:])


def _check_indices(indices, x_BLD, limit: int) -> None:
    if indices is None:
        return
    if indices.ndim != 2 or len(indices) != len(x_BLD) or not indices.shape[1]:
        raise ValueError(f"visible_indices: found shape {tuple(indices.shape)}, expected [{len(x_BLD)}, K] with K > 0")
    # on a GPU, looking would mean waiting for it, at every step
    if indices.device.type == "cpu" and not 0 <= int(indices.min()) <= int(indices.max()) < limit:
        raise ValueError(
            f"visible_indices: found {int(indices.min())} to {int(indices.max())}, expected 0 to {limit - 1}"
        )


def _batch(packed, batch: int):
    return packed.unflatten(0, (batch, -1))
