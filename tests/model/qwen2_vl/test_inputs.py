"""What the Qwen-VL models and processors are given: forms that count as the same, and those that are refused."""

import json
from decimal import Decimal

import numpy as np
import pytest
import torch

from llava.errors import LlavaError
from llava.model.host import HostCopies
from tests import tiny
from tests.model.qwen2_vl.parts import IMAGE, load, picture, prompt

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
GREEDY = {"max_new_tokens": 4, "do_sample": False}
PICTURES = [picture(84, 70), picture(56, 56, 1), picture(60, 90, 2)]
FEW = {"images_kwargs": {"patch_selection_method": "budget", "alpha": 0.5}}
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>what"


@pytest.fixture(scope="module", params=KINDS)
def parts(request, tmp_path_factory):
    """(kind, model, processor)"""
    return request.param, *load(tiny.qwen2_vl(tmp_path_factory.mktemp(request.param), request.param))


@pytest.fixture(scope="module")
def adaptive(tmp_path_factory):
    """(model, processor) of Qwen2-VL"""
    return load(tiny.qwen2_vl(tmp_path_factory.mktemp("adaptive")))


def batch_of(processor, side="left", **kwargs):
    """Three prompts: of one picture, of none, of two."""
    processor.tokenizer.padding_side = side
    text = [prompt(1), prompt(0), prompt(2)]
    return dict(processor(text=text, images=PICTURES, return_tensors="pt", padding=True, **kwargs))


def logits(model, **batch):
    with torch.no_grad():
        return model(**batch).logits


def refusal(call, words: str) -> None:
    with pytest.raises(LlavaError, match=words) as refused:
        call()
    assert "\n" not in str(refused.value)


# --- models ---


def check_without_types(model, batch) -> None:
    bare = {name: value for name, value in batch.items() if name != "mm_token_type_ids"}
    assert bare.keys() != batch.keys()
    expected = logits(model, **batch)
    assert torch.equal(logits(model, **bare), expected)
    for options in (GREEDY, GREEDY | {"num_beams": 2}):
        assert torch.equal(model.generate(**bare, **options), model.generate(**batch, **options))
    one_dimensional = torch.arange(expected.shape[1]).expand(3, *expected.shape[:2])
    assert not torch.allclose(logits(model, **batch, position_ids=one_dimensional), expected, atol=1e-3)


def test_inputs_of_an_older_processor(parts):
    """Without mm_token_type_ids: an image's tokens have its places all the same."""
    _, model, processor = parts
    check_without_types(model, batch_of(processor))


def test_inputs_of_an_older_processor_with_kept_patches(adaptive):
    model, processor = adaptive
    batch = batch_of(processor, **FEW)
    assert "image_patch_levels" in batch
    check_without_types(model, batch)


def test_a_video_without_types(parts):
    """The types that are found are those that transformers' processors make, videos' too."""
    from llava.model.qwen2_vl.generation import token_types

    _, model, processor = parts
    ids = processor.tokenizer(prompt(1) + VIDEO, return_tensors="pt")["input_ids"]
    made = torch.tensor(processor.create_mm_token_type_ids(ids.tolist()))
    assert sorted(made.unique().tolist()) == [0, 1, 2]
    assert torch.equal(token_types(model.config, ids, None, torch.tensor([[1, 2, 2]])), made)
    assert token_types(model.config, ids, None, None) is None


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_ids_of_fewer_bits(parts, dtype):
    _, model, processor = parts
    batch = batch_of(processor)
    labels = batch["input_ids"].where(batch["attention_mask"] > 0, -100)
    small = batch | {name: batch[name].to(dtype) for name in ("input_ids", "mm_token_type_ids", "attention_mask")}
    assert torch.equal(logits(model, **small), logits(model, **batch))
    assert torch.equal(model.generate(**small, **GREEDY), model.generate(**batch, **GREEDY))
    ids = {name: value for name, value in small.items() if name != "input_ids"}
    assert torch.equal(model.generate(small["input_ids"], **ids, **GREEDY), model.generate(**batch, **GREEDY))
    loss = model(**batch, labels=labels).loss
    assert torch.equal(model(**small, labels=labels.to(dtype)).loss, loss)
    host = HostCopies.of(**{name: small[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids")})
    host.image_grid_thw = batch["image_grid_thw"]
    model.train()
    trained = model(**small, labels=labels.to(dtype), host=host).loss, model(**batch, labels=labels).loss
    model.eval()
    assert torch.equal(*trained)


def test_masks_of_any_type(parts):
    _, model, processor = parts
    batch = batch_of(processor)
    for dtype in (torch.bool, torch.float32):
        mask = batch["attention_mask"].to(dtype)
        assert torch.equal(
            model.generate(**{**batch, "attention_mask": mask}, **GREEDY), model.generate(**batch, **GREEDY)
        )


def test_padding(parts):
    """Rows padded on the left answer as each on its own; what transformers would answer from the padding is refused."""
    _, model, processor = parts
    pad = processor.tokenizer.pad_token_id
    left, right = batch_of(processor), batch_of(processor, "right")
    bare = {name: value for name, value in left.items() if name != "attention_mask"}
    answers = model.generate(**left, **GREEDY, pad_token_id=pad)[:, -4:].tolist()
    assert model.generate(**bare, **GREEDY, pad_token_id=pad)[:, -4:].tolist() == answers
    for text, shown, answer in zip(
        (prompt(1), prompt(0), prompt(2)), (PICTURES[:1], None, PICTURES[1:]), answers, strict=True
    ):
        alone = processor(text=[text], images=shown, return_tensors="pt")
        assert model.generate(**alone, **GREEDY)[0, -4:].tolist() == answer
    ends = {**GREEDY, "pad_token_id": pad, "eos_token_id": [3, pad]}
    refusal(lambda: model.generate(**bare, **ends), "attention_mask: found none")
    refusal(lambda: model.generate(**right, **GREEDY), "found rows padded on the right, expected the left")
    lacking = {name: value for name, value in right.items() if name != "attention_mask"}
    refusal(lambda: model.generate(**lacking, **GREEDY, pad_token_id=pad), "found rows padded on the right")


def test_refused(parts):
    _, model, processor = parts
    batch = dict(processor(text=[prompt(1)], images=PICTURES[:1], return_tensors="pt"))
    ids, size = batch["input_ids"], model.config.text_config.vocab_size
    beyond = torch.cat([ids[:, :-1], torch.tensor([[size]])], 1)
    types = batch["mm_token_type_ids"]
    for changes, words in (
        ({"input_ids": ids[0]}, r"input_ids: found int64 .*expected a tensor \[B, L\]"),
        ({"input_ids": ids.float()}, "input_ids: found float32"),
        ({"input_ids": beyond}, f"input_ids: found {size}"),
        ({"input_ids": ids[:, :0]}, "input_ids: found .*1, 0"),
        ({"attention_mask": torch.ones(1, 2)}, r"attention_mask: found \[1, 2\]"),
        ({"attention_mask": torch.ones(1, 1, *[ids.shape[1]] * 2)}, r"attention_mask: found \[1, 1"),
        ({"mm_token_type_ids": types[:, 1:]}, "mm_token_type_ids: found"),
        ({"image_grid_thw": None}, "image_grid_thw: found none"),
        ({"pixel_values": batch["pixel_values"][:-4]}, r"pixel_values: found \d+ rows"),
    ):
        refusal(lambda changes=changes: logits(model, **batch | changes), words)
    refusal(lambda: logits(model, input_ids=torch.tensor([[5, -200]])), "input_ids: found -200")
    refusal(lambda: model.generate(**batch | {"image_grid_thw": None}, **GREEDY), "image_grid_thw: found none")


# --- processors ---


def test_pictures_in_any_form(parts, tmp_path):
    """As stock's image processor; and a text among them, with or without its own empty list."""
    _, _, processor = parts
    shown = PICTURES[0]
    expected = processor(text=[prompt(1)], images=[shown], return_tensors="pt")
    shown.save(tmp_path / "it.png")
    array = np.array(shown)
    forms = [shown, [[shown]], array, array.transpose(2, 0, 1), torch.from_numpy(array), str(tmp_path / "it.png")]
    for form in forms:
        made = processor(text=[prompt(1)], images=form, return_tensors="pt")
        assert made.keys() == expected.keys() and all(torch.equal(made[key], expected[key]) for key in made)
    flat = batch_of(processor)
    text = [prompt(1), prompt(0), prompt(2)]
    nested = processor(text=text, images=[PICTURES[:1], [], PICTURES[1:]], return_tensors="pt", padding=True)
    assert all(torch.equal(nested[key], flat[key]) for key in flat)
    for nothing in (None, [], [[]]):
        assert "pixel_values" not in processor(text=[prompt(0)], images=nothing, videos=nothing, return_tensors="pt")
    with pytest.raises(ValueError, match="no images were passed"):
        processor(text=[prompt(1)], images=[], return_tensors="pt")


def test_videos_without_torchvision(parts, tmp_path):
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        pytest.skip("torchvision is installed: videos are transformers' own affair")
    _, _, processor = parts
    clip = np.zeros((4, 56, 56, 3), np.uint8)
    words = "videos: found some, and no video processor, .* torchvision"
    for videos in ([clip], clip, ["/no/such/clip.mp4"], [PICTURES]):
        refusal(lambda videos=videos: processor(text=VIDEO, videos=videos, return_tensors="pt"), words)
    for content in ({"video": clip}, {"path": str(tmp_path / "clip.mp4")}, {"video": [clip[0], clip[1]]}):
        turns = [{"role": "user", "content": [{"type": "video", **content}, {"type": "text", "text": "what"}]}]
        chat = dict(tokenize=True, return_dict=True, return_tensors="pt")
        refusal(lambda turns=turns, chat=chat: processor.apply_chat_template(turns, **chat), words)


ALPHAS = [1, np.int64(1), torch.tensor(1), Decimal(1), np.float32(1), torch.tensor(1.0), np.array(1.0)]
THRESHOLDS = [
    [3, 2],
    (3, 2),
    np.array([3, 2]),
    np.array([3.0, 2.0], np.float32),
    torch.tensor([3, 2]),
    [np.int64(3), 2.0],
]


def levels(processor, **choice):
    made = processor(text=IMAGE, images=PICTURES[:1], images_kwargs=choice, return_tensors="pt")
    return made["image_patch_levels"].tolist()


@pytest.mark.parametrize("alpha", ALPHAS, ids=lambda value: type(value).__name__)
def test_alpha_of_any_type(adaptive, tmp_path, alpha):
    _, processor = adaptive
    kept = [levels(processor, patch_selection_method="v2", alpha=value) for value in (alpha, 1.0, 0.0)]
    assert kept[0] == kept[1] != kept[2]
    images = type(processor.image_processor)(patch_selection_method="budget", alpha=alpha)
    assert images.alpha == 1.0 and type(images.alpha) is float
    images.alpha = alpha
    images.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["alpha"] == 1.0


@pytest.mark.parametrize("thresholds", THRESHOLDS, ids=lambda value: type(value).__name__)
def test_thresholds_of_any_type(adaptive, thresholds):
    _, processor = adaptive
    expected, other = (
        levels(processor, patch_selection_method="v1", patch_thresholds=value) for value in ([3.0, 2.0], [0.0, 0.0])
    )
    assert levels(processor, patch_selection_method="v1", patch_thresholds=thresholds) == expected != other
    assert levels(processor, adaptive_patches={"method": "v1", "thresholds": thresholds}) == expected


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"patch_selection_method": "budget", "alpha": True}, "alpha: found True"),
        ({"patch_selection_method": "budget", "alpha": np.bool_(True)}, "alpha: found"),
        ({"patch_selection_method": "budget", "alpha": "0.5"}, "alpha: found '0.5'"),
        ({"patch_selection_method": "budget", "alpha": torch.tensor([0.1, 0.2, 0.3])}, "alpha: found"),
        ({"patch_selection_method": "v1", "patch_thresholds": 3}, "patch_thresholds: found 3"),
        ({"patch_selection_method": "v1", "patch_thresholds": "32"}, "patch_thresholds: found '32'"),
        ({"patch_selection_method": "v1", "patch_thresholds": [True, 2]}, "patch_thresholds: found"),
        ({"patch_selection_method": "v3", "alpha": 1}, "patch_selection_method: found 'v3'"),
    ],
)
def test_choices_that_are_none(adaptive, choice, words):
    _, processor = adaptive
    refusal(lambda: processor(text=IMAGE, images=PICTURES[:1], images_kwargs=choice, return_tensors="pt"), words)
