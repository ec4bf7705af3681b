"""The contract between a vision tower and the rest of the model.

Shapes: B images (or crops), T tokens of an image, D channels.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn

from llava.errors import LlavaError
from llava.model.adaptive_patches import PatchChoice
from llava.model.vision_blocks import used_blocks
from llava.model.vision_settings import uses_compression

from .plain_config import plain_config
from .token_compressor import TokenCompressor


def select_layers(select_feature: str, select_layer: int, num_hidden_states: int) -> list[int]:
    """Which hidden states a feature kind concatenates, as non-negative indices.

    `patch`, `cls_patch`: one. `slicefour_*`: every k-th from k + select_layer on, k = num_hidden_states // 4; must be
    four. `slice_m25811_f6_*`: layers -2, -5, -8, -11 and 6.
    """
    if select_feature.startswith("slicefour_"):
        k = num_hidden_states // 4
        indices = list(range(k + select_layer, num_hidden_states, k)) if k else []
        if len(indices) != 4 or indices[0] < 0:
            raise LlavaError(
                f"mm_vision_select_feature {select_feature!r} with mm_vision_select_layer {select_layer} takes "
                f"{len(indices)} layers of this tower's {num_hidden_states} hidden states, expected 4"
            )
    elif select_feature.startswith("slice_m25811_f6_"):
        indices = [-2, -5, -8, -11, 6]
    else:
        indices = [select_layer]
    if any(not -num_hidden_states <= i < num_hidden_states for i in indices):
        raise LlavaError(
            f"mm_vision_select_layer/feature: layers {indices} of a tower with {num_hidden_states} hidden states "
            f"(indices {-num_hidden_states} to {num_hidden_states - 1})"
        )
    return [i % num_hidden_states for i in indices]


FEATURE_KINDS = ("patch", "cls_patch")
FEATURE_PREFIXES = ("", "slicefour_", "slice_m25811_f6_")


@dataclass(frozen=True)
class FixedGrid:
    """Token layout of a tower that sees every image at one size: same answer for any pixel size. Picklable."""

    side: int
    cls_token: bool = False

    def __call__(self, height: int, width: int) -> tuple[int, tuple[int, int] | None]:
        """(tokens, (h, w)) of an image of `height` x `width` pixels; no grid where a class token is among them."""
        return self.side**2 + self.cls_token, None if self.cls_token else (self.side, self.side)


@dataclass(frozen=True)
class PatchGrid:
    """Token layout of a tower that takes images of any size: one token per patch. Picklable.

    compression: sides of the token grid (before, after) a compressor, which takes images of that one size.
    """

    patch: int
    compression: tuple[int, int] | None = None

    def __call__(self, height: int, width: int) -> tuple[int, tuple[int, int]]:
        """(tokens, (h, w)) of an image of `height` x `width` pixels, which must be multiples of the patch."""
        h, w = height // self.patch, width // self.patch
        if self.compression is not None:
            before, after = self.compression
            if (h, w) != (before, before):
                raise LlavaError(
                    f"token compression: an image of {width}x{height} pixels gives {h}x{w} tokens, expected "
                    f"{before}x{before} (compression_input_size), which become {after}x{after}"
                )
            h = w = after
        return h * w, (h, w)


class VisionTower(nn.Module, ABC):
    """Base of all towers. A subclass builds `self.vision_tower` and answers the few questions below.

    Args:
        vision_tower: hub id or folder of the encoder.
        args: a mapping, or anything with the attributes `mm_vision_select_layer`, `mm_vision_select_feature` and, in a
            checkpoint, `mm_vision_config` (the encoder's own config) and `mm_image_processor_config`.
        delay_load: build the encoder from its config only; `load_model` or a checkpoint brings the weights.
        **tower_args: of the run's `tower_args`, for a subclass of the user's own; kept as the attribute `tower_args`.

    A subclass implements `read_config`, `build_empty`, `load_model` and `encode`.

    Attributes, by ToConv's names:
        use_token_compression: whether there is a token compressor behind the encoder.
        compression_input_size, compression_output_size: tokens per side before and after it, as `args` say; where there
            is none they mean nothing.
    """

    any_size = False  # takes images of any size, in multiples of its patch
    sees_time = False  # takes a clip as one sample, so that its frames see each other
    takes_adaptive_patches = False  # can keep large patches where an image holds little
    sets_sizes = False  # `image_size` and `vision_tower_stage` of a run are for it

    def __init__(self, vision_tower: str, args, delay_load: bool = False, **tower_args):
        super().__init__()
        args = plain_config(args)
        self.vision_tower_name, self.tower_args = vision_tower, tower_args
        self.set_features(args)
        self.is_loaded = False
        self.token_compressor = None  # a subclass's token layout asks for it
        self.read_config(args)
        self.config = plain_config(getattr(self, "config", None))
        self.set_compression(args)
        self.set_patch_choice(args)
        if delay_load:
            self.build_empty()
        else:
            self.load_model()

    def set_features(self, args) -> None:
        """Take over which features the tower returns; needs no reload."""
        self.select_layer = getattr(args, "mm_vision_select_layer", -2)
        self.select_feature = getattr(args, "mm_vision_select_feature", None) or "patch"
        prefix = next((p for p in reversed(FEATURE_PREFIXES) if self.select_feature.startswith(p)), "")
        if self.select_feature.removeprefix(prefix) not in FEATURE_KINDS:
            raise LlavaError(
                f"mm_vision_select_feature: found {self.select_feature!r}, expected "
                f"{', '.join(p + k for p in FEATURE_PREFIXES for k in FEATURE_KINDS)}"
            )

    def resize(self, args) -> None:
        """Take over another `image_size` or `vision_tower_stage` of `args`; the weights stay.

        Raises:
            LlavaError: a tower of one size and no stages.
        """
        raise LlavaError(
            f"image_size, vision_tower_stage: {self.vision_tower_name} ({type(self).__name__}) has one size and no "
            "stages; expected neither"
        )

    def set_compression(self, args) -> None:
        """Build the token compressor that `args` ask for, with random weights, or take away the one there is.

        Raises:
            LlavaError: a grid that is not this tower's, or a geometry that there is none for.
        """
        before, after = getattr(args, "compression_input_size", 24), getattr(args, "compression_output_size", 12)
        self.token_compressor, self.use_token_compression = None, uses_compression(args)
        self.compression_input_size, self.compression_output_size = before, after
        if not self.use_token_compression:
            return
        pixels, patch = self.grid_pixels
        if self.token_grid(pixels, pixels)[1] is None:
            raise LlavaError(
                "use_token_compression: a class token has no place in a grid; use mm_vision_select_feature patch"
            )
        if before != pixels // patch:
            raise LlavaError(
                f"compression_input_size: found {before}, expected {pixels // patch}, the side of this tower's token "
                f"grid ({pixels} pixels in patches of {patch})"
            )
        # From the run's seed alone, as the projector: how much randomness the rest took differs between ZeRO stages.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.initial_seed())
            self.token_compressor = TokenCompressor(before, after, self.feature_size)

    def set_patch_choice(self, args) -> None:
        """Take over how patches are chosen, or that all are kept; needs no reload.

        Raises:
            LlavaError: a tower that cannot, or options that cannot be.
        """
        self.patch_chooser = None
        choice = PatchChoice.from_mapping(getattr(args, "adaptive_patches", None))
        if choice is None:
            return
        if not self.takes_adaptive_patches:
            raise LlavaError(
                f"adaptive_patches: the tower {self.vision_tower_name} ({type(self).__name__}) has patches of one "
                "size, expected mm_vision_tower_type hevc_vit_packing"
            )
        if self.token_compressor is not None:
            raise LlavaError("adaptive_patches: found use_token_compression, expected one of the two")
        from .patch_choice import PatchChooser

        self.patch_chooser = PatchChooser.for_processor(choice, self.config.patch_size, self.image_processor)

    # --- what a subclass provides ---

    @abstractmethod
    def read_config(self, args) -> None:
        """Set `config` and `image_processor`; refuse what this encoder cannot do."""

    @abstractmethod
    def build_empty(self) -> None:
        """Set `vision_tower` to the encoder as its config describes it, without pretrained weights."""

    @abstractmethod
    def load_model(self, device_map=None) -> None:
        """Set `vision_tower` to the encoder with its pretrained weights, frozen; no effect when it is there."""

    @abstractmethod
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] in the tower's dtype -> selected features [B, T, D]."""

    def reset_buffers(self) -> None:
        """Recompute buffers that are not in checkpoints; called after a checkpoint was loaded."""
        if self.token_compressor is not None:
            self.token_compressor.reset_buffers()

    @property
    def no_split_modules(self) -> set[str]:
        """Names of classes that a model on several devices has whole on one of them: the tower, and its layers where a
        device cannot hold it."""
        return {type(self).__name__, *(getattr(self.vision_tower, "_no_split_modules", None) or ())}

    def unused_modules(self):
        """Modules whose weights have no part in the selected features; training leaves them frozen. Here found out by a
        backward pass; a subclass that knows says so."""
        from .trial import unused_parts

        yield from unused_parts(self)

    def blocks(self) -> list[nn.Module]:
        """The encoder's blocks that the selected features come through, first to last; none of an encoder that has no
        such."""
        return used_blocks(self.vision_tower, self.unused_modules())

    # --- what the model uses ---

    def forward(self, images, return_spatial_dims: bool = False, packed: bool = False):
        """Features of a batch or of images of different sizes.

        Args:
            images: [B, C, H, W]; or a list of [C, H, W], where a tower with `sees_time` also takes clips [T, C, H, W].
            return_spatial_dims: also return (h, w) of every image's tokens (None with a class token among them).
            packed: return the features of all images one after the other. A tower inside a model does so: under ZeRO-3
                the number of tensors that a module returns must not depend on the batch.

        Returns:
            [B, n, D]; or a list of [n_i, D], a clip's frames one after the other: [T * n_i, D]; or packed [N, D]. With
            `return_spatial_dims` (features, list of (h, w)).
        """
        as_list = isinstance(images, (list, tuple))
        if as_list:
            features = self.features_list([self._to_device(image) for image in images])
        else:
            features = self.features(self._to_device(images))
        if packed:
            features = torch.cat(features) if as_list else features.flatten(0, 1)
        elif as_list:
            features = [feature.to(image.dtype) for feature, image in zip(features, images, strict=True)]
        else:
            features = features.to(images.dtype)
        if return_spatial_dims:
            return features, [self.token_grid(*image.shape[-2:])[1] for image in images]
        return features

    def _to_device(self, images):
        return images.to(device=self.device, dtype=self.dtype)

    def encoder_gradient(self):
        """Context in which a frozen encoder keeps no activations; a compressor after it still learns."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and self.trainable)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, n, D], compressed where there is a compressor."""
        with self.encoder_gradient():
            features = self.encode(images)
        return features if self.token_compressor is None else self.token_compressor(features)

    def features_list(self, images: list[torch.Tensor]) -> list[torch.Tensor]:
        """As `features`, for a list; here, images of one shape go through the encoder together."""
        by_shape: dict[torch.Size, list[int]] = {}
        for i, image in enumerate(images):
            by_shape.setdefault(image.shape, []).append(i)
        found = [None] * len(images)
        for indices in by_shape.values():
            for i, feature in zip(indices, self.features(torch.stack([images[i] for i in indices])), strict=True):
                found[i] = feature
        return found

    @property
    def trainable(self) -> bool:
        """Whether any of the encoder learns."""
        return any(p.requires_grad for p in self.vision_tower.parameters())

    @property
    def token_grid(self) -> Callable[[int, int], tuple[int, tuple[int, int] | None]]:
        """Picklable function (height, width) in pixels -> (tokens, (h, w) or None)."""
        if self.any_size and "cls_patch" not in self.select_feature:
            compressor = self.token_compressor
            sides = compressor and (compressor.input_grid_size, compressor.output_grid_size)
            return PatchGrid(self.config.patch_size, sides)
        return FixedGrid(self.num_patches_per_side, "cls_patch" in self.select_feature)

    def grids(self, height: int, width: int) -> list[tuple[int, int]]:
        """(h, w) in patches of each sequence that the encoder makes of pixels of this size."""
        return [(height // self.config.patch_size, width // self.config.patch_size)]

    @property
    def dtype(self):
        return next(self.vision_tower.parameters()).dtype

    @property
    def device(self):
        """Where the encoder computes."""
        device = next(self.vision_tower.parameters()).device
        if device.type == "meta":  # offloaded: accelerate's hooks bring the weights there when they are used
            hooks = (getattr(module, "_hf_hook", None) for module in self.modules())
            places = (getattr(hook, "execution_device", None) for hook in hooks)
            device = next((torch.device(place) for place in places if place is not None), device)
        return device

    @property
    def dummy_feature(self):
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def hidden_size(self) -> int:
        """Channels of a token."""
        return self.feature_size

    def config_size(self, name: str) -> int:
        """`image_size`, `patch_size` or `hidden_size` of the encoder's config.

        Raises:
            LlavaError: it says none.
        """
        value = getattr(self.config, name, None)
        if value is None:
            raise LlavaError(
                f"vision tower {self.vision_tower_name}: found no {name} in its config ({type(self.config).__name__}), "
                f"expected one, or a class {type(self).__name__} that knows its own sizes"
            )
        return value

    @property
    def feature_size(self) -> int:
        """Channels of a token that the encoder gives, after the feature kind's concatenation."""
        factor = 4 if self.select_feature.startswith("slicefour_") else 1
        return self.config_size("hidden_size") * (5 if self.select_feature.startswith("slice_m25811") else factor)

    @property
    def image_size(self) -> int:
        return self.config_size("image_size")

    @property
    def patch_size(self) -> int:
        """Pixels of a side of a token."""
        return self.config_size("patch_size")

    @property
    def grid_pixels(self) -> tuple[int, int]:
        """Pixels of a side of what the encoder sees at once, and of a token."""
        return self.config_size("image_size"), self.config_size("patch_size")

    @property
    def num_patches_per_side(self) -> int:
        if self.token_compressor is not None:
            return self.token_compressor.output_grid_size
        return self.config_size("image_size") // self.config_size("patch_size")

    @property
    def num_patches(self) -> int:
        return self.num_patches_per_side**2 + ("cls_patch" in self.select_feature)
