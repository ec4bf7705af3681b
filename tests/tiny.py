"""A language model, two towers, pictures and records small enough for any test, made on the spot."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

TOKENIZER = Path(__file__).parent / "golden" / "llava" / "tokenizer_qwen"
SIDE, PATCH = 28, 14


def llm(folder: Path, kind: str = "qwen2", **changes) -> str:
    """Folder of a random two-layer language model with the golden tokenizer; `kind` is its model type."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = dict(
        vocab_size=703,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
    )
    config = AutoConfig.for_model(kind, **sizes | changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for path in TOKENIZER.iterdir():
        shutil.copy(path, folder)
    return str(folder)


def tower(folder: Path, kind: str = "clip", layers: int = 3, side: int = SIDE, seed: int = 1) -> str:
    """Folder of a random vision encoder with its image processor; `kind` is an id of the tower registry."""
    from transformers import AutoConfig, AutoModel, CLIPImageProcessorPil, SiglipImageProcessorPil

    from llava.model.multimodal_encoder.builder import TOWERS
    from llavavit.conversion import CONFIG_CLASSES

    torch.manual_seed(seed)
    sizes = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=side,
        patch_size=PATCH,
    )
    model_type = {"clip_s2": "clip_vision_model", "hevc_vit": "llava_vit", "hf_vision": "dinov2"}.get(kind) or TOWERS[
        kind
    ].model_types[-1]
    if model_type in CONFIG_CLASSES:
        sizes |= {"hidden_size": 64, "initializer_range": 0.1}  # its heads come in widths of 32
    AutoModel.from_config(AutoConfig.for_model(model_type, **sizes)).save_pretrained(folder)
    if kind == "siglip":
        processor = SiglipImageProcessorPil(size={"height": side, "width": side})
    else:
        processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor.save_pretrained(folder)
    return str(folder)


def projector(path: Path) -> str:
    """File of a random mlp2x_gelu between `tower` and `llm`, as stage 1 leaves it."""
    from safetensors.torch import save_file

    torch.manual_seed(2)
    save_file(
        {
            f"model.mm_projector.{n}.{w}": torch.randn(*shape) / 8
            for n in (0, 2)
            for w, shape in (("weight", (32, 32)), ("bias", (32,)))
        },
        path,
    )
    return str(path)


def qwen2_vl(folder: Path, kind: str = "qwen2_vl") -> str:
    """Folder of a random Qwen2-VL (or of its later kinds) with a chat template; it sees 8 x 8 patches or more."""
    from transformers import AutoTokenizer

    from playground.make_demo_model import CHAT_TEMPLATE
    from tests.model.qwen2_vl.parts import image_processor, make_folder

    make_folder(folder, kind)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    if kind == "qwen3_vl":  # it adds no system text
        start, end = (CHAT_TEMPLATE.index(text) for text in ("{% if loop.first", "<|im_start|>{{"))
        tokenizer.chat_template = CHAT_TEMPLATE[:start] + CHAT_TEMPLATE[end:]
    tokenizer.save_pretrained(folder)
    image_processor(kind, 8, 16).save_pretrained(folder)
    return str(folder)


def records(folder: Path, kinds: str) -> str:
    """Path of a JSON file; per letter of `kinds` a record: "i" one image, "m" two images, "t" text only."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    made = []
    for i, kind in enumerate(kinds):
        names = []
        for k in range({"i": 1, "m": 2, "t": 0}[kind]):
            size = int(rng.integers(20, 60)), int(rng.integers(20, 60))
            pixels = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
            names.append(f"{i}_{k}.png")
            Image.fromarray(pixels).save(folder / "images" / names[-1])
        answer = " ".join(["A temple in China."] * (1 + i % 3))  # labels are not alike in number
        turns = [
            {"from": "human", "value": "<image>\n" * len(names) + "What is shown?"},
            {"from": "gpt", "value": answer},
        ]
        record = {"id": f"r{i}", "conversations": turns}
        if names:
            record["image"] = names if len(names) > 1 else names[0]
        made.append(record)
    path = folder / "records.json"
    path.write_text(json.dumps(made))
    return str(path)


def train_flags(folder: Path, kinds: str = "iitiittiiiti", **changes) -> list[str]:
    """Command line of a short training run on tiny parts; those that `changes` does not name are made in `folder`.

    A change to None leaves the flag out.
    """
    flags = {
        "model_name_or_path": None if "model_name_or_path" in changes else llm(folder / "llm"),
        "version": "qwen_1_5",
        "vision_tower": None if "vision_tower" in changes else tower(folder / "clip"),
        "mm_vision_select_layer": -2,
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": "(1x1),...,(2x2)",
        "mm_use_im_patch_token": False,
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "data_path": None if "data_path" in changes else records(folder, kinds),
        "image_folder": folder / "images",
        "output_dir": folder / "out",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "model_max_length": 512,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    flags.update(changes)
    return [part for key, value in flags.items() if value is not None for part in (f"--{key}", str(value))]


def history(out: Path, measured: bool = False) -> list[dict]:
    """The logged steps of a finished run, and what was `measured` in them, which no two runs have in common."""
    logged = json.loads((out / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in logged if "loss" in entry]
    return [{key: entry[key] for key in entry if measured or not key.startswith("perf/")} for entry in steps]
