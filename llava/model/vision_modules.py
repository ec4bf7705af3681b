"""The parts that make a language model a LLaVA model: vision tower, projector and newline token."""

import torch
import torch.nn as nn

from llava.model.adaptive_patches import PatchChoice
from llava.model.checkpoint import load_projector
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.plain_config import config_values
from llava.model.multimodal_encoder.token_compressor import load_token_compressor
from llava.model.multimodal_encoder.trust import naming
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.vision_change import SAID_OF_TOWER, VISION_KEYS, VisionChange, same_tower
from llava.model.vision_settings import check_parts
from llava.model.visual_merge import MergeRules
from llava.utils import rank0_print


class LlavaMetaModel:
    """Mixin for the base language model (`LlamaModel`, ...): owns tower, projector and newline token."""

    def __init__(self, config):
        super().__init__(config)
        if getattr(config, "mm_vision_tower", None):
            check_parts(config)
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
        self.config.mm_vision_config = config_values(self.vision_tower.config)
        self.config.mm_vision_tower_type = self.vision_tower.recorded_type
        self.config.mm_image_processor_config = self.vision_tower.image_processor.to_dict()

    def initialize_vision_modules(self, model_args, fsdp=None):
        """Give a language model its vision half, or swap the one it has.

        A tower of the checkpoint's own name keeps the checkpoint's weights; any other is loaded from its source.

        Args:
            model_args: attributes as LLaVA-NeXT's ModelArguments; `vision_tower` names the tower,
                `pretrain_mm_mlp_adapter` an `mm_projector.safetensors` or `.bin` to start from.
            fsdp: accepted for LLaVA-NeXT's sake.
        """
        config, had_vision = self.config, self.get_vision_tower() is not None
        before = {key: getattr(config, key, None) for key in (*VISION_KEYS, "mm_hidden_size")} if had_vision else {}
        config.mm_vision_tower = model_args.vision_tower
        folder = getattr(config, "_name_or_path", None)
        other = had_vision and not same_tower(before["mm_vision_tower"], config.mm_vision_tower, folder)
        for key in VISION_KEYS[1:]:
            given = getattr(model_args, key, None)
            if given is not None or (other and key in SAID_OF_TOWER):  # what was said of another says nothing of this
                setattr(config, key, given)
        if hasattr(model_args, "adaptive_patches"):  # nothing is a value of its own: all patches are kept
            given = model_args.adaptive_patches
            config.adaptive_patches = given if PatchChoice.from_mapping(given) else None
        config.use_mm_proj = True
        change = VisionChange.between(before, config, folder)

        if change.new_tower:
            if had_vision:
                rank0_print(f"vision tower: {before['mm_vision_tower']} is replaced by {config.mm_vision_tower}")
            config.mm_vision_config = config.mm_image_processor_config = None  # those of the tower that goes
            with naming(model_args.vision_tower, getattr(model_args, "mm_vision_tower_type", None)):
                self.vision_tower = build_vision_tower(config)
        tower = self.vision_tower
        tower.set_features(config)
        if change.new_size:
            tower.resize(config)
        if not change.new_tower:
            had = None if tower.token_compressor is None else tower.token_compressor.hidden_dim
            if change.new_compressor(tower.feature_size, had):
                tower.set_compression(config)
        tower.set_patch_choice(config)
        tower.load_model()
        if getattr(model_args, "pretrain_token_compressor", None) and tower.token_compressor is not None:
            config.pretrain_token_compressor = model_args.pretrain_token_compressor
            load_token_compressor(tower.token_compressor, model_args.pretrain_token_compressor)
        if change.new_projector(tower.hidden_size):
            self._build_projector()
        elif getattr(self, "image_newline", None) is None:
            self._build_newline()
        self.describe_vision()
        if getattr(model_args, "pretrain_mm_mlp_adapter", None):
            load_projector(self, model_args.pretrain_mm_mlp_adapter)
        # a quantised language model is on its GPU already, and Trainer then moves nothing
        tower.to(self.device)
        self.mm_projector.to(self.device)
