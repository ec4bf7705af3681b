"""Tiny LLaVA checkpoints of every kind that transformers has a class for."""

import shutil
from pathlib import Path

import torch

from tests import tiny
from tests.model import golden, small

ANYRES = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
MAX_2 = {"image_aspect_ratio": "anyres_max_2", "mm_patch_merge_type": "spatial_unpad"}
PAD = {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"}
SQUARE = {"image_aspect_ratio": "square", "mm_patch_merge_type": "flat"}

# name -> (language model, tower, image handling, template, tokenizer, class of transformers)
CASES = {
    "vicuna_next": ("llama", "clip", ANYRES, "v1", "llama", "LlavaNext"),
    "mistral_next": ("mistral", "clip", ANYRES, "mistral_instruct", "llama", "LlavaNext"),
    "qwen_next": ("qwen", "clip", ANYRES, "qwen_1_5", "qwen", "LlavaNext"),
    "siglip_next": ("qwen", "siglip", ANYRES, "qwen_1_5", "qwen", "LlavaNext"),
    "qwen_onevision": ("qwen", "siglip", MAX_2, "qwen_1_5", "qwen", "LlavaOnevision"),
    "qwen3_onevision": ("qwen3", "siglip", MAX_2, "qwen_1_5", "qwen", "LlavaOnevision"),
    "clip_onevision": ("qwen", "clip", MAX_2, "qwen_1_5", "qwen", "LlavaOnevision"),
    "vicuna_pad": ("llama", "clip", PAD, "v1", "llama", "Llava"),
    "llama3_pad": ("llama", "clip", PAD, "llava_llama_3", "llama3", "Llava"),
    "siglip_square": ("qwen3", "siglip", SQUARE, "qwen_1_5", "qwen", "Llava"),
}


def tokenizer(name: str):
    """One of the golden tokenizers: "llama", "llama3" or "qwen"."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(golden.GOLDEN / f"tokenizer_{name}")


def tower(folder: Path, kind: str) -> str:
    """A tower whose processor is bicubic, as the published ones are."""
    path = tiny.tower(folder, kind=kind, layers=4, side=42)
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    processor = (CLIPImageProcessorPil if kind == "clip" else SiglipImageProcessorPil).from_pretrained(path)
    processor.resample = 3
    processor.save_pretrained(path)
    return path


def make(folder: Path, name: str, dtype=None, **changes) -> Path:
    """A checkpoint as training saves it, of weights large enough for answers and images that differ."""
    family, kind, images, template, tokens, _ = CASES[name]
    found = tokenizer(tokens)
    values = {"vocab_size": len(found), "conversation_template": template, "image_grid_pinpoints": "(1x1),...,(2x3)"}
    values |= {"eos_token_id": found.eos_token_id, "pad_token_id": found.pad_token_id} | images
    model = small.model(tower(folder / "tower", kind), family, **values | changes)
    with torch.no_grad():
        for parameter in model.get_vision_tower().parameters():
            parameter.mul_(4)
        for parameter in model.get_model().mm_projector.parameters():
            parameter.mul_(4)
        for part in ("post_layernorm",):  # it is not used; a model that used it would be found out
            getattr(model.get_vision_tower().vision_tower.vision_model, part).weight.fill_(3)
    model.get_model().describe_vision()
    model.to(dtype or torch.float32).save_pretrained(folder / "llava")
    found.save_pretrained(folder / "llava")
    shutil.rmtree(folder / "tower")  # the checkpoint is complete without it
    return folder / "llava"
