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
        patch.setattr(data, "TRAIN_TEXTS", 9)
        data.make(folder, seed=0)
    return folder


@pytest.fixture
def small(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(data, "CANVASES", {"train": (30, 30, 30), "heldout": (20, 20, 20)})
    monkeypatch.setattr(data, "HELDOUT", dict.fromkeys(data.HELDOUT, 3))
    monkeypatch.setattr(data, "TRAIN_TEXTS", 3)


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
    assert len(drawn["train"]) == 30 * 6 and len(drawn["heldout"]) == 20 * 6
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
            assert speakers == ["human", "gpt"] * (len(speakers) // 2)
            if name != "train":
                assert len(speakers) == (4 if record.get("kind") == "dialogue" else 2)
            marks = sum(turn["value"].count("<image>") for turn in record["conversations"])
            assert marks == int("image" in record) and record["conversations"][0]["value"].count("<image>") == marks
            if name != "train":
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
    """Several digits: each stays in a quarter of its own, and one is clearly the largest."""
    rng = np.random.default_rng(0)
    for count in (1, 2, 3):
        for _ in range(50):
            width, height = rng.integers(*data.SIDES, size=2, endpoint=True).tolist()
            boxes = data.place_digits(count, width, height, rng)
            assert len({quarter for quarter, *_ in boxes}) == len(boxes) == count
            for quarter, left, top, size in boxes:
                assert left >= 0 and top >= 0 and left + size <= width and top + size <= height
                assert (left >= width // 2) if quarter % 2 else (left + size <= width / 2)
                assert (top >= height // 2) if quarter // 2 else (top + size <= height / 2)
            sizes = sorted((size for *_, size in boxes), reverse=True)
            assert count == 1 or sizes[0] >= 1.2 * sizes[1]


def test_answers_and_caption_of_a_known_canvas():
    placed = [data.Placed(7, 0, 0, 20), data.Placed(2, 1, 3, 30), data.Placed(5, 2, 2, 18)]  # one above, two below
    expected = {"count": "3", "larger": "2", "top": "7", "right": "2", "left": None, "bottom": None, "one_digit": None}
    assert {kind: data.answer(kind, placed) for kind in expected} == expected
    assert data.layout(placed) == "3: top left 7, bottom left 5, bottom right 2, largest 2"
    assert data.layout(placed[:1]) == "1: top left 7"
    said = data.statements(placed, np.random.default_rng(0)).split(", ")
    assert sorted(said) == ["digits 3", "far right 2", "far top 7", "largest 2"]
    assert data.answer("one_digit", placed[:1]) == "7" and data.answer("top", placed[:1]) is None
    first, first_answer, second, second_answer = (
        turn["value"] for turn in data.ask("dialogue", placed, np.random.default_rng(0))
    )
    places = [text.rstrip("?").split()[-1] for text in (first, second)]
    assert sorted(places) == ["right", "top"]
    assert [first_answer, second_answer] == [expected[place] for place in places]


def test_a_training_conversation_asks_all_there_is():
    placed = [data.Placed(7, 0, 0, 20), data.Placed(2, 1, 3, 30)]  # top left and bottom right
    follow_ups = 0
    for seed in range(20):
        turns = data.ask_all(placed, np.random.default_rng(seed))
        assert turns[0]["value"].startswith("<image>\n") and len(turns) == 12
        pairs = [(turns[i]["value"].removeprefix("<image>\n"), turns[i + 1]["value"]) for i in range(0, 12, 2)]
        before = None
        for question, answer in pairs:
            kind = next((kind for kind, text in data.QUESTIONS.items() if text == question), None)
            if kind is None:  # a follow-up is only asked after another place
                follow_ups += 1
                assert before in data.PLACES
                kind = question.rstrip("?").split()[-1]
            assert answer == data.answer(kind, placed)
            before = kind
    assert 10 < follow_ups < 60


def test_captions_come_in_the_order_they_are_to_be_read(demo):
    """Layouts, then statements among them, more and more: their share never jumps."""
    texts = [record["conversations"][1]["value"] for record in read(demo, "pretrain")]
    canvases = 180
    assert len(texts) == canvases * data.CAPTION_ROUNDS
    stated = np.array([": " not in text for text in texts])
    first, last = (int(share * len(texts)) for share in data.MIXED)
    assert not stated[:first].any() and stated[last + 1 :].all()
    ramp = np.linspace(0, 1, last - first)
    for part in np.array_split(np.arange(last - first), 6):
        assert abs(stated[first:last][part].mean() - ramp[part].mean()) < 0.2
    names = [record["image"] for record in read(demo, "pretrain")]
    assert sorted(names[:canvases]) == sorted(set(names)) and names[:canvases] != names[canvases : 2 * canvases]


def test_text_questions_are_true():
    rng = np.random.default_rng(0)
    for _ in range(50):
        question, answer = (turn["value"] for turn in data.ask_text(1, rng))
        assert int(answer) == int(question.rstrip("?").split()[-1]) + 1 and 1 <= int(answer) <= 9
