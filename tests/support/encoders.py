"""A tiny random checkpoint of every type of encoder that the tower of transformers' backbones takes, made on the spot.

A new type of `FACTS` joins the tests by one row of `KINDS` in tests/model/hf_encoders.py.
"""

from pathlib import Path

import torch

from llava.model.multimodal_encoder.hf_facts import FACTS
from tests.model import hf_encoders
from tests.model.hf_encoders import FIXED, WHOLE, prefix, stock
from tests.model.hf_encoders import names as classes
from tests.model.hf_encoders import own_states as states

KINDS, MAPS = hf_encoders.KINDS, hf_encoders.MAPS

__all__ = ["FIXED", "KINDS", "MAPS", "WHOLE", "classes", "folder", "inputs", "prefix", "states", "stock"]


def folder(path: Path, kind: str, **changes) -> str:
    """Folder of a stock model, as published ones without an image processor are."""
    stock(kind, **changes).save_pretrained(path)
    return str(path)


def inputs(kind: str, images: torch.Tensor) -> dict:
    """What the stock model takes in place of [B, C, H, W], written without the tower's code."""
    b, _, height, width = images.shape
    if kind == "siglip2_vision_model":
        h, w = height // 14, width // 14
        patches = [
            image[:, 14 * y : 14 * y + 14, 14 * x : 14 * x + 14].permute(1, 2, 0).reshape(-1)
            for image in images
            for y in range(h)
            for x in range(w)
        ]
        return {
            "pixel_values": torch.stack(patches).view(b, h * w, -1),
            "pixel_attention_mask": torch.ones(b, h * w, dtype=torch.long),
            "spatial_shapes": torch.tensor([[h, w]] * b),
        }
    found = {"pixel_values": images}
    if FACTS[kind].interpolates == "asked":
        found["interpolate_pos_encoding"] = True
    if kind == "vit_mae":
        found["noise"] = torch.arange(height * width // 196.0).expand(b, -1)
    return found
