"""CLIP towers: one scale, and S2 with several.

The class token is token 0 of every hidden state and `patch` leaves it out.
"""

import torch
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from .base import select_layers
from .hf_tower import HFVisionTower
from .multi_scale import MultiScale


class CLIPVisionTower(HFVisionTower):
    config_class, model_class, processor_class = CLIPVisionConfig, CLIPVisionModel, CLIPImageProcessorPil

    def layers(self) -> list[int]:
        return select_layers(self.select_feature, self.select_layer, self.config.num_hidden_layers + 1)

    def encode(self, images):
        return self._selected(self.vision_tower(images, self.layers()))

    def feature_select(self, image_forward_outs):
        """The selected features [B, T, D] among all `hidden_states` of an encoder's output, as LLaVA's method."""
        return self._selected([image_forward_outs.hidden_states[i] for i in self.layers()])

    def _selected(self, states):
        features = torch.cat(states, dim=-1)
        return features if "cls_patch" in self.select_feature else features[:, 1:]


class CLIPVisionTowerS2(MultiScale, CLIPVisionTower):
    """CLIP at several scales."""
