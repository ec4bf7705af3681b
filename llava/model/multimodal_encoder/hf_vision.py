"""Any vision backbone of transformers as a tower: its own forward, its hidden states, told by `model_type`.

The encoder is the stock model, whole and under its own weight names. What differs between types stands in `FACTS`.
"""

import copy
import re

import torch
import torch.nn as nn
from transformers import CLIPImageProcessorPil
from transformers.initialization import no_init_weights

from llava.errors import LlavaError
from llava.model.places import not_there
from llava.model.vision_blocks import stage_blocks

from .base import FixedGrid, PatchGrid, select_layers
from .hf_facts import FACTS, PACKED, Facts, side_of
from .hf_pixels import processor_class, read_processor
from .hf_refusals import no_tower
from .hf_states import as_tokens, hidden_states
from .hf_tower import HFVisionTower

__all__ = ["FACTS", "Facts", "HFVisionBackboneTower"]

# DINOv3 moves its positions at random in training mode, which a frozen encoder is in too
_AUGMENTATIONS = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")
RUN = "llava_tower"  # where the encoder's config holds what a run chose, so that a checkpoint says it by itself


class HFVisionBackboneTower(HFVisionTower):
    sets_sizes = True
    processor_class = CLIPImageProcessorPil  # until the type is known

    # --- config and pixels ---

    def read_config(self, args):
        stored = getattr(args, "mm_vision_config", None)
        values = self.source_values() if stored is None else stored
        self.model_type = values.get("model_type")
        self.facts = self.facts_of(values)
        self.processor_class = processor_class(self.facts)
        self.config_class, self.model_class = self.classes()
        self.config = self.config_class.from_dict(values.get("vision_config") or values)
        self.drop_nothing()
        self.set_sizes(args)
        stored_processor = getattr(args, "mm_image_processor_config", None)
        if stored_processor is None:
            self.image_processor = self.read_source_processor()
        else:
            self.image_processor = self.processor_class.from_dict(stored_processor)
        self.attn_implementation = self.attention_for(getattr(args, "_attn_implementation", None))
        self.layers()  # a layer that does not exist is refused before any weight is read

    def source_values(self) -> dict:
        """config.json of the encoder's folder or hub repository."""
        from transformers import PretrainedConfig

        try:
            return PretrainedConfig.get_config_dict(self.vision_tower_name)[0]
        except (OSError, ValueError) as error:
            said = f"vision tower {self.vision_tower_name!r}: no usable config.json"
            raise not_there(self.vision_tower_name, said, "the folder or hub id of a vision encoder", error) from None

    def facts_of(self, values: dict) -> Facts:
        """The row of a config's type.

        Raises:
            LlavaError: a type that there is no row for; one that runs code of its own repository.
        """
        if self.model_type not in FACTS:
            raise no_tower(self.vision_tower_name, values)
        if self.model_type in PACKED:
            raise LlavaError(
                f"mm_vision_tower_type: found hf_vision for the model_type {self.model_type!r}, expected packed_vision"
            )
        return FACTS[self.model_type]

    def classes(self):
        """(config class, model class) of this type.

        Raises:
            LlavaError: the installed transformers has no such model.
        """
        import transformers

        found = [getattr(transformers, self.facts.name + end, None) for end in ("Config", "Model")]
        if None in found:
            raise LlavaError(
                f"vision tower {self.vision_tower_name!r}: model_type {self.model_type!r} is not in the installed "
                f"transformers {transformers.__version__}, expected a version with {self.facts.name}Model"
            )
        return found

    def drop_nothing(self) -> None:
        """Turn dropout and stochastic depth off: a frozen encoder is in training mode too."""
        for name, value in list(vars(self.config).items()):
            if "drop" in name and isinstance(value, (int, float)):
                setattr(self.config, name, 0.0)
            elif "drop" in name and isinstance(value, (list, tuple)):
                setattr(self.config, name, [0.0] * len(value))

    def set_sizes(self, args) -> None:
        """Set `side`, `patch`, `stage`: pixels of a picture and of a token, and the stage of a feature map.

        Raises:
            LlavaError: a size or stage that this encoder cannot take.
        """
        config, facts = self.config, self.facts
        chosen = getattr(config, RUN, None) or {}
        if hasattr(config, "mask_ratio"):
            config.mask_ratio = 0.0  # ViT-MAE masks in evaluation too
        for name in _AUGMENTATIONS:
            if getattr(config, name, None) is not None:
                setattr(config, name, None)
        self.stage = getattr(args, "vision_tower_stage", None) or chosen.get("stage")
        self.patch, strides = facts.patch_of(config), facts.stage_strides(config)
        if strides:
            self.stage = len(strides) if self.stage is None else self.stage
            if not 1 <= self.stage <= len(strides):
                raise LlavaError(f"vision_tower_stage: found {self.stage}, expected 1 to {len(strides)}")
            self.patch = strides[self.stage - 1]
        elif self.stage is not None:
            raise LlavaError(
                f"vision_tower_stage: found {self.stage}, but {self.model_type} has no stages; expected none"
            )
        own = self.own_side()
        self.side = getattr(args, "image_size", None) or chosen.get("image_size") or own
        movable = facts.interpolates in ("always", "asked") or getattr(config, "is_native", False)
        if self.side != own and not movable:
            raise LlavaError(
                f"image_size: found {self.side}, expected {own}: positions of this {self.model_type} do not interpolate"
            )
        if self.side < 1 or self.side % self.patch:
            raise LlavaError(
                f"image_size: found {self.side}, expected a multiple of {self.patch} (the pixels of a token of "
                f"{self.model_type})"
            )
        window = getattr(config, "window_size", 0) if facts.name == "Swin" else 0
        if window and self.side < window * strides[-1]:  # its windows do not shrink with the map
            raise LlavaError(
                f"image_size: found {self.side}, expected {window * strides[-1]} or more: the last stage of this "
                f"{self.model_type} has windows of {window} tokens"
            )
        if self.cls_patch and facts.prefix(config)[0] > 1:
            raise LlavaError(
                f"mm_vision_select_feature cls_patch: {self.model_type} has {facts.prefix(config)[0]} class tokens, "
                "expected one; use patch"
            )
        setattr(config, RUN, {"image_size": self.side, "stage": self.stage})

    def resize(self, args):
        self.set_sizes(args)
        square, size = {"height": self.side, "width": self.side}, self.image_processor.size
        values = self.image_processor.to_dict() | {"crop_size": square}
        values["size"] = square if size.get("height") else {"shortest_edge": self.side}
        self.image_processor = self.processor_class.from_dict(values)

    def own_side(self) -> int:
        """The pixels of a side that the encoder was made for."""
        return side_of(getattr(self.config, self.facts.size, None) or self.facts.side)

    def read_source_processor(self):
        return read_processor(self.vision_tower_name, self.facts, self.side)

    # --- weights ---

    def key_mapping(self):
        """The weights of a vision half are read out of the whole model's."""
        prefix = self.facts.weight_prefix
        mapping = {rf"^(model\.)?{re.escape(prefix)}": ""} if prefix else {}
        if self.facts.blocks == "encoder.layers":  # transformers writes AltCLIP's as it reads its text half's
            mapping[r"encoder\.layer\."] = "encoder.layers."
        return mapping or None

    @property
    def not_needed(self):
        return self.facts.unused

    def attention_for(self, language_model):
        """As the language model's, where this type knows it: convolutions have none."""
        known = {"sdpa": self.model_class._supports_sdpa, "flash_attention_2": self.model_class._supports_flash_attn}
        found = super().attention_for(language_model)
        return found if known.get(found, True) else None

    def wrap(self, encoder):
        if hasattr(encoder, "use_head"):
            encoder.use_head = False  # what it makes of all tokens is not asked for; its weights stay
        return encoder

    def reset_buffers(self):
        """Buffers that no checkpoint holds (positions, rotary frequencies), from a model of one block."""
        super().reset_buffers()
        saved = set(self.vision_tower.state_dict())
        lacking = {name: buffer for name, buffer in self.vision_tower.named_buffers() if name not in saved}
        if not lacking:
            return
        small = copy.deepcopy(self.config)
        small.num_hidden_layers = 1
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), no_init_weights():
            fresh = dict(self.model_class(small).named_buffers())
            if not lacking.keys() <= fresh.keys():  # blocks have some of their own
                fresh = dict(self.model_class(self.config).named_buffers())
        for name, buffer in lacking.items():
            with torch.no_grad():
                buffer.copy_(fresh[name])

    def unused_modules(self):
        """Modules that never get a gradient: what follows the last state that is used, heads, mask tokens."""
        last, encoder = max(self.layers()), self.vision_tower
        blocks = encoder.get_submodule(self.facts.blocks)
        yield from blocks[last:]
        if self.facts.hidden_states == "before_merging" and blocks[last - 1].downsample is not None:
            yield blocks[last - 1].downsample
        norm = self.facts.final_norm
        if norm and not (self.facts.hidden_states == "normed" and last == len(blocks)):
            yield encoder.get_submodule(norm)
        for name in self.facts.unused:
            owner, _, leaf = name.rpartition(".")
            part = getattr(encoder.get_submodule(owner), leaf, None)
            if part is not None:
                yield nn.ParameterList([part]) if isinstance(part, nn.Parameter) else part

    def train(self, mode: bool = True):
        """As `nn.Module`; batch norms keep the statistics of the encoder's own training, which batches here would
        overwrite, frozen or not."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def blocks(self):
        """As `VisionTower`; of an encoder of stages the blocks of one after the other, up to the stage that is used."""
        if not self.facts.strides:
            return super().blocks()
        stages = self.vision_tower.get_submodule(self.facts.blocks)[: self.stage]
        return [block for stage in stages for block in stage_blocks(stage)]

    # --- features ---

    @property
    def cls_patch(self) -> bool:
        return "cls_patch" in self.select_feature

    @property
    def with_cls(self) -> bool:
        """Whether a class token is among the features."""
        return self.cls_patch and self.facts.prefix(self.config)[0] == 1

    def layers(self):
        if self.facts.strides:
            if self.select_feature.startswith("slice"):
                raise LlavaError(
                    f"mm_vision_select_feature: found {self.select_feature!r}, but {self.model_type} has one feature "
                    "map, that of vision_tower_stage; expected patch"
                )
            return [self.stage]
        return select_layers(self.select_feature, self.select_layer, self.config.num_hidden_layers + 1)

    def encode(self, images):
        self.check_pixels(images)
        kind = self.facts.hidden_states
        states = hidden_states(self.vision_tower, kind, self.inputs(images))
        features = torch.cat([as_tokens(states[i], kind) for i in self.layers()], dim=-1)
        cls, registers = self.facts.prefix(self.config)
        patches = features[:, cls + registers :]
        return torch.cat([features[:, :1], patches], dim=1) if self.with_cls else patches

    def check_pixels(self, images) -> None:
        height, width = images.shape[-2:]
        if self.any_size and (height % self.patch or width % self.patch):
            raise LlavaError(f"the vision tower takes images in multiples of {self.patch} pixels, got {height, width}")
        if not self.any_size and (height, width) != (self.side, self.side):
            raise LlavaError(
                f"the vision tower takes images of {self.side}x{self.side} pixels, got {height, width}; "
                "check the image processor's size"
            )

    def inputs(self, images) -> dict:
        """The stock forward's arguments for [B, C, H, W]."""
        h, w = images.shape[-2] // self.patch, images.shape[-1] // self.patch
        if self.facts.name == "VJEPA2":  # a clip of one picture, as long as what it makes one token of
            clip = images[:, None].expand(-1, self.config.tubelet_size, -1, -1, -1)
            return {"pixel_values_videos": clip, "skip_predictor": True}
        found = {"pixel_values": images}
        if self.facts.interpolates == "asked":
            found["interpolate_pos_encoding"] = True
        if self.facts.name == "ViTMAE":  # its shuffle, made the identity
            found["noise"] = torch.arange(h * w, device=images.device).expand(len(images), -1)
        return found

    # --- what the model asks ---

    @property
    def any_size(self) -> bool:
        """A class token has no place among rows of any length."""
        return self.facts.any_size and not self.with_cls

    @property
    def token_grid(self):
        if self.any_size:
            compressor = self.token_compressor
            sides = compressor and (compressor.input_grid_size, compressor.output_grid_size)
            return PatchGrid(self.patch, sides)
        return FixedGrid(self.num_patches_per_side, self.with_cls)

    def grids(self, height, width):
        return [(height // self.patch, width // self.patch)]

    @property
    def feature_size(self):
        return self.facts.stage_width(self.config, self.stage) if self.facts.strides else super().feature_size

    @property
    def image_size(self):
        return self.side

    @property
    def patch_size(self):
        return self.patch

    @property
    def grid_pixels(self):
        return self.side, self.patch

    @property
    def num_patches_per_side(self):
        return self.side // self.patch if self.token_compressor is None else self.token_compressor.output_grid_size

    @property
    def num_patches(self):
        return self.num_patches_per_side**2 + self.with_cls
