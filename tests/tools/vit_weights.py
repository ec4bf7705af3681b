"""Small HEVC-ViT weights for tests: the published ones of tests/golden/hevc_vit, in any layout."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from llavavit.conversion import convert_state_dict

GOLDEN = Path(__file__).parents[1] / "golden" / "hevc_vit"
FOLDERS = {
    "llava_vit": GOLDEN / "llava_vit_tiny",
    "llava_vit_packing": GOLDEN / "llava_vit_packing_tiny",
    "onevision_encoder": GOLDEN / "onevision_encoder_tiny",
}
TINY = "hf_llava_vit_tiny_ln"
TINY_SIZE = {
    "patch_size": 16,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 128,
}


def golden_state(model_type: str = "llava_vit") -> dict:
    return load_file(FOLDERS[model_type] / "model.safetensors")


def source_state() -> dict:
    return convert_state_dict(golden_state(), "source")


def same(a: dict, b: dict) -> bool:
    """Equal names, dtypes and numbers."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)
