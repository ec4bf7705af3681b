"""What a LLaVA model is given: forms that count as the same, and those that are refused in one line."""

import numpy as np
import pytest
import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import LlavaError
from llava.model.host import HostCopies
from tests.model import small

X, SIDE = IMAGE_TOKEN_INDEX, 28
SIZE = (56, 50)
IDS = torch.tensor([[11, X, 12, 13]])


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return small.tower(tmp_path_factory.mktemp("clip"), side=SIDE)


@pytest.fixture(scope="module", params=list(small.FAMILIES))
def any_model(tower, request):
    return small.model(tower, request.param, image_grid_pinpoints="(1x1),...,(2x2)")


@pytest.fixture(scope="module")
def model(tower):
    return small.model(tower, image_grid_pinpoints="(1x1),...,(2x2)")


def picture(**changes):
    return {"images": [small.pixels(5, 3, SIDE, SIDE)], "image_sizes": [SIZE], **changes}


def logits(model, ids=IDS, **given):
    with torch.no_grad():
        return model(ids, **given).logits


def generate(model, ids=IDS, **given):
    options = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": small.PAD}
    return model.generate(ids, **options | given)


def refusal(call, words: str) -> None:
    with pytest.raises(LlavaError, match=words) as refused:
        call()
    assert "\n" not in str(refused.value)


# --- the same, in other forms ---


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_ids_of_fewer_bits(any_model, dtype):
    expected, answer = logits(any_model, **picture()), generate(any_model, **picture())
    assert torch.equal(logits(any_model, IDS.to(dtype), **picture()), expected)
    assert torch.equal(generate(any_model, IDS.to(dtype), **picture()), answer)
    text = torch.tensor([[5, 6, 7]])
    assert torch.equal(logits(any_model, text.to(dtype)), logits(any_model, text))
    labels = torch.tensor([[-100, -100, 12, 13]])
    loss = any_model(IDS, labels=labels, **picture()).loss
    assert torch.equal(any_model(IDS.to(dtype), labels=labels.to(dtype), **picture()).loss, loss)
    assert any_model.train()
    trained = [any_model(IDS.to(d), labels=labels.to(d), **picture()).loss for d in (dtype, torch.int64)]
    assert torch.equal(*trained) and (any_model.eval() is any_model)
    merged = any_model.prepare_inputs_labels_for_multimodal(
        IDS.to(dtype), None, None, None, labels.to(dtype), *[picture()[key] for key in ("images",)], ("image",), [SIZE]
    )
    assert merged[5].dtype == torch.int64 and merged[5][0, -2:].tolist() == [12, 13]


def test_a_packed_row_of_32_bits(tower):
    model = small.model(tower, image_grid_pinpoints="(1x1),...,(2x2)", attn_implementation="varlen")
    rows = torch.tensor([[11, X, 12, 13], [14, 15, 16, small.PAD]])
    mask, labels = rows != small.PAD, rows.where(rows > 0, -100)

    def loss(dtype):
        ids, known = rows.to(dtype), labels.to(dtype)
        host = HostCopies(input_ids=ids, attention_mask=mask, labels=known, packed=[4, 3])
        return model(ids, attention_mask=mask, labels=known, host=host, num_items_in_batch=4, **picture()).loss

    assert torch.equal(loss(torch.int32), loss(torch.int64)) and loss(torch.int64) > 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float16, torch.float32])
def test_masks_of_any_type(model, dtype):
    ids = torch.tensor([[small.PAD, 11, X, 12, 13]])
    mask = (ids != small.PAD).to(dtype)
    assert torch.allclose(logits(model, ids, attention_mask=mask, **picture()), logits(model, **picture()), atol=1e-5)
    assert torch.equal(generate(model, ids, attention_mask=mask, **picture()), generate(model, **picture()))


@pytest.mark.parametrize(
    "sizes",
    [torch.tensor([SIZE]), torch.tensor([SIZE]).float(), np.array([SIZE]), [list(SIZE)], [np.array(SIZE)], (SIZE,)],
    ids=["tensor", "floats", "array", "lists", "arrays", "tuple"],
)
def test_sizes_in_any_form(model, sizes):
    assert torch.equal(logits(model, **picture(image_sizes=sizes)), logits(model, **picture()))


def test_pictures_in_any_form(model):
    expected, pixels = logits(model, **picture()), picture()["images"][0]
    for images in (pixels[None], (pixels,), [pixels.double()]):
        assert torch.equal(logits(model, **picture(images=images)), expected)
    for dtype in (torch.float16, torch.bfloat16):  # as if it had been cast before
        cast = pixels.to(dtype)
        assert torch.equal(logits(model, **picture(images=[cast])), logits(model, **picture(images=[cast.float()])))


def test_a_prompt_of_one_image(model):
    """As the rows of a longer prompt that stand before its text; a single token with a cache is a step of an answer."""
    from transformers import DynamicCache

    alone = logits(model, torch.tensor([[X]]), **picture())
    longer = logits(model, torch.tensor([[X, 12]]), **picture())
    assert torch.allclose(longer[:, :-1], alone, atol=1e-5)
    cache = DynamicCache()
    logits(model, torch.tensor([[X]]), past_key_values=cache, use_cache=True, **picture())
    step = logits(model, torch.tensor([[12]]), past_key_values=cache, **picture())
    assert torch.allclose(step[:, -1], longer[:, -1], atol=1e-5)


# --- refused ---


@pytest.mark.parametrize("images", [None, []], ids=["none", "empty"])
def test_an_image_token_without_a_picture(any_model, images):
    refusal(lambda: logits(any_model, images=images), "image")
    refusal(lambda: generate(any_model, images=images), "1 <image> tokens in 1 rows, but 0 images")


@pytest.mark.parametrize(
    "images",
    [lambda: small.pixels(1, 5, 3, SIDE, SIDE), lambda: [small.pixels(5, 3, SIDE, SIDE)]],
    ids=["stacked", "list"],
)
@pytest.mark.parametrize(
    "changes",
    [{}, {"mm_patch_merge_type": "spatial"}, {"image_aspect_ratio": "square"}, {"image_aspect_ratio": "anyres_max_2"}],
    ids=["anyres", "anyres_spatial", "square_unpad", "anyres_max"],
)
def test_crops_without_a_size(tower, images, changes):
    model = small.model(tower, image_grid_pinpoints="(1x1),...,(2x2)", **changes)
    words = "image_sizes: found none, expected the .width, height. of each image: one came as 5 crops"
    refusal(lambda: logits(model, images=images()), words)
    refusal(lambda: generate(model, images=images()), words)


def test_where_no_size_is_needed(tower, model):
    """One crop, a clip, flat or unpadded maps that no size decides on: the same with sizes and without."""
    one, clip = [small.pixels(3, SIDE, SIDE)], [small.pixels(3, 3, SIDE, SIDE)]
    flat = small.model(tower, mm_patch_merge_type="flat")
    square = small.model(tower, mm_patch_merge_type="spatial", image_aspect_ratio="square")
    for use, given in (
        (model, {"images": one}),
        (model, {"images": one[0][None]}),
        (model, {"images": clip, "modalities": ["video"]}),
        (flat, picture()),
        (square, picture()),
    ):
        given = {**given, "image_sizes": None}
        assert torch.equal(logits(use, **given), logits(use, **{**given, "image_sizes": [SIZE]}))


NOTHING = {"images": None, "image_sizes": None}
REFUSED = {
    "one_row": (IDS[0], {}, r"input_ids: found int64 \[4\], expected a tensor \[B, L\] \(one row"),
    "floats": (IDS.float(), {}, "input_ids: found float32 .*, expected whole numbers"),
    "bytes": (IDS.to(torch.uint8), {}, "input_ids: found uint8 .*, expected whole numbers"),
    "lists": (IDS.tolist(), {}, "input_ids: found list"),
    "no_tokens": (IDS[:, :0], NOTHING, "input_ids: found .*1, 0"),
    "beyond": (torch.tensor([[5, small.VOCAB]]), NOTHING, f"found {small.VOCAB}, .* from 0 to 119"),
    "below": (torch.tensor([[5, -1]]), NOTHING, "found -1, .* from 0 to 119"),
    "beyond_beside_images": (torch.tensor([[X, 500]]), {}, "found 500"),
    "short_mask": (IDS, {"attention_mask": torch.ones(1, 2)}, r"attention_mask: found \[1, 2\], expected \[1, 4\]"),
    "square_mask": (IDS, {"attention_mask": torch.ones(1, 1, 4, 4)}, r"attention_mask: found \[1, 1, 4, 4\]"),
    "more_images": (IDS, {"images": [torch.zeros(3, SIDE, SIDE)] * 3, "image_sizes": None}, "but 3 images"),
    "fewer_images": (torch.tensor([[X, X]]), {}, "2 <image> tokens in 1 rows, but 1 images"),
    "pil": (IDS, {"images": ["x.png"]}, "images: number 0: found str"),
    "array": (IDS, {"images": np.zeros((1, 3, SIDE, SIDE))}, "images: found ndarray"),
    "nested": (IDS, {"images": [[torch.zeros(3, SIDE, SIDE)]]}, "images: number 0: found list"),
    "one_picture": (IDS, {"images": torch.zeros(3, SIDE, SIDE)}, r"images: found float32 \[3, 28, 28\]"),
    "bytes_of_pixels": (
        IDS,
        {"images": [torch.zeros(3, SIDE, SIDE, dtype=torch.uint8)]},
        "images: number 0: found uint8",
    ),
    "no_crop": (IDS, {"images": [torch.zeros(0, 3, SIDE, SIDE)]}, "images: number 0: found"),
    "modality": (IDS, {"modalities": ["vid"]}, "modalities: found 'vid'"),
    "size": (IDS, {"image_sizes": [(56, 0)]}, "image_sizes: found"),
    "sizes": (IDS, {"image_sizes": 56}, "image_sizes: found 56"),
    "pixel_values": (IDS, {"pixel_values": torch.zeros(1)}, "pixel_values: found .*, expected images"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, model):
    ids, changes, words = REFUSED[name]
    refusal(lambda: logits(model, ids, **picture(**changes)), words)
    refusal(lambda: generate(model, ids, **picture(**changes)), words.replace("found .*1, 0", "found .*no tokens"))


def test_labels_that_do_not_fit(model):
    refusal(lambda: model(IDS, labels=IDS[:, :2], **picture()), r"labels: found \[1, 2\], expected \[1, 4\]")
    refusal(lambda: model(IDS, labels=IDS.float(), **picture()), "labels: found float32")


def test_prompts_that_generate_refuses(model):
    refusal(lambda: generate(model, input_ids=IDS, **picture()), "found inputs and input_ids")
    refusal(lambda: generate(model, torch.tensor([[5, 6]]), attention_mask=torch.zeros(1, 2)), "a row of no tokens")
    refusal(lambda: generate(model, position_ids=torch.tensor([[0, 2, 4, 6]]), **picture()), "position_ids: found")
    short = {"max_new_tokens": None, "min_new_tokens": None, "max_length": 9}
    refusal(lambda: generate(model, **short, **picture()), "max_length: found 9, expected more than the 2. tokens")
    shown = torch.tensor([[11, X]])
    refusal(lambda: generate(model, shown, guidance_scale=2.0, **picture()), "negative_prompt_ids: found none")


# --- padding without a mask ---


ROWS = [[11, X, 12, 13], [14, 15], [21, 22, 23]]


def padded(side, pad, rows=ROWS):
    longest = max(map(len, rows))
    pads = [[pad] * (longest - len(row)) for row in rows]
    return torch.tensor([p + row if side == "left" else row + p for p, row in zip(pads, rows, strict=True)])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_that_ends_answers_too(any_model, side):
    """transformers' own rule leaves such padding in the prompt, and answers it."""
    ids, given = padded(side, small.EOS), picture(pad_token_id=small.EOS, min_new_tokens=None)
    for ends in (small.EOS, [7, small.EOS], torch.tensor([small.EOS])):
        words = f"attention_mask: found none, and rows that begin or end with the pad id {small.EOS}"
        refusal(lambda ends=ends: generate(any_model, ids, eos_token_id=ends, **given), words)
    refusal(lambda: generate(any_model, ids, **{**given, "pad_token_id": None}), "attention_mask: found none")
    given["min_new_tokens"] = 4
    answers = generate(any_model, ids, attention_mask=(ids != small.EOS).long(), **given)
    for row, answer in zip(ROWS, answers, strict=True):
        images = given if X in row else {"pad_token_id": small.EOS}
        assert generate(any_model, torch.tensor([row]), **images).tolist() == [answer.tolist()]


def test_rows_that_are_not_padded(model):
    """The pad id at the ends of all rows alike belongs to the prompts."""
    rows = torch.tensor([[small.EOS, 5, 6, small.EOS], [small.EOS, 7, 8, small.EOS]])
    answers = generate(model, rows, pad_token_id=small.EOS)
    assert [generate(model, row[None], pad_token_id=small.EOS)[0].tolist() for row in rows] == answers.tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_pad_id_that_begins_prompts(model, side):
    """bos is padding too, but for the one that each row begins with; inside of a row it is a token."""
    pad = 1
    rows = [[pad, 11, X, 12, pad, 13], [pad, 14, 15]]
    answers = generate(model, padded(side, pad, rows), bos_token_id=pad, **picture(pad_token_id=pad))
    for row, answer in zip(rows, answers, strict=True):
        given = picture(pad_token_id=pad) if X in row else {"pad_token_id": pad}
        assert generate(model, torch.tensor([row]), **given).tolist() == [answer.tolist()]
