"""The HEVC-ViT tower under the padded layout's weight names: LlavaViT and OneVision-Encoder checkpoints as released.

A batch goes through the model's padded form; a list of different sizes is packed, as in `hevc_vit_packing_tower.py`.
"""

import torch

from llavavit import LlavaViTConfig, LlavaViTModel

from .hevc_vit_packing_tower import HEVCViTPackingVisionTower


class HEVCViTVisionTower(HEVCViTPackingVisionTower):
    config_class, model_class = LlavaViTConfig, LlavaViTModel
    takes_adaptive_patches = False

    def encode(self, images):
        self.check_sizes(images)
        return torch.cat(self.vision_tower(images, hidden_state_indices=self.layers()).hidden_states, dim=-1)
