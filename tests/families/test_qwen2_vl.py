"""Qwen2-VL's training samples: prompt and labels, selection and its draws, truncation, batches."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from llava.data.dataset import BadRecord, LazySupervisedDataset, NoLabel, SampleArgs, fit
from llava.data.preprocess import Encoded
from llava.data.records import load_records
from llava.data.sampler import EpochSampler
from llava.errors import LlavaError
from llava.families import get_family
from llava.families.base import Loaded
from llava.model.adaptive_patches import PatchChoice
from tests.model.qwen2_vl.parts import load, picture
from tests.tiny import qwen2_vl

FAMILY = get_family("qwen2_vl")
SIZES = [(120, 90), (224, 112), (64, 64)]
START, PAD, END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"


def turns(*texts):
    return [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(texts)]


RECORDS = [
    {
        "id": "one",
        "image": "0.png",
        "conversations": turns("<image>\nWhat is it?", "A temple.", "Where?", " In\n\n China"),
    },
    {
        "id": "two",
        "image": ["0.png", "1.png"],
        "conversations": turns("<image>\n<image>\nWhich is larger?", "The second."),
    },
    {
        "id": "system",
        "image": "2.png",
        "conversations": [{"from": "system", "value": "Be brief."}, *turns("What is it?\n<image>", "A.", "And?", "B.")],
    },
    {"id": "text", "conversations": turns("Say <image>.", "<image>")},
    {"id": "mark", "conversations": turns("Say it", PAD)},
    {"id": "gone", "image": "3.png", "conversations": turns("<image>\nWhat?", "It.")},
]
CHATS = {  # as Qwen2-VL's users write them
    "one": [
        ("user", [{"type": "image"}, {"type": "text", "text": "What is it?"}]),
        ("assistant", [{"type": "text", "text": "A temple."}]),
        ("user", [{"type": "text", "text": "Where?"}]),
        ("assistant", [{"type": "text", "text": " In\n\n China"}]),
    ],
    "two": [
        ("user", [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which is larger?"}]),
        ("assistant", [{"type": "text", "text": "The second."}]),
    ],
    "system": [
        ("system", [{"type": "text", "text": "Be brief."}]),
        ("user", [{"type": "image"}, {"type": "text", "text": "What is it?"}]),
        ("assistant", [{"type": "text", "text": "A."}]),
        ("user", [{"type": "text", "text": "And?"}]),
        ("assistant", [{"type": "text", "text": "B."}]),
    ],
    "text": [("user", "Say <image>."), ("assistant", "<image>")],
}
ANSWERS = {
    "one": ["A temple.<|im_end|>", " In\n\n China<|im_end|>"],
    "two": ["The second.<|im_end|>"],
    "system": ["A.<|im_end|>", "B.<|im_end|>"],
    "text": ["<image><|im_end|>"],
}


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = qwen2_vl(tmp_path_factory.mktemp("qwen2_vl"))
    return FAMILY.load_processor(folder, patch_selection_method="budget", alpha=0.5)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    for number, size in enumerate(SIZES):
        picture(*size, number).save(folder / f"{number}.png")
    (folder / "records.json").write_text(json.dumps(RECORDS))
    return load_records(folder / "records.json"), SampleArgs(image_folder=str(folder))


def loaded(processor):
    return Loaded(None, processor, processor.tokenizer, processor.image_processor, 2048, "qwen_1_5")


def dataset(processor, records, **options):
    return LazySupervisedDataset(records[0], FAMILY, loaded(processor), replace(records[1], **options))


@pytest.mark.parametrize("row", range(4))
def test_tokens_are_those_of_the_chat_template(processor, records, row):
    sample, name = dataset(processor, records)[row], RECORDS[row]["id"]
    messages = [{"role": role, "content": content} for role, content in CHATS[name]]
    prompt = processor.apply_chat_template(messages, tokenize=False)
    first = "Be brief." if name == "system" else "You are a helpful assistant."
    assert prompt.startswith(f"<|im_start|>system\n{first}<|im_end|>\n<|im_start|>user\n")
    image = RECORDS[row].get("image", [])
    pictures = [Image.open(f"{records[1].image_folder}/{n}") for n in ([image] if isinstance(image, str) else image)]
    images = {"images": [picture.convert("RGB") for picture in pictures]} if pictures else {}
    expected = processor(text=[prompt], return_tensors="pt", **images)
    assert sample["input_ids"].equal(expected["input_ids"][0])
    for key in ("pixel_values", "image_grid_thw", "image_patch_levels"):
        assert (key in sample) == (key in expected) == bool(pictures)
        assert not pictures or torch.as_tensor(sample[key]).equal(torch.as_tensor(expected[key]))
    # labels: the answers and what ends them, nothing else
    ids, labels = sample["input_ids"], sample["labels"]
    supervised = labels != -100
    assert ids[supervised].equal(labels[supervised])
    starts = [at for at in range(1, len(ids)) if supervised[at] and not supervised[at - 1]]
    runs = [ids[at : at + int((~supervised[at:]).float().argmax()) or None] for at in starts]
    assert [processor.tokenizer.decode(run) for run in runs] == ANSWERS[name]


def test_the_two_meanings_of_a_system_turn(processor, records):
    """Dropped for the family's own text, as LLaVA drops it, or in its place."""
    found = dataset(processor, records)
    ids = {}
    for setting in (None, "template", "record"):
        found.loaded.system_turn = setting
        ids[setting] = found[2]["input_ids"].tolist()
        text = processor.tokenizer.decode(ids[setting])
        own = "You are a helpful assistant." if setting == "template" else "Be brief."
        assert text.startswith(f"<|im_start|>system\n{own}<|im_end|>\n<|im_start|>user\n")
        prompt = FAMILY.prompt_text([("system", "Be brief."), ("human", "Hi")], found.loaded)
        assert prompt == f"<|im_start|>system\n{own}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert ids["record"] == ids[None]


def test_an_image_token_without_media_is_text(processor, records):
    """With what stands behind it, in training and in a prompt alike."""
    tokens = processor.tokenizer
    source = turns("Say <image>\nnow.", "So.")
    ids, labels, _ = FAMILY.encode(source, loaded(processor), images=False)
    text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nSay <image>\nnow.<|im_end|>\n"
    text += "<|im_start|>assistant\n"
    assert tokens.decode(ids) == f"{text}So.<|im_end|>\n"
    assert tokens.decode([label for label in labels if label != -100]) == "So.<|im_end|>"
    prompt = FAMILY.prompt([("human", "Say <image>\nnow.")], loaded(processor), images=False)
    assert tokens.decode(prompt) == text and -200 not in prompt


def test_published_prompt():
    assert FAMILY.prompt_text([("human", "<image>\nDescribe this image.")], None) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<image>Describe this image.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_bad_records(processor, records):
    found = dataset(processor, records)
    for row, reason in ((4, "found <|image_pad|> in a text"), (5, "3.png: no such file")):
        assert isinstance(found[row], BadRecord) and reason in str(found[row]) and found[row].id == RECORDS[row]["id"]
        assert found[(3, row)] == found[row]


def test_other_chat_template_is_refused(processor, monkeypatch):
    FAMILY.check_chat_template(processor, "here")
    monkeypatch.setattr(processor, "chat_template", processor.chat_template.replace("\n<|im_start|>", "<|im_start|>"))
    monkeypatch.setattr(processor, "chat_template", "{% for m in messages %}{{ m['role'] }}{% endfor %}")
    with pytest.raises(LlavaError, match="here: its chat template writes 'userassistantuser'"):
        FAMILY.check_chat_template(processor, "here")


def test_alpha_is_drawn_for_every_image_and_epoch(processor, records):
    choice = PatchChoice("budget", (0.2, 0.9))

    def draw(*at, seed=3):
        return choice.draw(seed, *at)

    found = [draw(epoch, record, image) for epoch in range(3) for record in range(50) for image in range(2)]
    assert len(set(found)) == len(found) and 0.2 <= min(found) < 0.25 and 0.85 < max(found) <= 0.9
    assert np.mean(found) == pytest.approx(0.55, abs=0.03) and choice.middle == 0.55
    assert found == [draw(epoch, record, image) for epoch in range(3) for record in range(50) for image in range(2)]
    assert draw(0, 0, 0, seed=4) != found[0]

    data = dataset(processor, records, patch_choice=choice, seed=3)
    assert data.draws and not dataset(processor, records).draws
    sizes = {index: len(data[index]["pixel_values"]) for index in ((0, 0), (1, 0), (2, 0))}
    assert len(set(sizes.values())) > 1
    for (epoch, row), size in sizes.items():  # the same again, and what the budget allows
        levels = data[epoch, row]["image_patch_levels"]
        budget = round(draw(epoch, row, 0) * len(levels))
        assert len(data[epoch, row]["pixel_values"]) == size and size <= max(budget, 8) and size > budget - 3
    assert len(data[0]["pixel_values"]) == sizes[0, 0]


def test_sampler_says_the_epoch():
    class Given(torch.utils.data.SequentialSampler):
        def set_epoch(self, epoch):
            self.seen = epoch

    inner = Given(range(3))
    sampler = EpochSampler(inner)
    assert list(sampler) == [(0, 0), (0, 1), (0, 2)] and len(sampler) == 3
    sampler.set_epoch(2)
    assert list(sampler) == [(2, 0), (2, 1), (2, 2)] and inner.seen == 2


def test_truncation_never_cuts_an_image():
    ids, labels, visual = [1, -200, 2, -200, 3], [-100, -100, 2, -100, 3], [5, 4]
    encoded = Encoded(ids, labels, answer=2)
    for limit, kept, images in [
        (99, 5, 2),
        (12, 5, 2),
        (11, 4, 2),
        (10, 3, 1),
        (7, 3, 1),
        (6, 2, 1),
        (5, 1, 0),
        (1, 1, 0),
    ]:
        if kept <= 2:
            with pytest.raises(NoLabel):
                fit(encoded, visual, limit, whole_images=True)
            continue
        found = fit(encoded, visual, limit, whole_images=True)
        assert found == (ids[:kept], labels[:kept], images, kept < 5), limit


def test_truncated_samples(processor, records, monkeypatch):
    start, pad = processor.tokenizer.convert_tokens_to_ids([START, PAD])
    one = dataset(processor, records)[0]
    first = (one["labels"] != -100).nonzero()[0].item()
    data = dataset(processor, records, model_max_length=first + 2)
    cut = data[0]
    assert cut["input_ids"].equal(one["input_ids"][: first + 2]) and cut["pixel_values"].equal(one["pixel_values"])
    assert data.stats == {"truncated": 1, "no_label": 0}
    data = dataset(processor, records, model_max_length=len(one["input_ids"]))
    assert data[0]["input_ids"].equal(one["input_ids"]) and data.stats["truncated"] == 0

    two = dataset(processor, records)[1]["input_ids"]
    begins = (two == start).nonzero()[:, 0].tolist()
    data = dataset(processor, records, model_max_length=begins[1] + 5)
    lost = data[1]
    assert isinstance(lost, BadRecord) and lost.kind == "no_label"  # the only answer is behind both images
    assert data.stats == {"truncated": 1, "no_label": 1}

    # with an answer before them: the second image goes whole, and its pixels with it
    monkeypatch.setitem(records[0][1], "conversations", turns("Hello", "Hi.", "<image>\n<image>", "So."))
    whole = dataset(processor, records)[1]
    begins = (whole["input_ids"] == start).nonzero()[:, 0].tolist()
    kept = dataset(processor, records, model_max_length=begins[1] + 5)[1]
    assert kept["input_ids"].equal(whole["input_ids"][: begins[1]])
    assert len(whole["image_grid_thw"]) == 2 and len(kept["image_grid_thw"]) == 1
    assert len(kept["image_patch_levels"]) == kept["image_grid_thw"].prod()
    assert kept["pixel_values"].equal(whole["pixel_values"][: len(kept["pixel_values"])])
    assert 0 < (kept["input_ids"] == pad).sum() < (whole["input_ids"] == pad).sum()


def collate(processor, rows):
    return FAMILY.collate(rows, loaded(processor), SampleArgs())


def test_batch(processor, records):
    data = dataset(processor, records)
    rows = [data[row] for row in range(5)]
    batch = collate(processor, rows)
    width = max(len(row["input_ids"]) for row in rows[:4])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["mm_token_type_ids"].shape == (4, width)
    assert [str(rows[4])] == batch["bad_records"]
    for at, row in enumerate(rows[:4]):
        size = len(row["input_ids"])
        assert batch["input_ids"][at, :size].equal(row["input_ids"]) and batch["labels"][at, :size].equal(row["labels"])
        assert batch["attention_mask"][at].tolist() == [1] * size + [0] * (width - size)
        assert (batch["labels"][at, size:] == -100).all()
    images = batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids(PAD)
    assert batch["mm_token_type_ids"].equal(images.long())
    assert len(batch["image_grid_thw"]) == 4
    assert batch["pixel_values"].equal(torch.cat([row["pixel_values"] for row in rows[:3]]))
    assert len(batch["image_patch_levels"]) == batch["image_grid_thw"].prod(1).sum()


@pytest.mark.parametrize("levels", [True, False])
@pytest.mark.parametrize("rows", [[3, 3], [4]])
def test_batch_without_images_changes_nothing(processor, records, levels, rows, monkeypatch):
    """Its stand-in for an image takes part, so that every process runs the same modules, without any influence."""
    if not levels:
        monkeypatch.setattr(processor.image_processor, "patch_selection_method", None)
    data = dataset(processor, records)
    batch = collate(processor, [data[row] for row in rows])
    assert ("image_patch_levels" in batch) == levels
    bad = batch.pop("bad_records", None)
    assert bool(bad) == (rows == [4])
    model = load(processor.tokenizer.name_or_path)[0].train()
    out = model(**batch, num_items_in_batch=torch.tensor(7))
    plain = {key: batch[key][:, :-1] for key in ("input_ids", "attention_mask", "labels")}
    expected = model(**plain, num_items_in_batch=torch.tensor(7))
    logits = [model(**{key: inputs[key] for key in inputs if key != "labels"}).logits for inputs in (batch, plain)]
    assert torch.allclose(logits[0][:, :-1], logits[1], atol=1e-6)
    assert out.loss.item() == pytest.approx(expected.loss.item(), abs=1e-6)
    out.loss.backward()
    vision = [value.grad for value in model.model.visual.parameters()]
    assert all(grad is not None and not grad.any() for grad in vision)
    assert bool(bad) or model.lm_head.weight.grad.any()


def test_all_patches(processor, records, monkeypatch):
    """Without a selection a sample is a stock one."""
    monkeypatch.setattr(processor.image_processor, "patch_selection_method", None)
    sample = dataset(processor, records)[0]
    assert "image_patch_levels" not in sample
    pads = (sample["input_ids"] == processor.tokenizer.convert_tokens_to_ids(PAD)).sum()
    assert pads == len(sample["pixel_values"]) // 4 == sample["image_grid_thw"].prod() // 4
    batch = collate(processor, [sample])
    assert "image_patch_levels" not in batch and batch["pixel_values"].equal(sample["pixel_values"])
