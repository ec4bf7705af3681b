"""What the CLIP and SigLIP towers share: finding config, image processor and weights of a transformers encoder."""

import os
from abc import abstractmethod

from llava.errors import LlavaError
from llava.utils import rank0_print

from .base import VisionTower
from .hf_backbone import Backbone, quiet_loading
from .published import PUBLISHED


class HFVisionTower(VisionTower):
    """Tower around a transformers vision encoder. A subclass names the three classes, `layers` and `encode`."""

    config_class = model_class = processor_class = None
    drop: tuple[str, ...] = ()

    def read_config(self, args):
        source = self.vision_tower_name
        stored = getattr(args, "mm_vision_config", None)
        stored_processor = getattr(args, "mm_image_processor_config", None)
        # a checkpoint carries both, so that it loads where its tower's folder or hub is out of reach
        self.config = self._read(self.config_class, source) if stored is None else self.config_class.from_dict(stored)
        if stored_processor is None:
            self.image_processor = self._read(self.processor_class, source)
        else:
            self.image_processor = self.processor_class.from_dict(stored_processor)
        # in a model of its own choice of attention the tower follows; custom kinds are the language model's alone
        attention = getattr(args, "_attn_implementation", None)
        self.attn_implementation = attention if attention in ("eager", "sdpa", "flash_attention_2") else None
        self.layers()  # a layer that does not exist is refused before any weight is read

    def build_empty(self):
        encoder = self.model_class._from_config(self.config, attn_implementation=self.attn_implementation)
        self.vision_tower = Backbone(encoder, self.keep_layers, self.drop)

    def _read(self, cls, source):
        try:
            return cls.from_pretrained(source)
        except (OSError, ValueError) as error:
            if source in PUBLISHED:
                return cls.from_dict(PUBLISHED[source][cls is not self.config_class])
            place = "the folder" if os.path.isdir(source) else "the hub or its cache"
            what = "config.json" if cls is self.config_class else "preprocessor_config.json"
            raise LlavaError(
                f"vision tower {source!r}: no usable {what} in {place} ({str(error).splitlines()[0][:160]})"
            ) from None

    def load_model(self, device_map=None):
        if self.is_loaded:
            return
        rank0_print(f"loading vision tower {self.vision_tower_name}")
        with quiet_loading():
            try:
                encoder = self.model_class.from_pretrained(
                    self.vision_tower_name,
                    config=self.config,
                    device_map=None if device_map == "auto" else device_map,
                    attn_implementation=self.attn_implementation,
                )
            except OSError as error:
                raise LlavaError(
                    f"vision tower {self.vision_tower_name!r}: no weights found ({str(error).splitlines()[0][:160]})"
                ) from None
        self.vision_tower = Backbone(encoder, self.keep_layers, self.drop)
        self.vision_tower.requires_grad_(False)
        self.is_loaded = True

    @property
    def keep_layers(self) -> int:
        return self.config.num_hidden_layers

    @abstractmethod
    def layers(self) -> list[int]:
        """Indices of the hidden states that are used."""

    def reset_buffers(self):
        self.vision_tower.reset_buffers()

    def unused_modules(self):
        """Modules that never get a gradient."""
        yield from self.vision_tower.unused(self.layers())
