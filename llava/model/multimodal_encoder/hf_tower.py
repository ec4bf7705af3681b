"""What towers around a `PreTrainedModel` share: finding config, image processor and weights of the encoder."""

from abc import abstractmethod

import torch
from safetensors import SafetensorError

from llava.errors import LlavaError
from llava.model.loading import check_shapes
from llava.model.places import not_there
from llava.utils import rank0_print

from .base import VisionTower
from .hf_backbone import Backbone, quiet_loading
from .published import PUBLISHED


class HFVisionTower(VisionTower):
    """Tower around a transformers vision encoder. A subclass names the three classes, `layers` and `encode`."""

    config_class = model_class = processor_class = None
    drop: tuple[str, ...] = ()

    def read_config(self, args):
        stored = getattr(args, "mm_vision_config", None)
        stored_processor = getattr(args, "mm_image_processor_config", None)
        # a checkpoint carries both, so that it loads where its tower's folder or hub is out of reach
        self.config = self.read_source_config() if stored is None else self.config_class.from_dict(stored)
        if stored_processor is None:
            self.image_processor = self.read_source_processor()
        else:
            self.image_processor = self.processor_class.from_dict(stored_processor)
        self.attn_implementation = self.attention_for(getattr(args, "_attn_implementation", None))
        self.layers()  # a layer that does not exist is refused before any weight is read

    def read_source_config(self):
        """The encoder's config from its folder or hub repository."""
        return self._read(self.config_class, self.vision_tower_name)

    def read_source_processor(self):
        """The image processor from the encoder's folder or hub repository."""
        return self._read(self.processor_class, self.vision_tower_name)

    def attention_for(self, language_model: str | None) -> str | None:
        """The encoder's attention: it follows the language model, whose custom kinds are its alone."""
        return language_model if language_model in ("eager", "sdpa", "flash_attention_2") else None

    def wrap(self, encoder):
        """What becomes `vision_tower`: a module whose weights have the names that checkpoints have."""
        return Backbone(encoder, self.keep_layers, self.drop)

    def build_empty(self):
        self.vision_tower = self.wrap(
            self.model_class._from_config(
                self.config,
                attn_implementation=self.attn_implementation,
                dtype=torch.get_default_dtype(),  # the dtype the model is loaded in, not the one it was saved from
            )
        )

    def _read(self, cls, source):
        try:
            return cls.from_pretrained(source)
        except (OSError, ValueError) as error:
            if source in PUBLISHED:
                return cls.from_dict(PUBLISHED[source][cls is not self.config_class])
            what = "config.json" if cls is self.config_class else "preprocessor_config.json"
            said = f"vision tower {source!r}: no usable {what}"
            raise not_there(source, said, f"a {self.model_class.__name__}'s folder or hub id", error) from None

    def load_model(self, device_map=None):
        if self.is_loaded:
            return
        rank0_print(f"loading vision tower {self.vision_tower_name}")
        with quiet_loading():
            try:
                encoder, report = self.model_class.from_pretrained(
                    self.vision_tower_name,
                    config=self.config,
                    device_map=None if device_map == "auto" else device_map,
                    attn_implementation=self.attn_implementation,
                    key_mapping=self.key_mapping(),
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                )
            except (OSError, SafetensorError) as error:
                said, kind = f"vision tower {self.vision_tower_name!r}: no weights found", self.model_class.__name__
                raise not_there(self.vision_tower_name, said, f"those of a {kind}", error) from None
        check_shapes(report["mismatched_keys"], f"vision tower {self.vision_tower_name!r}")
        missing = sorted(name for name in report["missing_keys"] if not name.startswith(self.not_needed))
        if missing:
            raise LlavaError(
                f"vision tower {self.vision_tower_name!r}: its weights lack {len(missing)} of "
                f"{self.model_class.__name__}'s, such as {missing[0]}; expected an encoder of this type"
            )
        self.vision_tower = self.wrap(encoder)
        self.vision_tower.requires_grad_(False)
        self.is_loaded = True

    def key_mapping(self) -> dict[str, str] | None:
        """Patterns in the names of the source's weights, and what stands there in the encoder's; as transformers'."""

    @property
    def not_needed(self) -> tuple[str, ...]:
        """Beginnings of names of weights that a source may lack."""
        return self.drop

    @property
    def keep_layers(self) -> int:
        return self.config.num_hidden_layers

    @abstractmethod
    def layers(self) -> list[int]:
        """Indices of the hidden states that are used."""

    def reset_buffers(self):
        super().reset_buffers()
        if hasattr(self.vision_tower, "reset_buffers"):
            self.vision_tower.reset_buffers()

    def unused_modules(self):
        """Modules that never get a gradient."""
        yield from self.vision_tower.unused(self.layers())
