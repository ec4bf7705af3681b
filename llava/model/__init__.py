"""LLaVA's models; the classes are imported when they are first asked for."""

import importlib

from llava.absent import absent
from llava.model.families import LANGUAGE_MODELS

_MODULES = {name: row.module for row in LANGUAGE_MODELS.values() for name in row.classes}
# of LLaVA's and LLaVA-NeXT's own, those whose language model has no row in the table
ABSENT = {
    f"Llava{name}{end}": f"llava_{module}"
    for name, module in {"Mixtral": "mixtral", "Mpt": "mpt", "Gemma": "gemma", "QwenMoe": "qwen_moe"}.items()
    for end in ("ForCausalLM", "Config", "Model")
}

__all__ = sorted(_MODULES)


def absent_model(name: str) -> type:
    """What stands in for one of `ABSENT`."""
    known = ", ".join(LANGUAGE_MODELS)
    return absent(f"llava.model.language_model.{ABSENT[name]}.{name}", f"the language models here are those of {known}")


def __getattr__(name: str):
    if name in ABSENT:
        return absent_model(name)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"llava.model.language_model.{_MODULES[name]}"), name)
