"""Helpers for images and prompts."""

import base64
import io
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import LlavaError
from llava.mm_utils import (
    KeywordsStoppingCriteria,
    divide_to_patches,
    expand2square,
    get_anyres_image_grid_shape,
    get_model_name_from_path,
    load_image_from_base64,
    parse_grid_pinpoints,
    process_anyres_image,
    process_image,
    process_images,
    resize_and_pad_image,
    select_best_resolution,
    tokenizer_image_token,
)
from llava.model.multimodal_encoder.base import FixedGrid
from llava.model.visual_merge import MergeRules, VisualTokenCounter
from tests import tiny

GRID_336 = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SIDE = 28
GRID_28 = [[28, 56], [56, 28], [56, 56]]


@pytest.fixture(scope="module")
def clip():
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


@pytest.fixture(scope="module")
def siglip():
    from transformers import SiglipImageProcessorPil

    return SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})


@pytest.fixture(scope="module")
def qwen_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny.TOKENIZER)


def picture(width, height, mode="RGB"):
    pixels = np.random.default_rng(width * height).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


# --- geometry ---


def counter(grid=GRID_336, kind="spatial_unpad", aspect="anyres", tokens=24):
    return VisualTokenCounter(
        MergeRules(mm_patch_merge_type=kind, image_aspect_ratio=aspect, image_grid_pinpoints=grid), FixedGrid(tokens)
    )


def test_the_worked_example():
    """1100 x 808 (width x height) at 336: every number on the way."""
    from transformers import CLIPImageProcessorPil

    image = picture(1100, 808)
    assert select_best_resolution(image.size, [tuple(pair) for pair in GRID_336]) == (672, 672)
    assert get_anyres_image_grid_shape(image.size, GRID_336, 336) == (2, 2)
    padded = resize_and_pad_image(image, (672, 672))
    rows = np.asarray(padded).any(axis=(1, 2)).nonzero()[0]
    assert padded.size == (672, 672) and (rows[0], rows[-1]) == (89, 89 + 494 - 1)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    pixels = process_anyres_image(image, processor, GRID_336)
    assert pixels.shape == (5, 3, 336, 336)
    assert counter()(pixels.shape, image.size) == 576 + 36 * 48 + 36 == 2340
    assert counter(kind="spatial_unpad_nobase")(pixels.shape, image.size) == 1764
    assert counter(kind="spatial")(pixels.shape, image.size) == 5 * 576
    assert counter(kind="flat")(pixels.shape, image.size) == 5 * 576
    assert counter(kind="spatial_maxpool2x2")(pixels.shape, image.size) == 2 * 576
    # 36 x 48 tokens against at most 576: 1.73 times too many each way
    assert counter(aspect="anyres_max_1")(pixels.shape, image.size) == 576 + 20 * (27 + 1)
    assert counter()((3, 336, 336), image.size) == 577


def stock_count(width, height):
    """Tokens by transformers' LlavaNextProcessor, without the class token."""
    from transformers import LlavaNextProcessor

    processor = LlavaNextProcessor.__new__(LlavaNextProcessor)
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=[[h, w] for w, h in GRID_336])
    processor.patch_size, processor.num_additional_image_tokens = 14, 0
    return processor._get_number_of_features(height, width, 336, 336)


def llava_count(width, height):
    across, down = get_anyres_image_grid_shape((width, height), GRID_336, 336)
    return counter()((1 + across * down, 3, 336, 336), (width, height))


def test_token_counts_are_those_of_transformers():
    rng = random.Random(0)
    sizes = [(rng.randint(16, 2000), rng.randint(16, 2000)) for _ in range(200)]
    assert [llava_count(*size) for size in sizes] == [stock_count(*size) for size in sizes]


def test_rounding_where_transformers_differs():
    """205 * (24 / 328) falls short of 15 by a rounding error: LLaVA-NeXT cuts to 14 rows, transformers to 16."""
    assert int(205 * (24 / 328)) == 14
    assert llava_count(328, 205) == 576 + 14 * 25
    assert stock_count(328, 205) == 576 + 16 * 25


@pytest.mark.parametrize(
    "spec, expected",
    [
        ("(1x1),...,(2x3)", [(28, 28), (28, 56), (28, 84), (56, 28), (56, 56), (56, 84)]),
        ("(2x2)", [(56, 56)]),
        ("[[28, 56], [56, 28]]", [(28, 56), (56, 28)]),
        ("[(28, 56)]", [(28, 56)]),
        ([[28, 56], (56, 28)], [(28, 56), (56, 28)]),
        (((28, 28),), [(28, 28)]),
    ],
)
def test_grids(spec, expected):
    assert list(parse_grid_pinpoints(spec, 28)) == expected


def test_the_largest_range():
    grid = parse_grid_pinpoints("(1x1),...,(6x6)", 384)
    assert len(grid) == 36 and grid[0] == (384, 384) and grid[1] == (384, 768) and grid[-1] == (2304, 2304)


@pytest.mark.parametrize(
    "spec", [None, "", "[]", "anyres", "(axb)", "[[28]]", "(3x3),...,(1x1)", "open('x')", "[28, 56]"]
)
def test_bad_grids(spec):
    with pytest.raises(LlavaError, match="image_grid_pinpoints") as fault:
        parse_grid_pinpoints(spec, 28)
    assert "\n" not in str(fault.value)


def test_divide_and_square():
    image = picture(56, 84)
    crops = divide_to_patches(image, 28)
    assert len(crops) == 6 and all(crop.size == (28, 28) for crop in crops)
    assert np.array_equal(np.asarray(crops[3]), np.asarray(image)[28:56, 28:56])  # row by row
    for size, corner in (((10, 30), (10, 0)), ((30, 10), (0, 10)), ((31, 10), (0, 10))):
        square = expand2square(picture(*size), (1, 2, 3))
        assert square.size == (max(size),) * 2 and square.getpixel((0, 0)) == (1, 2, 3)
        assert np.array_equal(
            np.asarray(square.crop((*corner, corner[0] + size[0], corner[1] + size[1]))), np.asarray(picture(*size))
        )
    same = picture(20, 20)
    assert expand2square(same, (0, 0, 0)) is same


# --- preprocessing ---


def config(aspect, grid=None):
    return SimpleNamespace(image_aspect_ratio=aspect, image_grid_pinpoints=grid)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_square_and_pad(kind, request):
    processor = request.getfixturevalue(kind)
    images = [picture(50, 40), picture(30, 60)]

    def stock(image):
        return processor.preprocess(image, return_tensors="pt")["pixel_values"][0]

    for aspect in ("square", None):
        found = process_images(images, processor, config(aspect))
        assert found.shape == (2, 3, SIDE, SIDE) and torch.equal(found, torch.stack([stock(i) for i in images]))
    assert torch.equal(process_images(images, processor, SimpleNamespace()), found)
    mean = tuple(int(255 * m) for m in processor.image_mean)
    padded = process_images(images, processor, config("pad"))
    assert torch.equal(padded, torch.stack([stock(expand2square(i, mean)) for i in images]))
    # the border is (nearly) the mean, so nearly 0 once normalised
    assert padded[1, :, :, :4].abs().max() < 0.02 and padded[1, :, :, 12:16].abs().max() > 0.2


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("aspect", ["anyres", "anyres_max_2"])
def test_anyres(kind, aspect, request):
    """The whole picture first, then the crops row by row, each as the processor alone would have it."""
    processor = request.getfixturevalue(kind)
    image = picture(50, 40)
    (found,) = process_images([image], processor, config(aspect, GRID_28))
    padded = resize_and_pad_image(image, (56, 56))
    pieces = [image.resize((SIDE, SIDE)), *divide_to_patches(padded, SIDE)]
    stock = [processor.preprocess(piece, return_tensors="pt")["pixel_values"][0] for piece in pieces]
    assert found.shape == (5, 3, SIDE, SIDE) and torch.equal(found, torch.stack(stock))
    assert torch.equal(found, process_image(image, processor, aspect, str(GRID_28)))
    many = process_images([image, picture(20, 60)], processor, config(aspect, "(1x1),...,(2x2)"))
    assert isinstance(many, list) and [len(pixels) for pixels in many] == [5, 3]
    assert process_images([image, image], processor, config(aspect, GRID_28)).shape == (2, 5, 3, SIDE, SIDE)
    with pytest.raises(LlavaError, match="image_grid_pinpoints: missing"):
        process_images([image], processor, config(aspect))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA", "I;16"])
@pytest.mark.parametrize("aspect", ["square", "pad", "anyres"])
def test_pictures_that_are_not_rgb(clip, mode, aspect):
    image = picture(50, 40, "L").convert("I").convert("I;16") if mode == "I;16" else None
    image = image or (picture(50, 40, "L").convert("LA") if mode == "LA" else picture(50, 40, mode))
    assert image.mode == mode
    found = process_image(image, clip, aspect, GRID_28)
    assert torch.equal(found, process_image(image.convert("RGB"), clip, aspect, GRID_28))
    assert found.shape[-3:] == (3, SIDE, SIDE) and torch.isfinite(found).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (28, 28)])
def test_odd_shapes(clip, size):
    for aspect, shape in (("square", (3, SIDE, SIDE)), ("pad", (3, SIDE, SIDE)), ("anyres", None)):
        found = process_image(picture(*size), clip, aspect, "(1x1),...,(2x2)")
        assert shape is None or found.shape == shape
        if aspect == "anyres":
            across, down = get_anyres_image_grid_shape(size, "(1x1),...,(2x2)", SIDE)
            assert found.shape == (1 + across * down, 3, SIDE, SIDE)


@pytest.mark.parametrize("aspect", ["highres", "crop_split"])
def test_kinds_that_are_not_offered(clip, aspect):
    with pytest.raises(LlavaError, match=f"image_aspect_ratio: found '{aspect}'"):
        process_images([picture(30, 30)], clip, config(aspect, GRID_28))


def test_base64():
    held = io.BytesIO()
    picture(5, 7).save(held, "PNG")
    found = load_image_from_base64(base64.b64encode(held.getvalue()).decode())
    assert np.array_equal(np.asarray(found), np.asarray(picture(5, 7)))


# --- prompts ---


def test_image_tokens(qwen_tokenizer):
    pieces = [qwen_tokenizer(text).input_ids for text in ("a temple", " and ", "")]
    ids = tokenizer_image_token("a temple<image> and <image>", qwen_tokenizer)
    assert ids == [*pieces[0], IMAGE_TOKEN_INDEX, *pieces[1], IMAGE_TOKEN_INDEX]
    tensor = tokenizer_image_token("<image>\nWhat?", qwen_tokenizer, return_tensors="pt")
    assert tensor.dtype == torch.long and tensor.ndim == 1 and tensor[0] == IMAGE_TOKEN_INDEX
    assert tokenizer_image_token("<image>", qwen_tokenizer, image_token_index=-7) == [-7]
    with pytest.raises(LlavaError, match="return_tensors is 'np'"):
        tokenizer_image_token("x", qwen_tokenizer, return_tensors="np")


def test_bos_comes_once():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.TOKENIZER.parent / "tokenizer_llama")
    for prompt in ("<image>\na cat<image> and a dog", "a cat <image>", "<image><image>"):
        ids = tokenizer_image_token(prompt, tokenizer)
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
        assert ids.count(IMAGE_TOKEN_INDEX) == prompt.count("<image>")


def test_bos_that_the_template_writes():
    """llama3's tokenizer may add none: the text behind an image is whole, then."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.TOKENIZER.parent / "tokenizer_llama3")
    ids = tokenizer_image_token("<|begin_of_text|>a<image>\na cat", tokenizer)
    assert tokenizer.decode(ids[:2]) == "<|begin_of_text|>a" and ids[2] == IMAGE_TOKEN_INDEX
    assert tokenizer.decode(ids[3:]) == "\na cat"


@pytest.mark.parametrize(
    "path, name",
    [
        ("liuhaotian/llava-v1.6-vicuna-7b", "llava-v1.6-vicuna-7b"),
        ("/models/llava-qwen/", "llava-qwen"),
        ("checkpoints/run/checkpoint-100", "run_checkpoint-100"),
        ("checkpoint-100", "checkpoint-100"),
    ],
)
def test_model_name(path, name):
    assert get_model_name_from_path(path) == name


def test_keywords(qwen_tokenizer):
    def ids(text):
        return torch.tensor([qwen_tokenizer(text).input_ids])

    prompt = ids("What is shown?###")
    stop = KeywordsStoppingCriteria(["###", "The end"], qwen_tokenizer, prompt)
    scores = None
    for text, expected in ((" A temple", False), (" A temple.###", True), (" A ##", False), (" The end", True)):
        assert stop(torch.cat([prompt, ids(text)], 1), scores).tolist() == [expected]
    # far from the end it has been seen before and no longer matters
    assert stop(torch.cat([prompt, ids("###" + " A temple in China." * 9)], 1), scores).tolist() == [False]
    one, other = ids(" A temple###"), ids(" A temple")
    rows = torch.cat([one, torch.nn.functional.pad(other, (one.shape[1] - other.shape[1], 0), value=int(other[0, 0]))])
    both = KeywordsStoppingCriteria(["###"], qwen_tokenizer, torch.cat([prompt, prompt]))
    assert both(torch.cat([torch.cat([prompt, prompt]), rows], 1), scores).tolist() == [True, False]


def test_keywords_where_only_new_tokens_come(qwen_tokenizer):
    """A LLaVA model's `generate` shows its criteria the new tokens alone; the prompt given may be longer."""
    prompt = torch.tensor([qwen_tokenizer("What is shown in this long, long question?").input_ids])
    stop = KeywordsStoppingCriteria(["###"], qwen_tokenizer, prompt)
    new = torch.tensor([qwen_tokenizer(" A temple.###").input_ids])
    assert new.shape[1] < prompt.shape[1]
    found = [stop(new[:, : i + 1], None).tolist() for i in range(new.shape[1])]
    assert found == [[False]] * (new.shape[1] - 1) + [[True]]
