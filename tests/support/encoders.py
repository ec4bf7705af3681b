"""A tiny random checkpoint of every type of encoder that the tower of transformers' backbones takes, made on the spot.

A new type of `FACTS` joins the tests by one row of `KINDS`.
"""

from pathlib import Path

import torch

from llava.model.multimodal_encoder.hf_facts import FACTS

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
PLAIN = dict(**SIZES, image_size=42, patch_size=14)
STAGES = dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], image_size=64)
# model_type -> what its config is made with: 3 x 3 patches, or a last feature map of 2 x 2
KINDS = {
    "dinov2": PLAIN,
    "dinov2_with_registers": {**PLAIN, "num_register_tokens": 2},
    "dinov3_vit": {**PLAIN, "num_register_tokens": 2},
    "siglip2_vision_model": {**SIZES, "patch_size": 14, "num_patches": 9},
    "aimv2_vision_model": {**PLAIN, "is_native": True},
    "mlcd_vision_model": PLAIN,
    "internvl_vision": {**PLAIN, "image_size": [42, 42], "patch_size": [14, 14]},
    "radio": dict(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=42, patch_size=14, max_img_size=84
    ),
    "convnext": STAGES,
    "convnextv2": STAGES,
    "vit": PLAIN,
    "vit_mae": PLAIN,
    "metaclip_2_vision_model": PLAIN,
    "ijepa": PLAIN,
}
# class tokens and registers before the patches, where they are not one
PREFIX = {"dinov2_with_registers": 3, "dinov3_vit": 3, "siglip2_vision_model": 0, "aimv2_vision_model": 0, "ijepa": 0}
MAPS = {"convnext", "convnextv2"}  # types of feature maps
WHOLE = {"siglip2", "aimv2", "metaclip_2", "internvl", "mlcd"}  # the same encoders under their larger models' names


def classes(kind: str) -> list[type]:
    """transformers' config class and model class of a type."""
    import transformers

    return [getattr(transformers, FACTS[kind].name + end) for end in ("Config", "Model")]


def stock(kind: str, **changes):
    """The stock model, with random weights also where its own begin at zero (positions, layer scales)."""
    config, model = classes(kind)
    torch.manual_seed(1)
    made = model(config(**{**KINDS[kind], **changes})).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made


def folder(path: Path, kind: str, **changes) -> str:
    """Folder of a stock model, as published ones without an image processor are."""
    stock(kind, **changes).save_pretrained(path)
    return str(path)


def prefix(kind: str, config) -> int:
    """Tokens before the patches."""
    return config.num_cls_tokens + config.num_registers if kind == "radio" else PREFIX.get(kind, 1)


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


def states(kind: str, source: str, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Hidden states as the stock model gives them, with no code of the tower."""
    model = classes(kind)[1].from_pretrained(source).eval()
    if kind == "vit_mae":
        model.config.mask_ratio = 0.0
    with torch.no_grad():
        return model(**inputs(kind, images), output_hidden_states=True).hidden_states
