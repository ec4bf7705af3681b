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
from llava.drawing.curves import loss_panel
from llava.drawing.page import FAINT, GREEN, MARGIN, RED, WIDTH, Page, enlarged, fit, font, wrap
from llava.errors import LlavaError, report_errors

COLUMNS, ROWS = 8, 4
HEADER = 84  # pixels
CELL, PICTURE = 162, 122  # width of a grid cell, side of the square a picture is fitted into
CELL_HEIGHT = PICTURE + 74
PANEL_HEIGHT = 330
EMPTY = (244, 246, 248)


def read_json(path: str):
    """Raises: LlavaError, with the file's name."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise LlavaError(f"{path}: no such file") from None
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
    from llava.images.reading import load_image

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
    for index, curve in enumerate(curves):
        page.image.paste(loss_panel(*curve, (width - 8, PANEL_HEIGHT)), (MARGIN + index * width, page.top))
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
        raise LlavaError(f"{args.eval_json}: questions: missing, expected what llava.eval.exact_match writes")
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
