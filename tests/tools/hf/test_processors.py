"""transformers' own processors against this package's pipeline: pixels, token counts, token ids."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from llava.mm_utils import get_anyres_image_grid_shape, parse_grid_pinpoints, process_image, tokenizer_image_token
from llava.model.visual_merge import MergeRules, VisualTokenCounter
from llava.tools.hf.chat_template import chat_template
from llava.tools.hf.probes import rounding_agrees
from llava.tools.hf.processor import build_processor
from llava.tools.hf.source import expected_weights
from llava.tools.hf.tokens import last_tokens, rebuild, stop_ids
from tests.model import small
from tests.tools.hf.checkpoints import CASES, tokenizer, tower

SIZES = [(42, 42), (100, 61), (40, 90), (17, 300), (300, 17), (1, 1), (126, 84), (43, 41)]


@pytest.fixture(scope="module", params=["vicuna_next", "siglip_next", "qwen_onevision", "clip_onevision", "vicuna_pad"])
def both(request, tmp_path_factory):
    """(config, tower, transformers' processor) of a case."""
    family, kind, images, template, tokens, stem = CASES[request.param]
    folder = tower(tmp_path_factory.mktemp("tower"), kind)
    grid = "(1x1),...,(3x3)"
    config = small.config(folder, family, vocab_size=1000, image_grid_pinpoints=grid, **images)
    found = expected_weights(small.classes(family)[1], config)[1]
    from llava.tools.hf.layouts import FORMATS

    form = next(form for form in FORMATS.values() if form.stem == stem)
    names = ("<image>", "<video>") if stem == "LlavaOnevision" else ("<image>",)
    made = rebuild(tokenizer(tokens), added=names)
    return config, found, build_processor("here", config, found, form, made, chat_template(template))


def picture(size):
    pixels = np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels(both, size, mode):
    config, found, processor = both
    shown = picture(size).convert(mode)
    ours = process_image(shown, found.image_processor, config.image_aspect_ratio, config.image_grid_pinpoints)
    theirs = processor.image_processor(shown, return_tensors="pt")["pixel_values"][0]
    assert theirs.shape == ours.shape and (theirs - ours).abs().max() <= 1e-6


def count_of(processor, size):
    """Image tokens that transformers' processor writes for a picture."""
    return processor._get_num_multimodal_tokens(image_sizes=[size[::-1]])["num_image_tokens"][0]


def test_token_counts(both):
    """Of thousands of sizes; where the two round differently, and only there, they may differ."""
    config, found, processor = both
    side, patches = found.image_size, found.num_patches_per_side
    counter = VisualTokenCounter(MergeRules.from_config(config), found.token_grid)
    grid = parse_grid_pinpoints(config.image_grid_pinpoints, side)
    rng, odd = random.Random(0), 0
    for _ in range(2000):
        size = rng.randint(5, 400), rng.randint(5, 400)
        across, down = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, side)
        crops = (1 + across * down, 3, side, side) if "anyres" in config.image_aspect_ratio else (3, side, side)
        same = counter(crops, size) == count_of(processor, size)
        if not rounding_agrees(size, grid, side, patches):
            odd += 1
        else:
            assert same, size
    assert odd < 10


def test_published_sizes(tmp_path):
    """The walk of an image of 808 x 1100 (height x width), and one of the sizes that are rounded differently."""
    from types import SimpleNamespace

    from transformers import CLIPImageProcessorPil, CLIPVisionConfig

    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
    from llava.tools.hf.layouts import FORMATS

    grid = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    clip = CLIPVisionConfig(image_size=336, patch_size=14, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    images = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    config = SimpleNamespace(
        mm_vision_config=clip.to_dict(),
        mm_image_processor_config=images.to_dict(),
        mm_patch_merge_type="spatial_unpad",
        image_aspect_ratio="anyres",
        image_grid_pinpoints=grid,
    )
    with torch.device("meta"):
        found = CLIPVisionTower("clip", config, delay_load=True)
    made = build_processor("here", config, found, FORMATS["llava_next"], rebuild(tokenizer("qwen"), ("<image>",)), None)
    counter = VisualTokenCounter(MergeRules.from_config(config), found.token_grid)
    assert counter((5, 3, 336, 336), (1100, 808)) == count_of(made, (1100, 808)) == 2340
    assert made.image_processor(picture((1100, 808)), return_tensors="pt")["pixel_values"].shape == (1, 5, 3, 336, 336)
    assert counter((3, 3, 336, 336), (328, 205)) != count_of(made, (328, 205))


# --- tokenizers -------------------------------------------------------------------------------------------------------

TEXTS = [
    "USER: <image>\nWhat is it? ASSISTANT:",
    "USER: <image> What? ASSISTANT: A cat. </s>USER: <image><image>\n  Two?</s>",
    "<image>",
    "a<image>b",
    "Hello  <image>\n\n<image> there ",
]


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama3", "qwen"])
def test_token_ids(name, saved, tmp_path):
    """As LLaVA encodes them, piece by piece.

    A legacy Llama tokenizer that transformers 5 saved is none any more, and puts the blank at a text's start alone.
    """
    from transformers import AutoTokenizer

    found = tokenizer(name)
    if saved:
        found.save_pretrained(tmp_path / "saved")
        found = AutoTokenizer.from_pretrained(tmp_path / "saved")
    made = rebuild(found, added=("<image>", "<video>"))
    made.save_pretrained(tmp_path / "made")
    made = AutoTokenizer.from_pretrained(tmp_path / "made")
    image = made.convert_tokens_to_ids("<image>")
    assert made.image_token == "<image>" and image == len(found)
    for text in TEXTS:
        expected = tokenizer_image_token(text, found, image_token_index=image)
        assert made(text).input_ids == expected, text
        many = text.replace("<image>", "<image>" * 5)
        spread = [i for index in expected for i in ([index] * 5 if index == image else [index])]
        assert made(many).input_ids == spread, text
    again = rebuild(made, without=last_tokens(made, ("<image>", "<video>")))
    assert len(again) == len(found) and again.backend_tokenizer.to_str() == rebuild(found).backend_tokenizer.to_str()


def test_only_last_tokens_are_taken_out():
    made = rebuild(tokenizer("qwen"), added=("<image>", "<other>", "<video>"))
    assert last_tokens(made, ("<image>", "<video>")) == ("<video>",)


def test_stop_ids():
    from transformers import GenerationConfig

    qwen, llama, llama3 = (tokenizer(name) for name in ("qwen", "llama", "llama3"))
    assert stop_ids(qwen, "qwen_1_5", GenerationConfig(eos_token_id=[701])) == ([700, 701], [])
    qwen.eos_token = "<|endoftext|>"  # as base models have it
    assert stop_ids(qwen, "qwen_1_5", GenerationConfig()) == ([700, 701], [])
    assert stop_ids(llama, "v1", GenerationConfig()) == ([2], [])
    assert stop_ids(llama, "v0", GenerationConfig()) == ([2], ["###"])
    assert stop_ids(llama, "plain", GenerationConfig()) == ([2], [])
    assert stop_ids(llama3, "llava_llama_3", GenerationConfig(eos_token_id=7)) == ([7, 721], [])
