"""The demo data: deterministic, no handwriting shared between the splits, questions that the pictures answer."""

import hashlib
import importlib.util
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
IMAGE_KINDS = {"one_digit", "count", "left", "right", "top", "bottom", "larger", "dialogue"}


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "playground" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


data = load("make_demo_data")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Seed 0 with the held-out part whole and the training part cut short."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.CANVASES, "train", (60, 60, 60))
        patch.setitem(data.RECORDS, "train", dict.fromkeys(data.KINDS, 80))
        data.make(folder, seed=0)
    return folder


@pytest.fixture
def small(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(data, "CANVASES", {"train": (6, 5, 4), "heldout": (3, 3, 2)})
    amounts = dict.fromkeys(data.KINDS, 3)
    monkeypatch.setattr(data, "RECORDS", {"train": amounts, "heldout": amounts})


def read(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / f"{name}.json").read_text())


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    parts = [str(path.relative_to(folder)).encode() + path.read_bytes() for path in files]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_the_seed_decides_everything(tmp_path, small):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        data.make(tmp_path / name, seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert digest(tmp_path / "a") != digest(tmp_path / "c")


def test_no_handwriting_is_in_both_splits(tmp_path, small, monkeypatch):
    drawn: dict[str, set[int]] = {"train": set(), "heldout": set()}
    compose = data.compose

    def spy(count, digits):
        image, placed = compose(count, digits)
        drawn["train" if len(digits.indices) > 900 else "heldout"].update(digit.source for digit in placed)
        return image, placed

    monkeypatch.setattr(data, "compose", spy)
    data.make(tmp_path, seed=0)
    assert len(drawn["train"]) == 6 + 10 + 12 and len(drawn["heldout"]) == 3 + 6 + 6
    assert not drawn["train"] & drawn["heldout"]


def test_every_digit_image_is_in_one_split():
    labels = np.repeat(np.arange(10), 20)
    train, heldout = data.split_digits(labels, np.random.default_rng(0))
    assert sorted([*train, *heldout]) == list(range(200))
    assert Counter(labels[heldout].tolist()) == dict.fromkeys(range(10), 4)


def test_heldout_has_the_promised_shares(demo):
    kinds = Counter()
    for record in read(demo, "heldout"):
        kinds[record["kind"]] += len(record["conversations"]) // 2
    total = kinds.total()
    assert set(kinds) == IMAGE_KINDS | {"text"}
    assert total >= 1000 and kinds["one_digit"] >= 300 and kinds["text"] <= 0.05 * total
    assert min(kinds[kind] for kind in IMAGE_KINDS) >= 0.08 * total


def test_records_are_valid_llava_records(demo):
    ids = set()
    pictures = {path.name for path in (demo / "images").iterdir()}
    for name in ("pretrain", "train", "heldout"):
        for record in read(demo, name):
            ids.add((name, record["id"]))
            speakers = [turn["from"] for turn in record["conversations"]]
            assert speakers == ["human", "gpt"] * (2 if record.get("kind") == "dialogue" else 1)
            marks = sum(turn["value"].count("<image>") for turn in record["conversations"])
            assert marks == int("image" in record) and record["conversations"][0]["value"].count("<image>") == marks
            assert ("image" in record) == (record.get("kind") != "text")
            if "image" in record:
                assert record["image"] in pictures
                assert record["image"].startswith("heldout") == (name == "heldout")
            if name != "pretrain":
                assert all(len(turn["value"]) == 1 for turn in record["conversations"][1::2])
    assert len(ids) == sum(len(read(demo, name)) for name in ("pretrain", "train", "heldout"))


def test_image_sizes_vary(demo):
    sizes = []
    for path in sorted((demo / "images").glob("heldout_*.png")):
        with Image.open(path) as image:
            sizes.append(image.size)
    low, high = data.SIDES
    assert len(set(sizes)) > 100 and any(width != height for width, height in sizes)
    assert all(low <= side <= high for size in sizes for side in size)


def test_no_answer_is_a_matter_of_taste():
    """Several digits: the answers differ clearly in place and size, and none is drawn over another."""
    rng = np.random.default_rng(0)
    for count in (2, 3):
        for _ in range(50):
            width, height = rng.integers(*data.SIDES, size=2, endpoint=True).tolist()
            boxes = data.place_digits(count, width, height, rng)
            sizes = sorted((size for _, _, size in boxes), reverse=True)
            assert sizes[0] >= 1.2 * sizes[1]
            for i, (left, top, size) in enumerate(boxes):
                assert left >= 0 and top >= 0 and left + size <= width and top + size <= height
                for other_left, other_top, other_size in boxes[:i]:
                    dx = abs(left + size / 2 - other_left - other_size / 2)
                    dy = abs(top + size / 2 - other_top - other_size / 2)
                    assert dx >= data.MIN_GAP * width and dy >= data.MIN_GAP * height
                    assert max(dx, dy) >= data.NARROW * (size + other_size) / 2


def test_answers_and_caption_of_a_known_canvas():
    placed = [data.Placed(7, 0, 10, 40, 20), data.Placed(2, 1, 30, 12, 30), data.Placed(5, 2, 50, 30, 18)]
    expected = {"count": "3", "larger": "2", "left": "7", "right": "5", "top": "2", "bottom": "7"}
    assert {kind: data.answer(kind, placed) for kind in expected} == expected
    text = data.caption(placed, np.random.default_rng(0))
    statements = {"digits: 3", "left to right: 725", "top to bottom: 257", "largest: 2"}
    assert set(text.rstrip(".").split(", ")) == statements
    first, _, second, last = data.ask("dialogue", placed, np.random.default_rng(0))
    places = [turn["value"].rstrip("?").split()[-1] for turn in (first, second)]
    assert len(set(places)) == 2 and last["value"] == expected[places[1]]


def test_text_questions_are_true():
    rng = np.random.default_rng(0)
    for _ in range(50):
        question, answer = (turn["value"] for turn in data.ask_text(rng))
        step = 1 if " after " in question else -1
        assert int(answer) == int(question.rstrip("?").split()[-1]) + step and 0 <= int(answer) <= 9
