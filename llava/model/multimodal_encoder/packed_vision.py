"""The tower for encoders of transformers that take any size: Siglip 2 NaFlex, Pixtral's, and those of the Qwen-VL
models taken alone. Images of any mix of sizes are one row of patches, without padding.

    images      [B, 3, H, W], or a list of [3, H_i, W_i]
      patches of all images, one after the other, in raster order
    rows        [N, 3 * patch^2]
      the encoder (`packed_encoders`), attention within each image
    features    [N, D] of the hidden state that mm_vision_select_layer picks -> [B, n, D], or a list of [n_i, D]

Sides are multiples of the patch; for the Qwen-VL encoders of two patches, by which they were trained, though their
features are those before the 2x2 merger: a projector of kind spatial_merge does what it did.
"""

import torch

from llava.errors import LlavaError

from .base import select_layers
from .hevc_vit_packing_tower import images_to_packed, packed_to_features
from .hf_facts import PACKED
from .hf_vision import HFVisionBackboneTower

USUAL_PATCHES = 32  # a side of a picture that is to be a square, for encoders that have no size of their own


class PackedVisionTower(HFVisionBackboneTower):
    any_size = True

    # --- config and pixels ---

    def facts_of(self, values):
        """As the parent's; of a larger model the vision half must be one of these encoders."""
        if self.model_type not in PACKED:
            raise LlavaError(
                f"vision tower {self.vision_tower_name!r}: found model_type {self.model_type!r}, expected one of "
                f"{', '.join(PACKED)}"
            )
        facts = PACKED[self.model_type]
        inner = (values.get("vision_config") or {}).get("model_type") or self.model_type
        if PACKED.get(inner) is not facts or inner in ("llava", "mistral3"):
            raise LlavaError(
                f"vision tower {self.vision_tower_name!r}: the vision half of this {self.model_type} is {inner!r}, "
                f"expected {[kind for kind in PACKED if PACKED[kind] is facts][-1]!r}"
            )
        return facts

    def classes(self):
        from .packed_encoders import ENCODERS

        model_class = ENCODERS[self.facts.name]
        return model_class.config_class, model_class

    def set_sizes(self, args):
        super().set_sizes(args)
        self.config.model_type = self.config_class.model_type  # published configs write the whole model's in it
        self.multiple = self.patch * getattr(self.config, "spatial_merge_size", 1)
        if self.side % self.multiple:
            raise LlavaError(
                f"image_size: found {self.side}, expected a multiple of {self.multiple} (two patches of "
                f"{self.model_type})"
            )

    def own_side(self):
        places = getattr(self.config, "num_position_embeddings", None)
        if places is not None:  # Qwen3-VL's table of positions
            return round(places**0.5) * self.patch
        if hasattr(self.config, "image_size") or hasattr(self.config, "num_patches"):
            return super().own_side()
        return USUAL_PATCHES * self.patch

    def read_source_processor(self):
        """As the parent's, for squares: what these encoders publish as `size` are bounds on a picture of any aspect."""
        processor = super().read_source_processor()
        square = {"height": self.side, "width": self.side}
        values = processor.to_dict() | {"size": square, "crop_size": square, "do_center_crop": False}
        return self.processor_class.from_dict(values)

    def attention_for(self, language_model):
        return "eager" if language_model == "eager" else "varlen"  # the fastest that the device has

    # --- features ---

    def layers(self):
        return select_layers(self.select_feature, self.select_layer, self.config.num_hidden_layers + 1)

    def encode(self, images):
        return self.encode_packed(images, batched=True)

    def features_list(self, images):
        with self.encoder_gradient():
            features = self.encode_packed(images, batched=False)
        if self.token_compressor is None:
            return features
        for image in images:
            self.token_grid(*image.shape[-2:])  # refuses what is not of the one size
        return list(self.token_compressor(torch.stack(features)).unbind(0))

    def encode_packed(self, images, batched: bool):
        """One call of the encoder, whatever the images: under ZeRO-3 every rank must make the same calls."""
        self.check_pixels(images)
        rows, grid_thw = images_to_packed(images, self.patch)
        grids = [tuple(grid) for grid in grid_thw[:, 1:].tolist()]  # on the host, from the shapes
        features = torch.cat(self.vision_tower(rows, grids, self.layers()), dim=-1)
        return packed_to_features(features, grid_thw, batched)

    def check_pixels(self, images) -> None:
        sizes = {tuple(image.shape[-2:]) for image in images}
        wrong = sorted(size for size in sizes if size[0] % self.multiple or size[1] % self.multiple or 0 in size)
        if wrong:
            raise LlavaError(
                f"the vision tower takes images with height and width in multiples of {self.multiple} pixels, got "
                f"{wrong[0][0]}x{wrong[0][1]}"
            )

    # --- what the model asks ---

    @property
    def feature_size(self):
        """In the config of Qwen2-VL's encoder `hidden_size` is the language model's width."""
        found, config = super().feature_size, self.config
        return found // config.hidden_size * getattr(config, "embed_dim", config.hidden_size)
