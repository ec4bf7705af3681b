"""Make the demo data set: real handwriting, composed into small pictures that can be asked about.

    python playground/make_demo_data.py --output playground/demo --seed 0

scikit-learn bundles 1,797 handwritten digits of 8x8 pixels (UCI "Optical Recognition of Handwritten Digits"). One to
three of them are drawn on a canvas whose sides vary from 48 to 72 pixels. Where there are several, exactly one is drawn
large and no two share a row or a column, so that "the largest", "the leftmost", "the topmost" are always one digit.

The digit images are split before anything is composed: those of the held-out pictures appear in no training picture.

Written files (LLaVA format): `images/*.png`; `pretrain.json`, captions that spell out the canvas; `train.json` and
`heldout.json`, questions, each record with its `kind`. In a `dialogue` both turns are questions and both count; its
second turn ("And at the far right?") can only be understood with the first.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops
from tqdm import tqdm

SIDES = (48, 72)  # pixels of a canvas side, both ends included
HELDOUT_SHARE = 0.2  # of the 1,797 digit images
PAPER = (122, 116, 104)  # the mean colour of CLIP's images, also what pads a picture to a square
INK = (255, 255, 255)
SINGLE, LARGE, SMALL = (0.36, 0.72), (0.48, 0.56), (0.32, 0.38)  # drawn size, as a share of the shorter canvas side
MAX_TURN = 8.0  # degrees a digit may lean, either way
MIN_GAP = 0.10  # of a side: centres lie at least this far apart on both axes
NARROW = 0.85  # a digit fills no more than this share of its square's width
TRIES = 12  # places tried for one digit before the canvas is begun anew

CANVASES = {"train": (2400, 2400, 2400), "heldout": (359, 240, 240)}  # pictures with one, two, three digits
CAPTION_ORDERS = 3
RECORDS = {  # of each kind; a dialogue record holds two questions
    "train": {"one_digit": 3000, "count": 1500, **dict.fromkeys(("larger", "left", "right", "top", "bottom"), 3000),
              "dialogue": 1500, "text": 800},
    "heldout": {"one_digit": 359, **dict.fromkeys(("count", "larger", "left", "right", "top", "bottom"), 140),
                "dialogue": 70, "text": 52},
}  # fmt: skip

PLACES = ("left", "right", "top", "bottom")
QUESTIONS = {
    "one_digit": "Which digit is this?",
    "count": "How many digits are there?",
    "larger": "Which digit is drawn largest?",
    **{place: f"Which digit is at the far {place}?" for place in PLACES},
}
KINDS = (*QUESTIONS, "dialogue", "text")


@dataclass(frozen=True)
class Placed:
    """A digit on a canvas: `value` 0..9, `source` its index among scikit-learn's digits, centre and size in pixels."""

    value: int
    source: int
    x: float
    y: float
    size: float


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
        """The digit's ink, 0 (none) to 255, in `size` x `size` pixels, leaning a little."""
        ink = Image.fromarray((self.images[source] * (255 / 16)).astype(np.uint8))
        ink = ink.resize((size, size), Image.Resampling.BICUBIC)
        return ink.rotate(self.rng.uniform(-MAX_TURN, MAX_TURN), Image.Resampling.BILINEAR)


def place_digits(count: int, width: int, height: int, rng: np.random.Generator) -> list[tuple[int, int, int]]:
    """`(left, top, size)` in pixels of `count` squares whose digits do not overlap and are apart on both axes."""
    shares = [SINGLE] if count == 1 else [LARGE] + [SMALL] * (count - 1)
    while True:
        sizes = [round(rng.uniform(*share) * min(width, height)) for share in shares]
        boxes: list[tuple[int, int, int]] = []
        for size in sizes:
            for across, down in rng.random((TRIES, 2)).tolist():
                box = (int(across * (width - size + 1)), int(down * (height - size + 1)), size)
                if all(_apart(box, other, width, height) for other in boxes):
                    boxes.append(box)
                    break
        if len(boxes) == count:
            return boxes


def _apart(a: tuple[int, int, int], b: tuple[int, int, int], width: int, height: int) -> bool:
    dx, dy = abs(a[0] + a[2] / 2 - b[0] - b[2] / 2), abs(a[1] + a[2] / 2 - b[1] - b[2] / 2)
    touch = (a[2] + b[2]) / 2
    return dx >= MIN_GAP * width and dy >= MIN_GAP * height and (dx >= NARROW * touch or dy >= touch)


def compose(count: int, digits: Digits) -> tuple[Image.Image, list[Placed]]:
    """A canvas (RGB) with `count` digits, and what was drawn where."""
    rng = digits.rng
    width, height = (int(side) for side in rng.integers(SIDES[0], SIDES[1] + 1, size=2))
    ink = Image.new("L", (width, height))
    placed = []
    for left, top, size in place_digits(count, width, height, rng):
        source = digits.take()
        box = (left, top, left + size, top + size)
        ink.paste(ImageChops.lighter(ink.crop(box), digits.draw(source, size)), box)
        placed.append(Placed(int(digits.labels[source]), source, left + size / 2, top + size / 2, size))
    return Image.composite(Image.new("RGB", ink.size, INK), Image.new("RGB", ink.size, PAPER), ink), placed


def answer(kind: str, placed: list[Placed]) -> str:
    """The one right answer to `QUESTIONS[kind]` about a canvas."""
    picks = {
        "one_digit": lambda: placed[0].value,
        "count": lambda: len(placed),
        "larger": lambda: max(placed, key=lambda digit: digit.size).value,
        "left": lambda: min(placed, key=lambda digit: digit.x).value,
        "right": lambda: max(placed, key=lambda digit: digit.x).value,
        "top": lambda: min(placed, key=lambda digit: digit.y).value,
        "bottom": lambda: max(placed, key=lambda digit: digit.y).value,
    }
    return str(picks[kind]())


def caption(placed: list[Placed], rng: np.random.Generator) -> str:
    """A text that spells out the canvas, its statements in random order so that each is learnt from the picture."""
    across = "".join(str(digit.value) for digit in sorted(placed, key=lambda digit: digit.x))
    down = "".join(str(digit.value) for digit in sorted(placed, key=lambda digit: digit.y))
    statements = [f"digits: {len(placed)}", f"left to right: {across}", f"top to bottom: {down}"]
    statements.append(f"largest: {answer('larger', placed)}")
    return ", ".join(statements[i] for i in rng.permutation(len(statements))) + "."


def turns(*pairs: tuple[str, str], image: bool = True) -> list[dict]:
    """LLaVA conversation of (question, answer) pairs; the first question carries the picture."""
    conversation = []
    for number, (question, reply) in enumerate(pairs):
        prefix = "<image>\n" if image and number == 0 else ""
        conversation += [{"from": "human", "value": prefix + question}, {"from": "gpt", "value": reply}]
    return conversation


def ask(kind: str, placed: list[Placed], rng: np.random.Generator) -> list[dict]:
    """The conversation of a record of an image kind."""
    if kind != "dialogue":
        return turns((QUESTIONS[kind], answer(kind, placed)))
    first, second = rng.permutation(PLACES)[:2]
    return turns(
        (QUESTIONS[str(first)], answer(str(first), placed)),
        (f"And at the far {second}?", answer(str(second), placed)),
    )


def ask_text(rng: np.random.Generator) -> list[dict]:
    """A question that needs no picture."""
    step = int(rng.choice([-1, 1]))
    value = int(rng.integers(0, 9)) + (step < 0)
    word = "after" if step > 0 else "before"
    return turns((f"Which digit comes {word} {value}?", str(value + step)), image=False)


class Writer:
    """Draws canvases into `images/` and remembers what is on them."""

    def __init__(self, folder: Path, split: str, digits: Digits, bar: tqdm):
        self.folder, self.split, self.digits, self.bar = folder, split, digits, bar
        self.canvases: dict[str, list[Placed]] = {}

    def canvas(self, count: int) -> str:
        """Draws one and returns its name in `images/`, which the records use."""
        name = f"{self.split}_{len(self.canvases):05d}.png"
        image, self.canvases[name] = compose(count, self.digits)
        image.save(self.folder / "images" / name, compress_level=1)
        self.bar.update()
        return name

    def canvases_of(self, counts: list[int]) -> list[str]:
        return [self.canvas(count) for count in counts]


def caption_records(writer: Writer, names: list[str], rng: np.random.Generator) -> list[dict]:
    """Stage 1: every canvas once for each of `CAPTION_ORDERS` random orders of its caption's statements."""
    return [
        {
            "id": f"caption_{order}_{Path(name).stem}",
            "image": name,
            "conversations": [
                {"from": "human", "value": "<image>"},
                {"from": "gpt", "value": caption(writer.canvases[name], rng)},
            ],
        }
        for order in range(CAPTION_ORDERS)
        for name in names
    ]


def question_records(writer: Writer, amounts: dict[str, int], names: list[str], rng: np.random.Generator) -> list[dict]:
    """`amounts[kind]` records of every kind, each about a random canvas of `names` that the kind can be asked about."""
    single = [name for name in names if len(writer.canvases[name]) == 1]
    several = [name for name in names if len(writer.canvases[name]) > 1]
    pools = {"one_digit": single, "count": names}
    records = []
    for kind, amount in amounts.items():
        if kind == "text":
            records += [{"kind": kind, "conversations": ask_text(rng)} for _ in range(amount)]
            continue
        pool = pools.get(kind, several)
        rounds = [rng.permutation(pool) for _ in range(math.ceil(amount / len(pool)))]
        for name in np.concatenate(rounds)[:amount].tolist():
            records.append({"image": name, "kind": kind, "conversations": ask(kind, writer.canvases[name], rng)})
    records = [records[i] for i in rng.permutation(len(records))]
    return [{"id": f"{writer.split}_{number:05d}", **record} for number, record in enumerate(records)]


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
            counts = [count for count, amount in enumerate(CANVASES[split], start=1) for _ in range(amount)]
            names = writer.canvases_of(counts)
            if split == "train":
                files["pretrain.json"] = caption_records(writer, names, rng)
            files[f"{split}.json"] = question_records(writer, RECORDS[split], names, rng)
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
