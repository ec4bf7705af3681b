"""Any encoder of timm as a tower: timm's own model, whole, under its own weight names.

Features come by timm's `forward_intermediates`, before the final norm, as hidden states of other towers do. An encoder
whose maps are all of one size is a sequence of blocks, of which `mm_vision_select_layer` picks; one whose maps shrink
is hierarchical, and `vision_tower_stage` picks the map.

Pixels are those of timm's data config, at exactly the encoder's size. Its `crop_pct` is dropped: the margin that is
resized to and then cut off belongs to classification, and would cut text off at a picture's edges.

Shapes: B images, h x w tokens row by row, D channels, n blocks.
"""

import torch
import torch.nn as nn

from llava.config.own_tower import INTERPOLATIONS
from llava.errors import LlavaError
from llava.model.vision_blocks import find_blocks
from llava.utils import rank0_print

from .base import FixedGrid, PatchGrid, VisionTower, select_layers
from .plain_config import PlainConfig
from .timm_facts import intermediates, measure
from .timm_source import check_args, find_source, missing_weights, quiet, require_timm


class TimmTower(VisionTower):
    """`tower_args` go to `timm.create_model`; `vision_tower_weights`, a .safetensors file, replaces the published
    weights. Read from `args`, as is `image_size`."""

    sets_sizes = True
    gradient_checkpointing = False  # set by transformers, on every module that has it

    # --- config and pixels ---

    def read_config(self, args):
        require_timm(self.vision_tower_name)  # first: a torchvision that does not work breaks transformers too
        from transformers import CLIPImageProcessorPil

        self.tower_args = dict(getattr(args, "tower_args", None) or {})
        self.weights_file = getattr(args, "vision_tower_weights", None)
        self.eager = getattr(args, "_attn_implementation", None) == "eager"
        check_args(self.tower_args)
        stored = getattr(args, "mm_vision_config", None)
        self.config = self.found_config(args) if stored is None else PlainConfig(stored)
        self.layers()  # a layer that does not exist is refused before any weight is read
        if self.cls_patch and self.config.prefix_tokens[0] > 1:
            raise LlavaError(
                f"mm_vision_select_feature cls_patch: {self.vision_tower_name} has {self.config.prefix_tokens[0]} "
                "class tokens, expected one; use patch"
            )
        stored_processor = getattr(args, "mm_image_processor_config", None)
        if stored_processor is None:
            self.image_processor = self.data_processor()
        else:
            self.image_processor = CLIPImageProcessorPil.from_dict(stored_processor)

    def found_config(self, args) -> PlainConfig:
        """From the source, where no checkpoint has it."""
        source = find_source(self.vision_tower_name)
        stage, side = getattr(args, "vision_tower_stage", None), getattr(args, "image_size", None)
        found = measure(source, self.tower_args, side, stage)
        if not found.pop("has_weights") and not self.weights_file:
            raise LlavaError(
                f"vision tower {source.tower!r}: timm publishes no weights of it, expected a name that has some, or "
                "vision_tower_weights"
            )
        return found

    def data_processor(self):
        """Pillow processor by timm's data config.

        Raises:
            LlavaError: an interpolation that Pillow does not have.
        """
        from transformers import CLIPImageProcessorPil

        data, side = self.config.data, self.config.image_size
        square = {"height": side, "width": side}
        cropped = data["crop_mode"] == "center"  # else the whole picture is squashed to the square
        kind = "bicubic" if data["interpolation"] == "random" else data["interpolation"]
        if kind not in INTERPOLATIONS:
            raise LlavaError(
                f"vision tower {self.vision_tower_name!r}: its data config has the interpolation {kind!r}, expected "
                f"one of {', '.join(INTERPOLATIONS)}"
            )
        return CLIPImageProcessorPil(
            size={"shortest_edge": side} if cropped else square,
            crop_size=square,
            do_center_crop=cropped,
            resample=INTERPOLATIONS[kind],
            image_mean=list(data["mean"]),
            image_std=list(data["std"]),
        )

    # --- weights ---

    def build_empty(self):
        import timm

        config = self.config
        with quiet():
            made = timm.create_model(
                config.architecture,
                pretrained_cfg=dict(config.pretrained_cfg),
                num_classes=0,
                **_hashable(config.args),
            )
        self.take(made)

    def load_model(self, device_map=None):
        if self.is_loaded:
            return
        source = find_source(self.vision_tower_name)
        rank0_print(f"loading vision tower {self.weights_file or self.vision_tower_name}")
        overlay = None
        if self.weights_file:
            if not self.weights_file.endswith(".safetensors"):
                raise LlavaError(f"vision_tower_weights: found {self.weights_file}, expected a .safetensors file")
            overlay = {"file": self.weights_file, "source": ""}
        args = dict(self.tower_args)
        if "img_size" in self.config.args:
            args["img_size"] = tuple(self.config.args["img_size"])
        try:
            with missing_weights() as missing:
                encoder = source.create(args, pretrained=True, pretrained_cfg_overlay=overlay)
        except LlavaError:
            raise
        except Exception as error:  # of the hub, the network, a file, or weights of other shapes
            said = " ".join(str(error).split())[:240]
            raise LlavaError(
                f"vision tower {self.vision_tower_name!r}: its weights do not load ({type(error).__name__}: {said})"
            ) from None
        self.take(encoder)
        self.check_missing(missing)
        self.vision_tower.requires_grad_(False)
        self.is_loaded = True

    def take(self, encoder: nn.Module) -> None:
        self.vision_tower = encoder
        for module in encoder.modules():
            if self.eager and hasattr(module, "fused_attn"):
                module.fused_attn = False
        self.train(self.training)

    def check_missing(self, missing: list[str]) -> None:
        """Refuse weights that lack some that the features need; a head that they do not may be any."""
        if not missing:
            return
        unused = {id(parameter) for module in self.unused_modules() for parameter in module.parameters()}
        named = dict(self.vision_tower.named_parameters())
        lacking = [name for name in missing if name in named and id(named[name]) not in unused]
        if lacking:
            raise LlavaError(
                f"vision tower {self.vision_tower_name!r}: its weights lack {len(lacking)} of "
                f"{self.config.architecture}'s, such as {lacking[0]}"
            )

    def reset_buffers(self):
        super().reset_buffers()
        for module in self.vision_tower.modules():
            if hasattr(module, "init_non_persistent_buffers"):  # timm's name for just this
                module.init_non_persistent_buffers()

    def train(self, mode: bool = True):
        """As `nn.Module.train`; batch norms keep the statistics that they came with, which a frozen encoder must not
        change, and which few crops on each of many devices would spoil."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def blocks(self):
        """The blocks that the features come through; of a hierarchical encoder those of all of its stages, in a row."""
        found = []
        if self.config.stage is not None:
            parts = dict(self.vision_tower.named_modules())
            names = [each["module"] for each in self.vision_tower.feature_info[: self.config.stage]]
            found = [block for name in names if name in parts for block in find_blocks(parts[name])]
        return found or super().blocks()

    @property
    def no_split_modules(self):
        return {type(self).__name__, *(type(block).__name__ for block in find_blocks(self.vision_tower))}

    # --- features ---

    @property
    def cls_patch(self) -> bool:
        return "cls_patch" in self.select_feature

    @property
    def with_cls(self) -> bool:
        """Whether a class token is among the features."""
        return self.cls_patch and self.config.stage is None and self.config.prefix_tokens[0] == 1

    def layers(self) -> list[int]:
        """The maps that are used, as `forward_intermediates` counts them: block i gives hidden state i + 1."""
        if self.config.stage is not None:
            return [self.config.stage - 1]
        states = self.config.num_hidden_layers + 1
        found = select_layers(self.select_feature, self.select_layer, states)
        if 0 in found:
            raise LlavaError(
                f"mm_vision_select_layer: found {self.select_layer} with mm_vision_select_feature "
                f"{self.select_feature}, the embeddings before the first block, which timm does not give; expected "
                f"layers of 1 to {states - 1} (or -{states - 1} to -1)"
            )
        return [i - 1 for i in found]

    def encode(self, images):
        self.check_pixels(images)
        self.set_checkpointing(self.gradient_checkpointing and self.training and torch.is_grad_enabled())
        picked = self.layers()
        states = intermediates(self.vision_tower, images, sorted(set(picked)), prefix=self.with_cls)
        by_layer = dict(zip(sorted(set(picked)), states, strict=True))
        tokens = []
        for layer in picked:
            features, prefix = by_layer[layer]
            features = features.flatten(2).transpose(1, 2)  # [B, D, h, w] -> [B, h * w, D]
            tokens.append(torch.cat([prefix[:, :1], features], dim=1) if self.with_cls else features)
        return torch.cat(tokens, dim=-1)

    def set_checkpointing(self, on: bool) -> None:
        """By timm's own way, whose recomputation is the non-reentrant one."""
        if on == getattr(self, "_checkpointing", False):
            return
        try:
            self.vision_tower.set_grad_checkpointing(on)
            self._checkpointing = on
        except (AssertionError, AttributeError):
            rank0_print(f"vision tower {self.vision_tower_name}: has no gradient checkpointing and goes on without")
            self.gradient_checkpointing = False

    def check_pixels(self, images) -> None:
        height, width = images.shape[-2:]
        side, patch = self.config.image_size, self.config.patch_size
        if self.any_size and (height % patch or width % patch):
            raise LlavaError(f"the vision tower takes images in multiples of {patch} pixels, got {height, width}")
        if not self.any_size and (height, width) != (side, side):
            raise LlavaError(
                f"the vision tower takes images of {side}x{side} pixels, got {height, width}; check the image "
                "processor's size"
            )

    # --- what the model asks ---

    @property
    def any_size(self) -> bool:
        """Where timm's `dynamic_img_size` is on, by the model itself or by `tower_args`; a class token has no place
        among rows of any length."""
        return self.config.any_size and not self.with_cls

    @property
    def token_grid(self):
        if self.any_size:
            compressor = self.token_compressor
            return PatchGrid(
                self.config.patch_size, compressor and (compressor.input_grid_size, compressor.output_grid_size)
            )
        return FixedGrid(self.num_patches_per_side, self.with_cls)

    @property
    def num_patches(self):
        return self.num_patches_per_side**2 + self.with_cls


def _hashable(args: dict) -> dict:
    """From JSON: sizes as the tuples that they were."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in args.items()}
