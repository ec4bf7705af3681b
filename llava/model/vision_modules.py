"""The parts that make a language model a LLaVA model: vision tower, projector and newline token."""

import os

import torch
import torch.nn as nn

from llava.model.adaptive_patches import PatchChoice
from llava.model.checkpoint import load_projector
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.token_compressor import load_token_compressor
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.vision_settings import check_combination
from llava.model.visual_merge import MergeRules
from llava.utils import rank0_print

# config keys that describe the vision side; `initialize_vision_modules` copies them from the run's arguments
VISION_KEYS = (
    "mm_vision_tower",
    "mm_vision_tower_type",
    "mm_vision_select_layer",
    "mm_vision_select_feature",
    "mm_patch_merge_type",
    "mm_projector_type",
    "s2",
    "s2_scales",
    "use_token_compression",
    "compression_input_size",
    "compression_output_size",
    "adaptive_patches",
)
COMPRESSION_KEYS = {"use_token_compression", "compression_input_size", "compression_output_size"}


class LlavaMetaModel:
    """Mixin for the base language model (`LlamaModel`, ...): owns tower, projector and newline token."""

    def __init__(self, config):
        super().__init__(config)
        if getattr(config, "mm_vision_tower", None):
            check_combination(config)
            # Weights come from the checkpoint; `from_pretrained` fetches the tower's own where the checkpoint has none.
            self.vision_tower = build_vision_tower(config, delay_load=True)
            self._no_split_modules = set(self._no_split_modules) | self.vision_tower.no_split_modules
            self._build_projector()

    def get_vision_tower(self):
        return getattr(self, "vision_tower", None)

    def _build_projector(self):
        self.config.mm_hidden_size = self.vision_tower.hidden_size
        # From the run's seed alone: how much randomness the rest took differs between ZeRO stages.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.initial_seed())
            self.mm_projector = build_vision_projector(self.config)
            self._build_newline()

    def _build_newline(self):
        if MergeRules.from_config(self.config).unpad:
            empty = torch.empty(self.config.hidden_size, dtype=self.dtype, device=self.device)
            self.image_newline = nn.Parameter(empty)
            self.reset_newline()

    def reset_newline(self):
        with torch.no_grad():
            self.image_newline.normal_(std=self.config.hidden_size**-0.5)

    def describe_vision(self):
        """Put what is needed to rebuild the tower offline into the config that is saved."""
        self.config.mm_vision_config = self.vision_tower.config.to_dict()
        self.config.mm_image_processor_config = self.vision_tower.image_processor.to_dict()

    def initialize_vision_modules(self, model_args, fsdp=None):
        """Give a language model its vision half, or swap the one it has.

        A tower of the checkpoint's own name keeps the checkpoint's weights; any other is loaded from its source.

        Args:
            model_args: attributes as LLaVA-NeXT's ModelArguments; `vision_tower` names the tower,
                `pretrain_mm_mlp_adapter` an `mm_projector.safetensors` or `.bin` to start from.
            fsdp: accepted for LLaVA-NeXT's sake.
        """
        config = self.config
        before = {key: getattr(config, key, None) or None for key in VISION_KEYS}
        config.mm_vision_tower = model_args.vision_tower
        for key in VISION_KEYS[1:]:
            if getattr(model_args, key, None) is not None:
                setattr(config, key, getattr(model_args, key))
        if hasattr(model_args, "adaptive_patches"):  # nothing is a value of its own: all patches are kept
            given = model_args.adaptive_patches
            config.adaptive_patches = given if PatchChoice.from_mapping(given) else None
        config.use_mm_proj = True
        changed = {key for key in VISION_KEYS if (getattr(config, key, None) or None) != before[key]}
        if same_folder(config.mm_vision_tower, before["mm_vision_tower"]):
            changed.discard("mm_vision_tower")

        if self.get_vision_tower() is None or changed & {"mm_vision_tower", "mm_vision_tower_type", "s2", "s2_scales"}:
            if self.get_vision_tower() is not None:
                rank0_print(f"vision tower: {before['mm_vision_tower']} is replaced by {config.mm_vision_tower}")
            config.mm_vision_config = config.mm_image_processor_config = None  # those of the tower that goes
            self.vision_tower = build_vision_tower(config)
        self.vision_tower.set_features(config)
        compressor = self.vision_tower.token_compressor
        if changed & COMPRESSION_KEYS or (compressor and compressor.hidden_dim != self.vision_tower.feature_size):
            self.vision_tower.set_compression(config)
        self.vision_tower.set_patch_choice(config)
        self.vision_tower.load_model()
        if getattr(model_args, "pretrain_token_compressor", None) and self.vision_tower.token_compressor is not None:
            config.pretrain_token_compressor = model_args.pretrain_token_compressor
            load_token_compressor(self.vision_tower.token_compressor, model_args.pretrain_token_compressor)
        if (
            getattr(self, "mm_projector", None) is None
            or self.vision_tower.hidden_size != config.mm_hidden_size
            or "mm_projector_type" in changed
        ):
            self._build_projector()
        elif getattr(self, "image_newline", None) is None:
            self._build_newline()
        self.describe_vision()
        if getattr(model_args, "pretrain_mm_mlp_adapter", None):
            load_projector(self, model_args.pretrain_mm_mlp_adapter)
        # a quantised language model is on its GPU already, and Trainer then moves nothing
        self.vision_tower.to(self.device)
        self.mm_projector.to(self.device)


def same_folder(a, b) -> bool:
    """Two spellings of one existing folder."""
    return bool(a and b) and os.path.isdir(a) and os.path.realpath(a) == os.path.realpath(b)
