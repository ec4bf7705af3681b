"""The golden LLaVA-NeXT checkpoints and how they are loaded."""

import json
from pathlib import Path
from types import SimpleNamespace

from PIL import Image
from safetensors.torch import load_file

GOLDEN = Path(__file__).parents[1] / "golden" / "llava"
CASES = sorted(path.name for path in GOLDEN.glob("*_clip_*"))


def load(folder, name=None):
    """(tokenizer, model, image_processor, context_len) of a checkpoint folder, as its users load it."""
    from llava.model.builder import load_pretrained_model

    name = name or Path(folder).name
    return load_pretrained_model(
        str(folder), None, name, device_map="cpu", torch_dtype="float32", attn_implementation="eager"
    )


def case(name):
    """Inputs and expected outputs of a case."""
    folder = GOLDEN / name
    io = load_file(folder / "io.safetensors")
    info = json.loads((folder / "case.json").read_text())
    pixels = [io[key] for key in sorted(key for key in io if key.startswith("pixel_values."))]
    inputs = {
        "input_ids": io["input_ids"],
        "attention_mask": io["attention_mask"],
        "images": pixels,
        "image_sizes": [tuple(size) for size in info["image_sizes_wh"]],
        "modalities": info["modalities"],
    }
    pictures = [Image.open(path) for path in sorted(folder.glob("image_*.png"))]
    return SimpleNamespace(folder=folder, io=io, info=info, inputs=inputs, pixels=pixels, pictures=pictures)
