"""A checkpoint that can be talked to: random weights, the golden tokenizer."""

import shutil
from pathlib import Path

from tests import tiny
from tests.model import small

LIMIT = 4096  # positions


def save(folder: Path, **changes) -> str:
    """Folder of a two-layer Qwen2 with a 4-token CLIP tower; anyres, spatial_unpad."""
    tower = small.tower(folder / "tower", side=28)
    values = {
        "vocab_size": 703,
        "eos_token_id": 700,
        "pad_token_id": 701,
        "bos_token_id": None,
        "image_grid_pinpoints": "(1x1),...,(2x2)",
        "conversation_template": "qwen_1_5",
        "max_position_embeddings": LIMIT,
    }
    model = small.model(tower, **{**values, **changes})
    model.save_pretrained(folder / "model")
    for path in tiny.TOKENIZER.iterdir():
        shutil.copy(path, folder / "model")
    return str(folder / "model")
