"""One picture of a run: held-out pictures with question, prediction and truth, and the loss curves.

    python -m llava.eval.report --eval-json eval.json --image-folder D --stage pretrain/trainer_state.json \\
        --stage finetune/trainer_state.json --output report.png
    python -m llava.eval.report --model-path checkpoints/demo/finetune      # the same, from the places of the demo
"""

import argparse
import json
import math
import os
from collections import Counter

from llava.data.paths import resolve_path
from llava.drawing.page import BLUE, FAINT, GREEN, INK, LINE, MARGIN, RED, WIDTH, Page, enlarged, fit, font, wrap
from llava.errors import LlavaError, report_errors

COLUMNS, ROWS = 8, 4
HEADER = 84  # pixels
CELL, PICTURE = 162, 122  # width of a grid cell, side of the square a picture is fitted into
CELL_HEIGHT = PICTURE + 74
PANEL_HEIGHT = 330
EMPTY, PALE_BLUE = (244, 246, 248), (164, 192, 236)
SMOOTHING = 0.02  # of a curve's points are averaged


def read_json(path: str):
    """Raises: LlavaError, with the file's name."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise LlavaError(f"{path}: found no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LlavaError(f"{path}: found something other than JSON ({error})") from None


def loss_curve(path: str) -> tuple[list[int], list[float]]:
    """Steps and losses that a `trainer_state.json` logged."""
    state = read_json(path)
    history = state.get("log_history") if isinstance(state, dict) else None
    points = [(entry["step"], entry["loss"]) for entry in history or () if "loss" in entry]
    # a run shorter than logging_steps has its mean alone
    points = points or [(entry["step"], entry["train_loss"]) for entry in history or () if "train_loss" in entry]
    if not points:
        raise LlavaError(f"{path}: log_history: found no loss, expected a trainer_state.json with logged losses")
    steps, losses = zip(*points, strict=True)
    return list(steps), list(losses)


def smooth(values: list[float], share: float = SMOOTHING) -> list[float]:
    """Centred moving average over `share` of the points (at least five where there are as many)."""
    reach = max(2, round(len(values) * share / 2))
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def choose(questions: list[dict], amount: int) -> list[dict]:
    """A fair sample: every kind in turn, each evenly spaced over the file, right or wrong."""
    by_kind: dict[str, list[dict]] = {}
    for question in questions:
        by_kind.setdefault(question["kind"], []).append(question)
    turns = [kind for i in range(amount) for kind in sorted(by_kind) if i < len(by_kind[kind])][:amount]
    quotas = Counter(turns)
    spaced = {kind: [by_kind[kind][i * len(by_kind[kind]) // n] for i in range(n)] for kind, n in quotas.items()}
    return [spaced[kind].pop(0) for kind in turns]


def draw_cell(page: Page, left: int, top: int, question: dict, image_folder: str | None) -> None:
    """One held-out question: its picture, framed in green or red, the question, what was said and what is true."""
    from llava.data.images import load_image

    colour = GREEN if question["correct"] else RED
    centre, inset = left + CELL // 2, left + (CELL - PICTURE) // 2
    page.pen.rectangle((inset - 1, top - 1, inset + PICTURE, top + PICTURE), fill=EMPTY)
    page.frame(inset - 1, top - 1, (PICTURE + 2, PICTURE + 2), colour, 2)
    name = question["image"][0] if isinstance(question["image"], list) else question["image"]
    if name:
        picture = load_image(resolve_path(image_folder, name))
        size = fit(picture.size, (PICTURE, PICTURE))
        place = inset + (PICTURE - size[0]) // 2, top + (PICTURE - size[1]) // 2
        page.image.paste(enlarged(picture, size), place)
    else:
        page.text(centre, top + PICTURE // 2, "no picture", 14, FAINT, "mm")
    below = top + PICTURE + 8
    for row in wrap(question["question"], font(13), CELL - 10):
        page.text(centre, below, row, 13, anchor="ma")
        below += 17
    verdict = f"says {question['prediction'] or '(nothing)'}, truth {question['answer']}"
    page.text(centre, below + 1, verdict, 15, colour, "ma", width=CELL - 10)


def round_ticks(low: float, high: float, amount: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
    raw = max(high - low, 1e-9) / amount
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... between `low` and `high`, both above 0."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high]


def draw_curve(page, box: tuple[int, int, int, int], title: str, steps: list[int], losses: list[float]) -> None:
    """A panel with the loss over steps: as logged (pale) and smoothed, on a logarithmic axis with numbers."""
    from PIL import Image, ImageDraw

    draw = ImageDraw.Draw(page)
    left, top, right, bottom = box[0] + 56, box[1] + 34, box[2] - 12, box[3] - 44
    even = smooth(losses)
    floor = min([value for value in (*losses, *even) if value > 0] or [1e-3])
    low, high = floor / 1.15, max(*losses, floor * 2) * 1.1
    span = max(steps[-1] - steps[0], 1)

    def place(step: float, loss: float) -> tuple[float, float]:
        share = math.log(max(loss, low) / low) / math.log(high / low)
        return (step - steps[0]) / span * (right - left), (1 - share) * (bottom - top)

    draw.text((box[0] + 4, box[1] + 4), title, font=font(17), fill=INK)
    for tick in log_ticks(low, high):
        y = top + place(steps[0], tick)[1]
        draw.line((left, y, right, y), fill=LINE)
        draw.text((left - 8, y), f"{tick:g}", font=font(13), fill=FAINT, anchor="rm")
    for tick in round_ticks(steps[0], steps[-1]):
        x = left + place(tick, high)[0]
        draw.line((x, bottom, x, bottom + 5), fill=FAINT)
        draw.text((x, bottom + 9), f"{tick:g}", font=font(13), fill=FAINT, anchor="ma")
    # drawn three times as large and reduced, which makes the lines smooth
    big = Image.new("RGBA", ((right - left) * 3, (bottom - top) * 3), (255, 255, 255, 0))
    pen = ImageDraw.Draw(big)
    for values, colour, width in ((losses, PALE_BLUE, 3), (even, BLUE, 7)):
        points = [tuple(3 * axis for axis in place(*point)) for point in zip(steps, values, strict=True)]
        pen.line(points, fill=(*colour, 255), width=width, joint="curve")
    small = big.resize((right - left, bottom - top), Image.Resampling.BOX)
    page.paste(small, (left, top), small)
    draw.line((left, top, left, bottom, right, bottom), fill=FAINT)
    draw.text(((left + right) // 2, bottom + 27), "step", font=font(13), fill=FAINT, anchor="ma")
    legend = f"loss: as logged, smoothed; last {even[-1]:.3f}"
    draw.text((right, box[1] + 8), legend, font=font(13), fill=BLUE, anchor="ra")


def render(result: dict, image_folder: str | None, curves: list[tuple[str, list[int], list[float]]]):
    """The report as a PIL image.

    Args:
        result: the content of `eval.json`.
        curves: (title, steps, losses) of each stage.
    """
    shown = choose(result["questions"], COLUMNS * ROWS)
    page = Page()
    page.text(MARGIN, 14, f"held-out exact match {result['exact_match']:.3f}  (n={result['n']})", 26)
    kinds = " | ".join(f"{kind} {values['exact_match']:.2f}" for kind, values in result["by_kind"].items())
    page.text(MARGIN, 50, kinds, 15, FAINT, width=WIDTH - 2 * MARGIN)
    for index, question in enumerate(shown):
        left = MARGIN + index % COLUMNS * CELL
        draw_cell(page, left, HEADER + index // COLUMNS * CELL_HEIGHT, question, image_folder)
    page.top = HEADER + math.ceil(len(shown) / COLUMNS) * CELL_HEIGHT + 8
    width = (WIDTH - 2 * MARGIN) // max(len(curves), 1)
    for index, (title, steps, losses) in enumerate(curves):
        left = MARGIN + index * width
        draw_curve(page.image, (left, page.top, left + width - 8, page.top + PANEL_HEIGHT), title, steps, losses)
    page.top += PANEL_HEIGHT if curves else 0
    return page.finished()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Held-out pictures with answers, and loss curves, as one PNG.")
    parser.add_argument("--model-path", help="trained model's folder: where the other arguments' defaults are found")
    parser.add_argument("--eval-json", help="what llava.eval.exact_match wrote (default: in the model's folder)")
    parser.add_argument("--image-folder", help="where its image paths start (default: as the evaluation had it)")
    parser.add_argument(
        "--stage",
        action="append",
        help="trainer_state.json of a stage; repeat in order (default: the model's, after that of pretrain/ beside it)",
    )
    parser.add_argument("--output", help="PNG to write (default: report.png in the model's folder, or here)")
    return parser


def fill_defaults(args: argparse.Namespace) -> None:
    """Replace what was not given by what lies in and beside `--model-path`."""
    folder = args.model_path
    if folder is None and args.eval_json is None:
        raise LlavaError("found neither --model-path nor --eval-json, expected one of them")
    args.eval_json = args.eval_json or os.path.join(folder, "eval.json")
    args.output = args.output or os.path.join(folder or ".", "report.png")
    if args.stage is None and folder is not None:
        before = os.path.join(os.path.dirname(os.path.abspath(folder)), "pretrain")
        states = [os.path.join(path, "trainer_state.json") for path in (before, folder)]
        args.stage = [path for path in states if os.path.isfile(path)]


@report_errors
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    fill_defaults(args)
    result = read_json(args.eval_json)
    if not isinstance(result, dict) or not result.get("questions"):
        raise LlavaError(f"{args.eval_json}: questions: found none, expected what llava.eval.exact_match writes")
    curves = []
    for number, path in enumerate(args.stage or (), start=1):
        folder = os.path.basename(os.path.dirname(os.path.abspath(path)))
        curves.append((f"stage {number}: {folder}", *loss_curve(path)))
    page = render(result, args.image_folder or result.get("image_folder"), curves)
    os.makedirs(os.path.dirname(os.path.abspath(args.output)), exist_ok=True)
    page.save(args.output)
    print(args.output)


if __name__ == "__main__":
    main()
