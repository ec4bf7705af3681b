"""A checkpoint whose greedy answers differ from question to question, and pictures to ask about."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from llava.model.builder import load_tokenizer
from tests import tiny
from tests.model import small


def checkpoint(folder: Path, **changes) -> str:
    """Folder of a random model with the golden tokenizer, made beside its tower; `changes` are config values."""
    tokenizer = load_tokenizer(str(tiny.TOKENIZER))
    values = {
        "vocab_size": 703,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "image_grid_pinpoints": "(1x1),...,(2x2)",
        "conversation_template": "qwen_1_5",
    }
    model = small.model(small.tower(folder / "clip", side=28), **values | changes)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 3  # so that some answers end before the limit
    model.save_pretrained(folder / "llava-tiny")
    tokenizer.save_pretrained(folder / "llava-tiny")
    return str(folder / "llava-tiny")


def pictures(folder: Path, count: int) -> list[str]:
    """Names of pictures of noise, of different sizes."""
    rng = np.random.default_rng(0)
    names = [f"{i}.png" for i in range(count)]
    for name in names:
        width, height = rng.integers(20, 70, size=2)
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / name)
    return names
