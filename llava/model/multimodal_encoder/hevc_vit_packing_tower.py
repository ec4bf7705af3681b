"""HEVC-ViT tower on packed patches: images and clips of any mix of sizes in one forward, without padding.

The walk of a batch through it, patch 16, width D (`playground/packing_tower_example.py` prints it from a run):

    images          [4, 3, 224, 224]    or a list of [C, H_i, W_i] and of clips [T_i, C, H_i, W_i]
      images_to_packed
    hidden_states   [784, 768]          4 x 14 x 14 patches of 3 x 16 x 16 values, one image after the other
    grid_thw        [4, 3]              4 x [1, 14, 14]
      LlavaViTPackingModel              attention within each image, everything else on all patches at once
    features        [784, D]            the hidden state that mm_vision_select_layer picks (or several, side by side)
      packed_to_features
    features        [4, 196, D]         or a list of [n_i, D]

There is no class token, so `cls_patch` is `patch`. A clip is one sample, whose frames see each other. A checkpoint in
the padded layout or under the released name (onevision_encoder) is renamed on loading.

With `adaptive_patches` the rows are the patches that are kept of each image (see `patch_choice.py`), larger ones
pooled, at the places of their middles; features are a list, since their number depends on what an image shows.
"""

import os

import torch
from transformers import CLIPImageProcessorPil, PreTrainedConfig

from llava.errors import LlavaError
from llava.model.host import send
from llavavit import LlavaViTPackingConfig, LlavaViTPackingModel
from llavavit.configuration_llava_vit import IMAGE_MEAN, IMAGE_STD
from llavavit.conversion import convert_config
from llavavit.layers import frames_to_patches

from .base import PatchGrid, select_layers
from .hf_tower import HFVisionTower
from .patch_choice import ChosenPatches

# ======================================================================================================================
# Conversions: images -> [N, patch_dim] -> features of each image
# ======================================================================================================================


def images_to_packed(images, patch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut images into patches and put all patches into one sequence.

    Args:
        images: [B, C, H, W]; or a list of [C, H, W] and of clips [T, C, H, W]. Heights and widths are multiples of
            `patch_size`; N is the number of patches of all of them.

    Returns:
        hidden_states: [N, C * patch_size**2], patches in raster order, each flattened channel first.
        grid_thw: [images, 3] on the CPU, (frames, rows, columns) in patches.
    """
    clips = [image if image.ndim == 4 else image[None] for image in images]
    grid = [(len(clip), clip.shape[-2] // patch_size, clip.shape[-1] // patch_size) for clip in clips]
    if isinstance(images, torch.Tensor):  # of one size: all in one copy
        return frames_to_patches(images, patch_size), torch.tensor(grid)
    return torch.cat([frames_to_patches(clip, patch_size) for clip in clips]), torch.tensor(grid)


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


class HEVCViTPackingVisionTower(HFVisionTower):
    config_class, model_class, processor_class = LlavaViTPackingConfig, LlavaViTPackingModel, CLIPImageProcessorPil
    any_size = sees_time = takes_adaptive_patches = True

    def choose_patches(self, images, alphas: list[float] | None = None, levels: list | None = None) -> ChosenPatches:
        """The patches to keep of images as `forward` takes them.

        A model calls it outside of `forward` and hands the choice in, since it needs the counts; it is made once.

        Args:
            images: as `forward`.
            alphas: one for each image, as `PatchChoice.draw` gives them; None: the choice's own, of a range the middle.
            levels: of each image, as `PatchChooser.levels_of` finds them on the host: then nothing is chosen here.

        Raises:
            LlavaError: sizes that are not multiples of the patch, bfloat16 pixels, or another number of alphas.
        """
        self.check_sizes(images)
        images = [image.to(self.device) for image in images]
        if any(image.dtype == torch.bfloat16 for image in images):
            raise LlavaError(
                "adaptive_patches: found images in bfloat16, which does not tell neighbouring grey levels apart, "
                "expected float32, as process_images makes them"
            )
        return self.patch_chooser.choose(images, alphas, levels)

    def forward(self, images, return_spatial_dims=False, packed=False, chosen: ChosenPatches | None = None):
        """As `VisionTower.forward`; with adaptive patches a list, or packed, and (h, w) is None for an image.

        chosen: what `choose_patches` made of these images.
        """
        if self.patch_chooser is None:
            return super().forward(images, return_spatial_dims, packed)
        if chosen is None:
            chosen = self.choose_patches(images)
        samples = torch.tensor([(1, 1, length) for length in chosen.lengths])
        (positions,) = send([chosen.positions], chosen.rows.device)
        with self.encoder_gradient():
            states = self.vision_tower(
                chosen.rows.to(self.dtype), samples, positions, hidden_state_indices=self.layers()
            ).hidden_states
        features = torch.cat(states, dim=-1)
        if not packed:
            parts = features.split(chosen.lengths)
            features = [part.to(image.dtype) for part, image in zip(parts, images, strict=True)]
        if not return_spatial_dims:
            return features
        return features, [self.token_grid(*i.shape[-2:])[1] if i.ndim == 4 else None for i in images]

    def encode(self, images):
        return self.encode_packed(images, batched=True)

    def features_list(self, images):
        with self.encoder_gradient():
            features = self.encode_packed(images, batched=False)
        if self.token_compressor is None:
            return features
        counts = [self.token_grid(*image.shape[-2:])[0] for image in images]  # refuses what is not of the one size
        frames = [image.shape[0] if image.ndim == 4 else 1 for image in images]
        side = self.token_compressor.input_grid_size
        packed = self.token_compressor(torch.cat(features).unflatten(0, (-1, side**2))).flatten(0, 1)
        return list(packed.split([count * n for count, n in zip(counts, frames, strict=True)]))

    def encode_packed(self, images, batched: bool):
        """One call of the encoder, whatever the images: under ZeRO-3 every rank must make the same calls."""
        self.check_sizes(images)
        patches, grid_thw = images_to_packed(images, self.config.patch_size)
        states = self.vision_tower(patches, grid_thw=grid_thw, hidden_state_indices=self.layers()).hidden_states
        return packed_to_features(torch.cat(states, dim=-1), grid_thw, batched)

    def feature_select(self, image_forward_outs):
        """The selected features among all `hidden_states` of the encoder's output, as the published towers' method."""
        return torch.cat([image_forward_outs.hidden_states[i] for i in self.layers()], dim=-1)

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

    def layers(self) -> list[int]:
        return select_layers(self.select_feature, self.select_layer, self.config.num_hidden_layers + 1)

    @property
    def token_grid(self):
        compressor = self.token_compressor
        sides = None if compressor is None else (compressor.input_grid_size, compressor.output_grid_size)
        return PatchGrid(self.config.patch_size, sides)

    @property
    def num_patches(self):
        return self.num_patches_per_side**2

    # --- config, processor, weights ---

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
        """As stored with the encoder; for a folder without one, CLIP's at the encoder's size."""
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

    def wrap(self, encoder):
        return encoder

    def unused_modules(self):
        yield from self.vision_tower.encoder.layers[max(self.layers()) :]
        for name in ("layernorm_post", "head"):
            if hasattr(self.vision_tower, name):
                yield getattr(self.vision_tower, name)
