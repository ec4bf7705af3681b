"""The language models that a LLaVA model may be built on, one row each.

To add one: write `language_model/llava_NAME.py` and its row here. Nothing heavy is imported until a row is loaded.
"""

import importlib
from typing import NamedTuple

from llava.errors import LlavaError
from llava.model.foreign import refuse_foreign, taken


class LanguageModel(NamedTuple):
    """One row.

    Attributes:
        name: as in the names of its classes, LLaVA-NeXT's: Llava{name}ForCausalLM and Llava{name}Model.
        module: file in `llava.model.language_model`, and the model type of its checkpoints.
        config_class: the class of their config.
        model_type: transformers' type of the plain language model.
        template: conversation template of checkpoints that name none (LLaVA-NeXT's own do not).
        name_parts: parts of a checkpoint's name that speak for it where config.json does not.
    """

    name: str
    module: str
    config_class: str
    model_type: str
    template: str
    name_parts: tuple[str, ...]

    @property
    def architecture(self) -> str:
        return f"Llava{self.name}ForCausalLM"

    @property
    def classes(self) -> tuple[str, str, str]:
        """Names of the model class, of the model without output layer and of the config class."""
        return self.architecture, f"Llava{self.name}Model", self.config_class

    def load(self):
        """(model class, config class)."""
        module = importlib.import_module(f"llava.model.language_model.{self.module}")
        return getattr(module, self.architecture), getattr(module, self.config_class)


# By architecture. Names are looked through in this order, since "llava-v1.6-mistral-7b" has "llava-v1" in it.
LANGUAGE_MODELS = {
    row.architecture: row
    for row in (
        LanguageModel("Qwen3", "llava_qwen3", "LlavaQwen3Config", "qwen3", "qwen_1_5", ("qwen3",)),
        LanguageModel("Qwen", "llava_qwen", "LlavaQwenConfig", "qwen2", "qwen_1_5", ("qwen", "quyen")),
        LanguageModel(
            "Mistral", "llava_mistral", "LlavaMistralConfig", "mistral", "mistral_instruct", ("mistral", "zephyr")
        ),
        LanguageModel(
            "Gemma2", "llava_gemma2", "LlavaGemma2Config", "gemma2", "gemma_instruct", ("gemma-2-", "gemma2")
        ),
        LanguageModel(
            "Llama", "llava_llama", "LlavaConfig", "llama", "v1", ("llama", "vicuna", "yi-", "nous-hermes", "llava-v1")
        ),
    )
}


PLAIN_TYPES = {row.model_type: row for row in LANGUAGE_MODELS.values()}
LLAVA_TYPES = {row.module: row for row in LANGUAGE_MODELS.values()}


def resolve_architecture(config: dict, *names: str | None, path: str | None = None) -> str:
    """The class of a checkpoint: from `architectures`, then `model_type`, then its names.

    `model_type` "llava" (as published for serving) says nothing: transformers has a model of that type of its own.

    Args:
        path: of the checkpoint, for messages; None: the last of the names.

    Raises:
        LlavaError: none of them names a language model of the table; a checkpoint in transformers' own format.
    """
    path = path or next((name for name in reversed(names) if name), "config.json")
    refuse_foreign(config, path)
    for architecture in config.get("architectures") or ():
        if architecture in LANGUAGE_MODELS:
            return architecture
    model_type = config.get("model_type")
    if row := PLAIN_TYPES.get(model_type) or LLAVA_TYPES.get(model_type):
        return row.architecture
    if model_type in (None, "llava"):
        for name in (*names, config.get("_name_or_path")):
            for row in LANGUAGE_MODELS.values():
                if name and any(part in name.lower() for part in row.name_parts):
                    return row.architecture
    raise LlavaError(
        f"{path}: cannot tell the language model: architectures {config.get('architectures')}, model_type "
        f"{model_type!r}; expected {taken()}"
    )


def model_classes(architecture: str):
    """(model class, config class) of a name in `LANGUAGE_MODELS`."""
    return LANGUAGE_MODELS[architecture].load()
