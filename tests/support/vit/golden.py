"""The published HEVC-ViT weights and values of tests/golden/hevc_vit, in any layout, and configs of such encoders."""

import json
from pathlib import Path

from llava.errors import LlavaError
from tests.support.vit import published

GOLDEN = Path(__file__).parents[2] / "golden" / "hevc_vit"
TINY = "hf_llava_vit_tiny_ln"
TINY_SIZE = {
    "patch_size": 16,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 128,
}


def read_json(path) -> dict:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LlavaError(f"{path}: expected a config.json: {error}") from None


def read_model_config(path) -> dict:
    """A config.json whose model the formulas can follow."""
    values = read_json(path)
    known = published.DEFAULTS
    if values.get("model_type") not in known:
        raise LlavaError(f"{path}: model_type: found {values.get('model_type')!r}, expected one of {', '.join(known)}")
    if values.get("hidden_act", "gelu") != "gelu":
        raise LlavaError(
            f"{path}: hidden_act: found {values['hidden_act']!r}, expected 'gelu', which the formulas have"
        )
    return values


def golden_folder(model_type: str) -> Path:
    return GOLDEN / published.GOLDEN_FOLDERS[model_type]


def golden_config(model_type: str) -> dict:
    return read_json(golden_folder(model_type) / "config.json")


def golden_state(model_type: str = "llava_vit") -> dict:
    from safetensors.torch import load_file

    return load_file(golden_folder(model_type) / "model.safetensors")


def source_state() -> dict:
    from llavavit.conversion import convert_state_dict

    return convert_state_dict(golden_state(), "source")


def same(a: dict, b: dict) -> bool:
    """Equal names, dtypes and numbers."""
    import torch

    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)
