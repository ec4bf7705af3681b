"""SigLIP tower. As published, the last encoder layer and the pooling head do not exist and the output is the last layer
that does, whatever mm_vision_select_layer says: layer -2 of the whole model. SigLIP has no class token."""

from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from .base import FixedGrid
from .hf_tower import HFVisionTower


class SigLipVisionTower(HFVisionTower):
    config_class, model_class, processor_class = SiglipVisionConfig, SiglipVisionModel, SiglipImageProcessorPil
    drop = ("head",)

    @property
    def keep_layers(self):
        return self.config.num_hidden_layers - 1

    def layers(self):
        return [self.keep_layers]

    def encode(self, images):
        return self.vision_tower(images, self.layers())[0]

    @property
    def feature_size(self):
        return self.config.hidden_size

    @property
    def token_grid(self):
        return FixedGrid(self.num_patches_per_side)

    @property
    def num_patches(self):
        return self.num_patches_per_side**2
