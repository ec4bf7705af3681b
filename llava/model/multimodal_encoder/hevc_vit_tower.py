"""HEVC-ViT tower on padded batches: LlavaViT and OneVision-Encoder checkpoints.

There is no class token, so `cls_patch` is `patch`. Images of any size, in multiples of the patch, those of one size in
one call; a clip is one sample, whose frames see each other.
"""

import os

import torch
from transformers import CLIPImageProcessorPil, PreTrainedConfig

from llava.errors import LlavaError
from llavavit import LlavaViTConfig, LlavaViTModel
from llavavit.configuration_llava_vit import IMAGE_MEAN, IMAGE_STD
from llavavit.conversion import convert_config

from .base import PatchGrid, select_layers
from .hf_tower import HFVisionTower


class HEVCViTVisionTower(HFVisionTower):
    config_class, model_class, processor_class = LlavaViTConfig, LlavaViTModel, CLIPImageProcessorPil
    any_size = sees_time = True

    def read_source_config(self):
        try:
            values, _ = PreTrainedConfig.get_config_dict(self.vision_tower_name)
        except OSError:
            return super().read_source_config()  # raises, with what is missing
        try:
            return convert_config(values, self.config_class)
        except (KeyError, ValueError) as error:
            reason = f"model_type {error}, no HEVC-ViT" if isinstance(error, KeyError) else error
            raise LlavaError(f"vision tower {self.vision_tower_name!r}: config.json: {reason}") from None

    def read_source_processor(self):
        """As stored with the encoder; one without a preprocessor_config.json is given CLIP's at its own size."""
        folder = self.vision_tower_name
        if os.path.isdir(folder) and not os.path.isfile(os.path.join(folder, "preprocessor_config.json")):
            side = self.config.image_size
            return self.processor_class(
                size={"shortest_edge": side},
                crop_size={"height": side, "width": side},
                image_mean=list(IMAGE_MEAN),
                image_std=list(IMAGE_STD),
            )
        return super().read_source_processor()

    def attention_for(self, language_model):
        return "eager" if language_model == "eager" else "varlen"  # the fastest that the device has

    def hold(self, encoder):
        return encoder

    def layers(self) -> list[int]:
        return select_layers(self.select_feature, self.select_layer, self.config.num_hidden_layers + 1)

    def encode(self, images):
        """[B, C, H, W] -> [B, n, D]; clips [B, T, C, H, W] -> [B, T * n, D]."""
        self.check_sizes(images)
        pixels = images.transpose(1, 2) if images.ndim == 5 else images
        states = self.vision_tower(pixels, hidden_state_indices=self.layers()).hidden_states
        return torch.cat(states, dim=-1)

    def encode_list(self, images):
        self.check_sizes(images)  # of all of them, before any is encoded
        return super().encode_list(images)

    def check_sizes(self, images):
        """Refuse images whose sides are not multiples of the patch; the image processing is to see to that."""
        patch = self.config.patch_size
        sizes = {tuple(image.shape[-2:]) for image in images}
        wrong = sorted(size for size in sizes if size[0] % patch or size[1] % patch or 0 in size)
        if wrong:
            found = ", ".join(f"{height}x{width}" for height, width in wrong[:8]) + (", ..." if len(wrong) > 8 else "")
            raise LlavaError(
                f"the vision tower takes images with height and width in multiples of {patch} pixels, got {found}"
            )

    def reset_buffers(self):
        """There are none: rotary frequencies are computed in the forward."""

    def unused_modules(self):
        yield from self.vision_tower.encoder.layers[max(self.layers()) :]
        for name in ("layernorm_post", "head"):
            if hasattr(self.vision_tower, name):
                yield getattr(self.vision_tower, name)

    @property
    def token_grid(self):
        return PatchGrid(self.config.patch_size)

    @property
    def num_patches(self):
        return self.num_patches_per_side**2
