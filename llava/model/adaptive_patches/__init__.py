"""Content-adaptive patch sizes (APT, arXiv 2510.18091): large patches where a picture holds little, small elsewhere.

The names below are loaded when they are first used: all but `PatchChoice` need torch.
"""

from importlib import import_module

from llava.config.patch_choice import PatchChoice

_HOMES = {
    "KeptPatches": "layout",
    "PatchTokenizer": "tokenizer",
    "kept_patches": "layout",
    "patch_entropy": "importance",
    "patch_laplacian": "importance",
    "patch_reconstruction_error": "importance",
    "pooled_patches": "layout",
    "select_patches_by_budget": "selection",
    "select_patches_by_threshold": "selection",
    "select_patches_by_threshold_v2": "selection",
}

__all__ = ["PatchChoice", *_HOMES]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
