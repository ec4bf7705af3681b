"""The demo's starting point loads as published models do, offline."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.forks import SCRIPT

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def demo(forks, tmp_path_factory):
    """Models made from a handful of texts, by the program itself."""
    folder = tmp_path_factory.mktemp("demo")
    digits = ", ".join("0123456789")
    texts = [f"left to right: {digits}.", "Which digit is at the far left?"]
    records = [{"id": str(i), "conversations": [{"from": "gpt", "value": text}]} for i, text in enumerate(texts * 30)]
    for name in ("pretrain.json", "train.json"):
        (folder / name).write_text(json.dumps(records))
    words = [ROOT / "playground" / "make_demo_model.py", "--output", folder, "--seed", "0"]
    assert forks.run(words, folder / "log", program=SCRIPT) == 0, (folder / "log").read_text()
    return folder


def test_tokenizer(demo):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo / "llm")
    assert tokenizer.model_max_length == 512 and tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert len(tokenizer("7").input_ids) == 1
    assert tokenizer("12").input_ids == tokenizer("1").input_ids + tokenizer("2").input_ids
    assert tokenizer("\n").input_ids == [198]  # as in every Qwen vocabulary
    text = "<|im_start|>user\nWhich digit is at the far left?<|im_end|>\nünïcode ☃"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("<|im_start|>").input_ids == [tokenizer.convert_tokens_to_ids("<|im_start|>")]


def test_language_model(demo):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(demo / "llm")
    assert model.config.model_type == "qwen2"
    assert model.get_input_embeddings().weight.shape[0] == len(AutoTokenizer.from_pretrained(demo / "llm"))


@pytest.mark.parametrize("kind", ["clip", "siglip", "clip_fine"])
def test_tower(demo, kind):
    import torch
    import transformers
    from PIL import Image

    prefix = {"clip": "CLIP", "siglip": "Siglip", "clip_fine": "CLIP"}[kind]
    folder = demo / f"{kind}_tower"
    model = getattr(transformers, f"{prefix}VisionModel").from_pretrained(folder)
    processor = getattr(transformers, f"{prefix}ImageProcessorPil").from_pretrained(folder)
    pixels = processor(Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 56, 56)
    with torch.no_grad():
        hidden = model(pixels, output_hidden_states=True).hidden_states[-2]
    assert hidden.shape[1] == {"clip": 16 + 1, "siglip": 16, "clip_fine": 64 + 1}[kind]


def test_hevc_vit_tower(demo):
    from llavavit import LlavaViTModel

    model = LlavaViTModel.from_pretrained(demo / "hevc_vit_tower")
    assert (model.config.image_size, model.config.patch_size, model.config.head_dim) == (56, 14, 32)
    processor = json.loads((demo / "hevc_vit_tower" / "preprocessor_config.json").read_text())
    assert processor["crop_size"] == {"height": 56, "width": 56}


@pytest.mark.parametrize("kind", ["dinov2", "siglip2", "aimv2"])
def test_tower_of_transformers(demo, kind):
    """16 tokens of width 96 at its own size, as the others; the YAML names the folder."""
    from llava.model.multimodal_encoder.builder import build_vision_tower

    yaml = (ROOT / f"configs/towers/demo_{kind}.yaml").read_text()
    assert f"vision_tower: playground/demo/{kind}_tower\n" in yaml
    tower = build_vision_tower({"mm_vision_tower": str(demo / f"{kind}_tower"), "mm_vision_select_layer": -2})
    assert (tower.image_size, tower.num_patches, tower.hidden_size, tower.patch_size) == (56, 16, 96, 14)
    expected = "PackedVisionTower" if kind == "siglip2" else "HFVisionBackboneTower"
    assert type(tower).__name__ == expected and len(tower.blocks()) == 3


def test_needs_the_data_first(tmp_path):
    program = [sys.executable, str(ROOT / "playground" / "make_demo_model.py"), "--output", str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode != 0
    assert "make_demo_data.py" in done.stderr


def test_qwen2_vl(demo):
    """A stock folder, whose tokenizer is the demo's with four more tokens."""
    import torch
    from PIL import Image
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

    folder = demo / "qwen2_vl"
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder)
    tokenizer, plain = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(demo / "llm")
    text = "<|im_start|>user\nWhich digit is at the far left?<|im_end|>\n"
    assert tokenizer(text).input_ids == plain(text).input_ids
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    found = tokenizer("".join(marks)).input_ids
    assert found == tokenizer.convert_tokens_to_ids(marks) and len(tokenizer) == len(plain) + 4
    config = model.config
    named = [config.vision_start_token_id, config.vision_end_token_id, config.image_token_id, config.video_token_id]
    assert named == found
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == (  # as Qwen2-VL's
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n"
    )
    sides = (56, 60, 64, 68, 72)
    canvases = [Image.new("RGB", (width, height)) for width in sides for height in sides]
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    assert processor(images=canvases)["image_grid_thw"].tolist() == [[1, 8, 8]] * len(canvases)  # 56-pixel patches fit
    images = processor(images=canvases[:1], return_tensors="pt")
    features = model.model.visual(images["pixel_values"], grid_thw=images["image_grid_thw"]).pooler_output
    assert features.shape == (16, config.text_config.hidden_size) and torch.isfinite(features).all()
