"""Content-adaptive patch sizes (APT, arXiv 2510.18091): large patches where a picture holds little, small elsewhere."""

from llava.model.adaptive_patches.importance import patch_entropy, patch_laplacian, patch_reconstruction_error
from llava.model.adaptive_patches.layout import KeptPatches, kept_patches, pooled_patches
from llava.model.adaptive_patches.selection import (
    select_patches_by_budget,
    select_patches_by_threshold,
    select_patches_by_threshold_v2,
)
from llava.model.adaptive_patches.tokenizer import PatchTokenizer

__all__ = [
    "KeptPatches",
    "PatchTokenizer",
    "kept_patches",
    "patch_entropy",
    "patch_laplacian",
    "patch_reconstruction_error",
    "pooled_patches",
    "select_patches_by_budget",
    "select_patches_by_threshold",
    "select_patches_by_threshold_v2",
]
