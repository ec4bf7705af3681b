"""HEVC-ViT on packed patches: images and clips of any sizes in one sequence, without padding.

Shapes: N patches of all S samples, one sample after the other; C channels, p the patch's side, D width.
"""

import torch.nn as nn
from transformers.utils import can_return_tuple

from .configuration_llava_vit import LlavaViTPackingConfig
from .layers import FusedAttention, PatchProjection
from .modeling_llava_vit import LlavaViTPreTrainedModel


class PatchEmbed(nn.Module):
    """[N, C*p*p] -> [N, D]."""

    def __init__(self, config):
        super().__init__()
        self.proj = PatchProjection(config)

    def forward(self, rows):
        return self.proj(rows)


class LlavaViTPackingModel(LlavaViTPreTrainedModel):
    """`LlavaViTModel` with the same numbers for every sample, on packed input and under the packed layout's names."""

    config_class = LlavaViTPackingConfig
    base_model_prefix = "llava_vit_packing"
    main_input_name = "hidden_states"
    attention_class = FusedAttention

    def __init__(self, config):
        super().__init__(config)
        self.patch_embed = PatchEmbed(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.patch_embed.proj

    def embed(self, rows):
        """[N, C*p*p] -> [N, D]."""
        return self.patch_embed(rows)

    @can_return_tuple
    def forward(
        self, hidden_states, grid_thw, patch_positions=None, output_hidden_states=None, hidden_state_indices=None
    ):
        """Encode packed patches; a sample never sees another.

        Args:
            hidden_states: [N, C*p*p]; a row is one patch, flattened channel first, then rows, then columns.
            grid_thw: [S, 3] integers, (frames, rows, columns) of each sample in patches. On the CPU it costs nothing,
                on a GPU one wait per call.
            patch_positions: [N, 3] (t, h, w) of each patch, fractions too; not given: its place in its sample.
            output_hidden_states, hidden_state_indices, return_dict: as `LlavaViTModel.forward`.

        Returns:
            BaseModelOutputWithPooling: `last_hidden_state` [N, D], `pooler_output` [S, D] (None without head),
            `hidden_states` tuple of [N, D] or None.

        Raises:
            ValueError: shapes that do not fit together, a sample without patches.
        """
        return self.encode_packed(hidden_states, grid_thw, patch_positions, output_hidden_states, hidden_state_indices)
