import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessorPil

from llava.data import BadRecord, DataCollatorForSupervisedDataset, make_data, read_records
from llava.data.dataset import NoLabel, fit
from llava.data.preprocess import Encoded, preprocess
from llava.errors import LlavaError
from llava.mm_utils import process_image
from tests.data.common import llava_parts, talk, tokenizer

PROCESSOR = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
GRID = [[28, 56], [56, 28], [56, 56]]

RECORDS = [
    {"id": "one", "image": "a.png", "conversations": talk("What?\n<image>", "A cat.")},
    {"id": "text", "conversations": talk("Name a colour.", "Red.")},
    {"id": "two", "image": ["a.png", "b.png"], "conversations": talk("<image> or <image>?", "The first.")},
    {"id": "clip", "video": "clip", "conversations": talk("<image>\nWhat happens?", "It gets dark.")},
    {"id": "broken", "image": "broken.png", "conversations": talk("<image>\nWhat?", "A dog.")},
]


@pytest.fixture
def folder(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[:, :30]).save(tmp_path / "b.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])
    (tmp_path / "clip").mkdir()
    for at in range(3):
        Image.new("RGB", (32, 20), (at, 0, 0)).save(tmp_path / "clip" / f"{at}.jpg")
    return tmp_path


def module(folder, records=RECORDS, version="qwen_1_5", model_max_length=None, name="qwen", **options):
    (folder / "train.json").write_text(json.dumps(records))
    folders = {"image_folder": str(folder), "video_folder": str(folder)}
    data_args = SimpleNamespace(data_path=str(folder / "train.json"), **folders, **options)
    options |= {"version": version, "model_max_length": model_max_length}
    parts = llava_parts(tokenizer(name), PROCESSOR, **folders, **options)
    return make_data(read_records(data_args, version=version, refused={}), *parts)


def test_samples(folder):
    data = module(folder, image_aspect_ratio="anyres", image_grid_pinpoints=GRID)["train_dataset"]
    one, text, two, clip, broken = (data[at] for at in range(5))
    picture = Image.open(folder / "a.png")
    assert one["input_ids"].tolist().count(-200) == 1 and one["id"] == "one"
    assert torch.equal(one["images"][0], process_image(picture, PROCESSOR, "anyres", GRID))
    assert one["image_sizes"] == [(60, 40)] and one["modalities"] == ["image"]
    assert set(text) == {"input_ids", "labels", "id"}
    assert [image.shape for image in two["images"]] == [(3, 28, 28)] * 2
    assert torch.equal(two["images"][0], process_image(picture, PROCESSOR, "pad", None))
    assert two["image_sizes"] == [(60, 40), (30, 40)]
    assert clip["images"][0].shape == (3, 3, 28, 28)
    assert clip["modalities"] == ["video"] and clip["image_sizes"] == [(32, 20)]
    assert isinstance(broken, BadRecord) and broken.kind == "bad"
    assert str(broken).startswith("broken: image ") and "cannot be read" in str(broken)


def test_an_image_that_the_processor_refuses(folder, monkeypatch):
    data = module(folder)["train_dataset"]

    class Processor:
        def preprocess(self, images, return_tensors):
            raise ValueError("height must be positive")

    monkeypatch.setattr(data.loaded, "image_processor", Processor())
    assert isinstance(data[0], BadRecord)
    assert "a.png: found 60x40 pixels that cannot be processed (height must be positive)" in data[0].reason


def test_time_instruction_is_put_before_the_question(folder):
    data = module(folder, RECORDS[3:4], add_time_instruction=True)["train_dataset"]
    ids = data[0]["input_ids"].tolist()
    after = tokenizer("qwen").decode(ids[ids.index(-200) + 1 :])
    assert after.startswith("\nThe video lasts for 1.50 seconds, and 3 frames are uniformly sampled from it.")
    assert "related to this video.\n\nWhat happens?<|im_end|>" in after


def test_lengths(folder):
    data = module(folder)["train_dataset"]
    assert data.modality_lengths == [4, -4, 5, 6, 4]
    assert data.lengths == [132, 4, 133, 6, 132]
    assert module(folder, early_mix_text=True)["train_dataset"].modality_lengths == [4, 4, 5, 6, 4]


UNUSED = [  # what LLaVA-NeXT trains as text, though it reads the pictures
    {"id": "one", "image": "broken.png", "conversations": talk("QA_GT_caption_based_noisyWhat?", "A cat.")},
    {"id": "two", "image": ["a.png", "b.png"], "conversations": talk("What?", "A cat.")},
    {"id": "clip", "video": "clip", "conversations": talk("What?", "A cat.")},
    {"id": "text", "conversations": talk("What?", "A cat.")},
]


def test_media_without_any_image_token_are_not_read_and_train_as_text(folder):
    data = module(folder, UNUSED)["train_dataset"]
    text = data[3]
    for at in range(3):
        assert set(data[at]) == {"input_ids", "labels", "id"}
        assert data[at]["input_ids"].equal(text["input_ids"]) and data[at]["labels"].equal(text["labels"])
    assert data.modality_lengths == [2 + 1, 2 + 1, 2 + 1, -3] and data.lengths == [131, 131, 3, 3]
    family, loaded, args = data.family, data.loaded, data.args
    lengths = [family.length(record, [(60, 40)], loaded, args).tokens for record in data.records[:3]]
    assert lengths == [len(text["input_ids"])] * 3
    timed = module(folder, UNUSED[2:3], add_time_instruction=True)["train_dataset"][0]
    assert timed["input_ids"].tolist().count(-200) == 1 and len(timed["images"]) == 1


def test_an_image_token_without_media_is_text(folder):
    record = {"id": "rss", "conversations": talk("Write a channel with <image>\n.", "<rss><image></image></rss>")}
    data = module(folder, [record, RECORDS[0]])["train_dataset"]
    expected = preprocess([record["conversations"]], tokenizer("qwen"), has_image=False)
    assert data[0]["input_ids"].equal(expected["input_ids"][0]) and data[0]["labels"].equal(expected["labels"][0])
    assert "<image>\n.<|im_end|>" in tokenizer("qwen").decode(data[0]["input_ids"])
    assert "images" not in data[0] and data.modality_lengths[0] < 0
    assert data.family.length(data.records[0], [], data.loaded, data.args).tokens == len(data[0]["input_ids"])


def merged(ids, visual):
    """The merged sequence, each entry naming the position it comes from."""
    images = iter(visual)
    return [at for at, token in enumerate(ids) for _ in range(next(images) if token == -200 else 1)]


@pytest.mark.parametrize("limit", range(1, 16))
def test_truncation_is_that_of_the_merged_sequence(limit):
    ids, visual = [1, -200, 2, 3, -200, 4, 5], [4, 5]
    labels = list(range(10, 17))
    encoded = Encoded(ids, labels, answer=1)
    kept = sorted(set(merged(ids, visual)[:limit]))
    if limit == 1:  # the first token is nobody's prediction
        with pytest.raises(NoLabel, match="no label left after truncation to 1 tokens"):
            fit(encoded, visual, limit, whole_images=False)
        return
    found_ids, found_labels, images, cut = fit(encoded, visual, limit, whole_images=False)
    assert found_ids == [ids[at] for at in kept]
    assert found_labels == [labels[at] for at in kept]
    assert images == found_ids.count(-200) and cut == (limit < 14)


def test_long_samples_are_cut_and_counted(folder):
    one = module(folder)["train_dataset"][0]
    length = len(one["input_ids"]) - 1 + 5
    data = module(folder, model_max_length=length)["train_dataset"]
    assert data[0]["input_ids"].tolist() == one["input_ids"].tolist() and data.stats["truncated"] == 0
    data = module(folder, model_max_length=length - 3)["train_dataset"]
    assert data[0]["input_ids"].tolist() == one["input_ids"][:-3].tolist()
    assert data[0]["labels"].tolist() == one["labels"][:-3].tolist()
    assert data.stats == {"truncated": 2, "no_label": 0}


def test_images_that_are_cut_away_go_with_their_marker(folder):
    record = RECORDS[2] | {"conversations": talk("<image>?", "One.", "And <image>?", "Another.")}
    ids = module(folder, [record])["train_dataset"][0]["input_ids"].tolist()
    first = ids.index(-200)
    second = ids.index(-200, first + 1)
    limit = second - 1 + 5  # ends just where the second image would begin
    cut = module(folder, [record], model_max_length=limit)["train_dataset"][0]
    assert cut["input_ids"].tolist() == ids[:second]
    assert len(cut["images"]) == len(cut["image_sizes"]) == len(cut["modalities"]) == 1
    cut = module(folder, [record], model_max_length=limit + 1)["train_dataset"][0]
    assert cut["input_ids"].tolist() == ids[: second + 1] and len(cut["images"]) == 2


def test_a_sample_without_label_is_dropped_but_not_bad(folder):
    parts = module(folder, RECORDS[:2], version="v1", name="llama", model_max_length=40)
    data, collator = parts["train_dataset"], parts["data_collator"]
    dropped = data[0]
    assert isinstance(dropped, BadRecord) and dropped.kind == "no_label"
    assert str(dropped) == "one: no label left after truncation to 40 tokens"
    assert data.stats == {"truncated": 1, "no_label": 1}
    batch = collator([dropped])
    assert "bad_records" not in batch and batch["no_label"] == [str(dropped)]


def test_a_mixed_batch(folder):
    parts = module(folder)
    samples = [parts["train_dataset"][at] for at in range(5)]
    batch = parts["data_collator"](samples)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"].dtype == torch.bool and len(batch["input_ids"]) == 4
    for row, sample in enumerate(samples[:4]):
        filled = len(sample["input_ids"])
        assert batch["input_ids"][row, :filled].tolist() == sample["input_ids"].tolist()
        assert batch["labels"][row, :filled].tolist() == sample["labels"].tolist()
        assert batch["attention_mask"][row].tolist() == [at < filled for at in range(batch["input_ids"].shape[1])]
        assert set(batch["input_ids"][row, filled:].tolist()) <= {tokenizer("qwen").pad_token_id}
        assert set(batch["labels"][row, filled:].tolist()) <= {-100}
    assert batch["modalities"] == ["image", "image", "image", "video"]
    assert len(batch["images"]) == len(batch["image_sizes"]) == (batch["input_ids"] == -200).sum() == 4
    assert len(batch["bad_records"]) == 1 and batch["bad_records"][0].startswith("broken: ")


def test_batches_without_images_or_without_anything(folder):
    parts = module(folder)
    data, collator = parts["train_dataset"], parts["data_collator"]
    assert set(collator([data[1], data[1]])) == {"input_ids", "labels", "attention_mask", "host"}
    empty = collator([data[4]])
    assert set(empty) == {"input_ids", "labels", "attention_mask", "host", "bad_records"}
    assert all(getattr(empty["host"], key) is empty[key] for key in ("input_ids", "labels", "attention_mask"))
    assert set(empty["labels"].flatten().tolist()) == {-100}
    assert empty["attention_mask"].sum() == 1 and empty["input_ids"].shape[0] == 1
    assert set(empty["input_ids"].flatten().tolist()) == {tokenizer("qwen").pad_token_id}


def test_a_text_that_holds_the_pad_token_is_not_masked():
    pad = 7
    sample = {"input_ids": torch.tensor([1, pad, 2]), "labels": torch.tensor([1, pad, 2]), "id": "x"}
    assert DataCollatorForSupervisedDataset(pad)([sample])["attention_mask"].all()


def test_worker_processes_give_the_same_and_count(folder):
    parts = module(folder, model_max_length=45)
    data = parts["train_dataset"]
    direct = [parts["data_collator"]([data[at]]) for at in range(5)]
    before = data.stats["truncated"]
    assert before > 0
    loader = DataLoader(data, batch_size=1, num_workers=2, collate_fn=parts["data_collator"])
    for ours, theirs in zip(direct, loader, strict=True):
        assert ours.keys() == theirs.keys()
        assert torch.equal(ours["input_ids"], theirs["input_ids"]) and torch.equal(ours["labels"], theirs["labels"])
        assert ours.get("bad_records") == theirs.get("bad_records")
        for a, b in zip(ours.get("images", []), theirs.get("images", []), strict=True):
            assert torch.equal(a, b)
    assert data.stats["truncated"] == 2 * before


def test_faults_are_found_before_training(folder):
    with pytest.raises(LlavaError, match=r"train\.json: record 1 \(id 'x'\): found no file .*none\.png"):
        module(folder, [{**RECORDS[0], "id": "x", "image": "none.png"}])
    assert "images" in module(folder, [{**RECORDS[0], "image": str(folder / "a.png")}])["train_dataset"][0]
    outside = {**RECORDS[0], "image": str(folder.parent / "a.png")}
    shutil.copy(folder / "a.png", folder.parent / "a.png")
    with pytest.raises(LlavaError, match="leaves the folder"):
        module(folder, [outside])
    assert "images" in module(folder, [outside], allow_absolute_paths=True)["train_dataset"][0]


def test_one_rank_per_machine_looks_for_the_files(folder, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    data = module(folder, [{**RECORDS[0], "image": "none.png"}])["train_dataset"]
    assert isinstance(data[0], BadRecord)
