"""LLaVA's models; the classes are imported when they are first asked for."""

import importlib

from llava.model.families import LANGUAGE_MODELS

_MODULES = {name: row.module for row in LANGUAGE_MODELS.values() for name in row.classes}

__all__ = sorted(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"llava.model.language_model.{_MODULES[name]}"), name)
