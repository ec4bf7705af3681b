"""LLaVA's models; the classes are imported when they are first asked for."""

import importlib

_MODULES = {"llava_llama": "Llama", "llava_mistral": "Mistral", "llava_qwen": "Qwen", "llava_qwen3": "Qwen3"}
_CLASSES = {
    f"Llava{name}{kind}": module
    for module, name in _MODULES.items()
    for kind in ("ForCausalLM", "Model", "Config")
    if (name, kind) != ("Llama", "Config")
} | {"LlavaConfig": "llava_llama"}

__all__ = sorted(_CLASSES)


def __getattr__(name: str):
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"llava.model.language_model.{_CLASSES[name]}"), name)
