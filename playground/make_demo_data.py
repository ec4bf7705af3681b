"""Make the demo data set: real handwriting, composed into small pictures that can be asked about.

    python playground/make_demo_data.py --output playground/demo --seed 0

scikit-learn bundles 1,797 handwritten digits of 8x8 pixels (UCI "Optical Recognition of Handwritten Digits"). One to
three of them are drawn on a canvas whose sides vary from 56 to 72 pixels, each somewhere in a quarter of its own. Where
there are several, exactly one is drawn large. "The far left" is asked only where one digit alone is in the left half.

The digit images are split before anything is composed: those of the held-out pictures appear in no training picture.

Written files (LLaVA format): `images/*.png`; `pretrain.json`, captions that spell out the canvas; `train.json`,
conversations that ask all there is to ask about a picture; `heldout.json`, questions, each record with its `kind`. In a
`dialogue` both turns are questions and both count; its second ("And at the far right?") needs the first.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops
from tqdm import tqdm

SIDES = (56, 72)  # pixels of a canvas side, both ends included
HELDOUT_SHARE = 0.2  # of the 1,797 digit images
PAPER = (122, 116, 104)  # the mean colour of CLIP's images, also what pads a picture to a square
INK = (255, 255, 255)
SINGLE, LARGE, SMALL = (0.76, 0.98), (0.90, 0.98), (0.68, 0.74)  # drawn size, as a share of half the shorter side
MAX_TURN, MAX_SHEAR, NARROWEST = 8.0, 0.1, 0.88  # degrees, slant and width of a digit's own variation
QUARTERS = ("top left", "top right", "bottom left", "bottom right")

CANVASES = {"train": (5000, 5000, 5000), "heldout": (359, 240, 240)}  # pictures with one, two, three digits
CAPTION_ROUNDS = 5  # captions of each canvas
MIXED = (0.35, 0.85)  # from which share of the captions on statements come among the layouts, and from which on alone
TRAIN_TEXTS = 680  # training records without an image, of four questions each: a twentieth of all questions
HELDOUT = {  # records of each kind; a dialogue record holds two questions
    "one_digit": 359,
    **dict.fromkeys(("count", "larger", "left", "right", "top", "bottom"), 140),
    "dialogue": 70,
    "text": 52,
}

PLACES = ("left", "right", "top", "bottom")
QUESTIONS = {
    "one_digit": "Which digit is this?",
    "count": "How many digits are there?",
    "larger": "Which digit is drawn largest?",
    **{place: f"Which digit is at the far {place}?" for place in PLACES},
}
FOLLOW_UP = "And at the far {}?"


@dataclass(frozen=True)
class Placed:
    """A digit on a canvas: `value` 0..9, `source` its index among scikit-learn's digits, `quarter` an index into
    `QUARTERS`, `size` in pixels."""

    value: int
    source: int
    quarter: int
    size: int


def split_digits(labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Indices of (training, held-out) digit images; every value gives the same share to each side."""
    train, heldout = [], []
    for value in range(10):
        indices = rng.permutation(np.flatnonzero(labels == value))
        cut = round(len(indices) * HELDOUT_SHARE)
        heldout.extend(indices[:cut])
        train.extend(indices[cut:])
    return np.sort(train), np.sort(heldout)


class Digits:
    """The digit images one split may draw on, handed out in shuffled rounds so that all are used equally often."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray, rng: np.random.Generator):
        self.images, self.labels, self.indices, self.rng = images, labels, indices, rng
        self.queue: list[int] = []

    def take(self) -> int:
        if not self.queue:
            self.queue = self.rng.permutation(self.indices).tolist()
        return self.queue.pop()

    def draw(self, source: int, size: int) -> Image.Image:
        """The digit's ink, 0 (none) to 255, in `size` x `size` pixels: turned, slanted and narrowed a little."""
        ink = Image.fromarray((self.images[source] * (255 / 16)).astype(np.uint8))
        ink = ink.resize((size, size), Image.Resampling.BICUBIC)
        turn, shear = math.radians(self.rng.uniform(-MAX_TURN, MAX_TURN)), self.rng.uniform(-MAX_SHEAR, MAX_SHEAR)
        wide = 1 / self.rng.uniform(NARROWEST, 1.0)
        a, b = wide * math.cos(turn), wide * (math.sin(turn) + shear)
        c, d = -math.sin(turn), math.cos(turn)
        centre = (size - 1) / 2
        matrix = (a, b, centre * (1 - a - b), c, d, centre * (1 - c - d))
        return ink.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def place_digits(count: int, width: int, height: int, rng: np.random.Generator) -> list[tuple[int, int, int, int]]:
    """`(quarter, left, top, size)` of `count` squares in pixels, anywhere in different quarters of the canvas."""
    shares = [SINGLE] if count == 1 else [LARGE] + [SMALL] * (count - 1)
    boxes = []
    for quarter, share in zip(rng.permutation(4)[:count].tolist(), shares, strict=True):
        size = int(rng.uniform(*share) * min(width, height) / 2)
        room = width // 2 - size, height // 2 - size
        left, top = (int(rng.integers(0, most + 1)) for most in room)
        right_half, lower_half = quarter % 2, quarter // 2
        boxes.append(
            (quarter, left + right_half * (width - width // 2), top + lower_half * (height - height // 2), size)
        )
    return boxes


def compose(count: int, digits: Digits) -> tuple[Image.Image, list[Placed]]:
    """A canvas (RGB) with `count` digits, and what was drawn where."""
    rng = digits.rng
    width, height = (int(side) for side in rng.integers(SIDES[0], SIDES[1] + 1, size=2))
    ink = Image.new("L", (width, height))
    placed = []
    for quarter, left, top, size in place_digits(count, width, height, rng):
        source = digits.take()
        box = (left, top, left + size, top + size)
        ink.paste(ImageChops.lighter(ink.crop(box), digits.draw(source, size)), box)
        placed.append(Placed(int(digits.labels[source]), source, quarter, size))
    return Image.composite(Image.new("RGB", ink.size, INK), Image.new("RGB", ink.size, PAPER), ink), placed


def only_one(place: str, placed: list[Placed]) -> Placed | None:
    """The digit at the far left, right, top or bottom, if it is alone in that half and others are not."""
    axis, half = {"left": (0, 0), "right": (0, 1), "top": (1, 0), "bottom": (1, 1)}[place]
    there = [digit for digit in placed if (digit.quarter // 2 if axis else digit.quarter % 2) == half]
    return there[0] if len(there) == 1 and len(placed) > 1 else None


def answer(kind: str, placed: list[Placed]) -> str | None:
    """The one right answer to `QUESTIONS[kind]` about a canvas; None where there is not exactly one."""
    if kind in PLACES:
        digit = only_one(kind, placed)
        return None if digit is None else str(digit.value)
    if kind == "count":
        return str(len(placed))
    if (kind == "one_digit") != (len(placed) == 1):
        return None
    return str(max(placed, key=lambda digit: digit.size).value)


def layout(placed: list[Placed]) -> str:
    """A caption that spells out the canvas: how many digits, each after its place, and which is the largest."""
    items = [f"{QUARTERS[digit.quarter]} {digit.value}" for digit in sorted(placed, key=lambda digit: digit.quarter)]
    largest = "" if len(placed) == 1 else f", largest {answer('larger', placed)}"
    return f"{len(placed)}: {', '.join(items)}{largest}"


def statements(placed: list[Placed], rng: np.random.Generator) -> str:
    """A caption of all that can be asked about the canvas, in random order so that each is read off the picture."""
    names = {
        "one_digit": "digit",
        "count": "digits",
        "larger": "largest",
        **{place: f"far {place}" for place in PLACES},
    }
    found = [f"{names[kind]} {answer(kind, placed)}" for kind in names if answer(kind, placed) is not None]
    return ", ".join(found[i] for i in rng.permutation(len(found)))


def turns(*pairs: tuple[str, str], image: bool = True) -> list[dict]:
    """LLaVA conversation of (question, answer) pairs; the first question carries the picture."""
    conversation = []
    for number, (question, reply) in enumerate(pairs):
        prefix = "<image>\n" if image and number == 0 else ""
        conversation += [{"from": "human", "value": prefix + question}, {"from": "gpt", "value": reply}]
    return conversation


def ask(kind: str, placed: list[Placed], rng: np.random.Generator) -> list[dict]:
    """The conversation of a held-out record of an image kind."""
    if kind != "dialogue":
        return turns((QUESTIONS[kind], answer(kind, placed)))
    first, second = rng.permutation([place for place in PLACES if answer(place, placed) is not None])[:2].tolist()
    return turns((QUESTIONS[first], answer(first, placed)), (FOLLOW_UP.format(second), answer(second, placed)))


def ask_all(placed: list[Placed], rng: np.random.Generator) -> list[dict]:
    """A training conversation: every question that the canvas answers, in random order. A place asked for right after
    another place is a follow-up half of the time."""
    kinds = rng.permutation([kind for kind in QUESTIONS if answer(kind, placed) is not None]).tolist()
    pairs = []
    for before, kind in zip([None, *kinds], kinds, strict=False):
        follows = before in PLACES and kind in PLACES and rng.random() < 0.5
        pairs.append((FOLLOW_UP.format(kind) if follows else QUESTIONS[kind], answer(kind, placed)))
    return turns(*pairs)


def ask_text(questions: int, rng: np.random.Generator) -> list[dict]:
    """A conversation of questions that need no picture."""
    values = rng.integers(0, 9, size=questions).tolist()
    return turns(*((f"Which digit comes after {value}?", str(value + 1)) for value in values), image=False)


class Writer:
    """Draws canvases into `images/` and remembers what is on them."""

    def __init__(self, folder: Path, split: str, digits: Digits, bar: tqdm):
        self.folder, self.split, self.digits, self.bar = folder, split, digits, bar
        self.canvases: dict[str, list[Placed]] = {}

    def canvas(self, count: int) -> None:
        """Draws one; records use its name in `images/`."""
        name = f"{self.split}_{len(self.canvases):05d}.png"
        image, self.canvases[name] = compose(count, self.digits)
        image.save(self.folder / "images" / name, compress_level=1)
        self.bar.update()


def caption_records(writer: Writer, rng: np.random.Generator) -> list[dict]:
    """Stage 1, to be read in this order: layouts, from which such a model learns to see, then more and more statements.
    A sudden change from one to the other throws the model back, some models for good."""
    names, records = list(writer.canvases), []
    total = CAPTION_ROUNDS * len(names)
    for number in range(CAPTION_ROUNDS):
        for i in rng.permutation(len(names)).tolist():
            name = names[i]
            placed = writer.canvases[name]
            stated = rng.random() < (len(records) / total - MIXED[0]) / (MIXED[1] - MIXED[0])
            conversation = [
                {"from": "human", "value": "<image>"},
                {"from": "gpt", "value": statements(placed, rng) if stated else layout(placed)},
            ]
            records.append({"id": f"caption{number}_{i:05d}", "image": name, "conversations": conversation})
    return records


def train_records(writer: Writer, rng: np.random.Generator) -> list[dict]:
    """Stage 2: a conversation about every canvas, and some questions without an image."""
    records = [{"image": name, "conversations": ask_all(placed, rng)} for name, placed in writer.canvases.items()]
    records += [{"conversations": ask_text(4, rng)} for _ in range(TRAIN_TEXTS)]
    return _shuffled("train", records, rng)


def heldout_records(writer: Writer, rng: np.random.Generator) -> list[dict]:
    """`HELDOUT[kind]` records of every kind, each about a random canvas that the kind can be asked about."""
    records = []
    for kind, amount in HELDOUT.items():
        if kind == "text":
            records += [{"kind": kind, "conversations": ask_text(1, rng)} for _ in range(amount)]
            continue
        pool = [name for name, placed in writer.canvases.items() if _can_ask(kind, placed)]
        rounds = [rng.permutation(pool) for _ in range(math.ceil(amount / len(pool)))]
        for name in np.concatenate(rounds)[:amount].tolist():
            records.append({"image": name, "kind": kind, "conversations": ask(kind, writer.canvases[name], rng)})
    return _shuffled("heldout", records, rng)


def _can_ask(kind: str, placed: list[Placed]) -> bool:
    return len(placed) > 1 if kind == "dialogue" else answer(kind, placed) is not None


def _shuffled(name: str, records: list[dict], rng: np.random.Generator) -> list[dict]:
    return [{"id": f"{name}_{number:05d}", **records[i]} for number, i in enumerate(rng.permutation(len(records)))]


def make(output: Path, seed: int) -> dict[str, int]:
    """Write the whole data set under `output`; returns how many records each JSON file holds."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    rng = np.random.default_rng(seed)
    parts = dict(zip(("train", "heldout"), split_digits(bundle.target, rng), strict=True))
    (output / "images").mkdir(parents=True, exist_ok=True)
    files = {}
    total = sum(sum(amounts) for amounts in CANVASES.values())
    with tqdm(total=total, desc="demo pictures", unit="picture") as bar:
        for split, indices in parts.items():
            digits = Digits(bundle.images, bundle.target, indices, rng)
            writer = Writer(output, split, digits, bar)
            for count, amount in enumerate(CANVASES[split], start=1):
                for _ in range(amount):
                    writer.canvas(count)
            if split == "train":
                files["pretrain.json"] = caption_records(writer, rng)
                files["train.json"] = train_records(writer, rng)
            else:
                files["heldout.json"] = heldout_records(writer, rng)
    for name, records in files.items():
        lines = ",\n".join(json.dumps(record) for record in records)
        (output / name).write_text(f"[\n{lines}\n]\n")
    return {name: len(records) for name, records in files.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the demo data set from scikit-learn's handwritten digits.")
    parser.add_argument("--output", type=Path, default=Path("playground/demo"), help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="decides the split, the pictures and the questions")
    args = parser.parse_args()
    amounts = make(args.output, args.seed)
    print(f"{args.output}: " + ", ".join(f"{name} {amount} records" for name, amount in amounts.items()))


if __name__ == "__main__":
    main()
