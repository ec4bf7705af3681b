"""A random Qwen2-VL, 2.5-VL or 3-VL of a few thousand weights, with tokenizer and image processor: a stock folder."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.tiny import TOKENIZER

SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
PROMPT = "<|im_start|>user\n{images}what is it<|im_end|>\n<|im_start|>assistant\n"
VISION = {
    "qwen2_vl": dict(depth=2, embed_dim=32, num_heads=2, hidden_size=64, mlp_ratio=2),
    "qwen2_5_vl": dict(
        depth=3,
        hidden_size=32,
        num_heads=2,
        intermediate_size=48,
        out_hidden_size=64,
        window_size=112,  # pixels, as in the released models: 8 x 8 base patches
        fullatt_block_indexes=[1],
        tokens_per_second=2,
    ),
    "qwen3_vl": dict(
        depth=3,
        hidden_size=32,
        num_heads=2,
        intermediate_size=48,
        out_hidden_size=64,
        num_position_embeddings=16,  # 4 x 4, between which every grid interpolates
        deepstack_visual_indexes=[0, 1],
    ),
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
TEXT = {  # of the language model
    "qwen2_vl": dict(num_hidden_layers=2, rope_parameters=ROPE | {"mrope_section": [2, 3, 3]}),
    "qwen2_5_vl": dict(num_hidden_layers=2, rope_parameters=ROPE | {"mrope_section": [2, 3, 3]}),
    # a layer behind the two that features of the vision encoder's layers are added to
    "qwen3_vl": dict(
        num_hidden_layers=3,
        rope_parameters=ROPE | {"mrope_section": [4, 2, 2], "mrope_interleaved": True},
        head_dim=16,
    ),
}
IMAGES = {"qwen3_vl": dict(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3)}  # what its published file says
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def make_folder(folder: Path, kind: str = "qwen2_vl") -> str:
    """Folder that stock transformers loads: model (`kind` is a key of `VISION`), tokenizer, image processor."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    config = AutoConfig.for_model(
        kind,
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=96,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **TEXT[kind],
        ),
        vision_config=VISION[kind],
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():  # the usual start is so small that places and pixels hardly count
        for name, value in model.named_parameters():
            if value.ndim > 1:
                value.normal_(std=0.2 if "embed" not in name else 0.5)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor(kind, 4, 20).save_pretrained(folder)
    return str(folder)


def image_processor(kind: str, fewest: int, most: int):
    """Of an image at least `fewest` squared patches, and `most` squared at most."""
    from transformers import Qwen2VLImageProcessorPil

    options = IMAGES.get(kind, {})
    side = options.get("patch_size", 14)
    size = {"shortest_edge": (fewest * side) ** 2, "longest_edge": (most * side) ** 2}
    return Qwen2VLImageProcessorPil(size=size, **options)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise on the left, one colour on the right: entropy where the noise is."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 90 + 20 * seed, np.uint8)
    pixels[:, : width // 2] = rng.integers(0, 256, (height, width // 2, 3))
    return Image.fromarray(pixels)


def prompt(images: int) -> str:
    return PROMPT.format(images=IMAGE * images)


def load(folder, base=None):
    """(model, processor) of a folder as its family loads it, in float32 on the CPU."""
    from llava.families import family_of

    loaded = family_of(str(folder)).load(str(folder), base=base and str(base), device="cpu", dtype="float32")
    return loaded.model, loaded.processor
