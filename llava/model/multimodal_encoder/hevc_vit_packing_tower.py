"""HEVC-ViT tower on packed patches: images and clips of any mix of sizes in one forward, without padding.

The walk of a batch through it, patch 16, width D (`playground/packing_tower_example.py` prints it from a run):

    images          [4, 3, 224, 224]    or a list of [C, H_i, W_i] and of clips [T_i, C, H_i, W_i]
      images_to_packed
    hidden_states   [784, 768]          4 x 14 x 14 patches of 3 x 16 x 16 pixels, one image after the other
    grid_thw        [4, 3]              4 x [1, 14, 14]
      LlavaViTPackingModel              attention within each image, the rest on all patches at once
    hidden_states   [784, D]
      packed_to_features
    features        [4, 196, D]         or a list of [n_i, D]
"""

import torch

from llavavit import LlavaViTPackingConfig, LlavaViTPackingModel
from llavavit.layers import frames_to_patches

from .hevc_vit_tower import HEVCViTVisionTower

# ======================================================================================================================
# Conversions: [B, C, H, W] <-> [N, patch_dim]
# ======================================================================================================================


def images_to_packed(images, patch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut images into patches and put all patches into one sequence.

    Args:
        images: [B, C, H, W], or [B, T, C, H, W] clips; or a list of [C, H, W] and [T, C, H, W]. Heights and widths are
            multiples of `patch_size`, N is the number of patches of all of them.

    Returns:
        hidden_states: [N, C * patch_size**2], patches in raster order, each flattened channel first.
        grid_thw: [images, 3] on the CPU, (frames, rows, columns) in patches.
    """
    frames = [image if image.ndim == 4 else image[None] for image in images]
    grid = [(len(f), f.shape[-2] // patch_size, f.shape[-1] // patch_size) for f in frames]
    if isinstance(images, torch.Tensor):  # of one size: a view and one copy
        patches = frames_to_patches(images.flatten(0, images.ndim - 4), patch_size)
    else:
        patches = torch.cat([frames_to_patches(f, patch_size) for f in frames])
    return patches, torch.tensor(grid)


def packed_to_features(features: torch.Tensor, grid_thw: torch.Tensor, batched: bool):
    """Cut the sequence of all features into those of each image.

    Args:
        features: [N, D].
        grid_thw: [images, 3] on the CPU, as `images_to_packed` gives it.
        batched: whether the images came as one tensor.

    Returns:
        [images, n, D] if batched, else a list of [n_i, D].
    """
    if batched:
        return features.unflatten(0, (len(grid_thw), -1))
    return list(features.split(grid_thw.prod(1).tolist()))


# ======================================================================================================================


class HEVCViTPackingVisionTower(HEVCViTVisionTower):
    config_class, model_class = LlavaViTPackingConfig, LlavaViTPackingModel

    def encode(self, images):
        return self._encode_packed(images, batched=True)

    def encode_list(self, images):
        return self._encode_packed(images, batched=False)

    def _encode_packed(self, images, batched: bool):
        self.check_sizes(images)
        patches, grid_thw = images_to_packed(images, self.config.patch_size)
        states = self.vision_tower(patches, grid_thw, hidden_state_indices=self.layers()).hidden_states
        return packed_to_features(torch.cat(states, dim=-1), grid_thw, batched)
