"""Hold what lmms-eval's own models of LLaVA (`llava`, `llava_onevision`, `llava_vid`) wrote against this package's
answers to the same questions.

python scripts/lmms_eval/check_wrappers.py --model-path DIR --data-path F.json --image-folder D --results RUN [RUN ...]

Those models round pixels to float16 whatever the model's dtype is, and so does the check. The likelihoods of given
answers are not asked for: lmms-eval 0.7.3 cannot score those of its own models (see `Score` in the adapter).
"""

import argparse
import sys
from pathlib import Path

from check_results import read_run
from demo_digits.utils import FRAMES, frames

SAMPLED = 4  # frames of a clip: max_frames_num of the runs


def rounded(inputs: dict) -> dict:
    """Inputs of `generate` whose pixels have been float16."""
    return {**inputs, "images": [pixels.half().to(pixels.dtype) for pixels in inputs["images"]]}


def answer(question, inference, clip: bool) -> list[str]:
    import numpy as np
    from PIL import Image

    from llava.images.reading import load_image

    if clip:
        chosen = frames(question.paths)[np.linspace(0, FRAMES - 1, SAMPLED, dtype=int)]
        pictures = [[Image.fromarray(frame) for frame in chosen]]
    else:
        pictures = [load_image(path) for path in question.paths]
    inputs = inference.inputs([question.prompt(inference)], [pictures])
    return inference.answer(rounded(inputs), max_new_tokens=16)


def check(name: str, task: str, rows: list[dict], questions: list, inference) -> list[str]:
    faults, seen = [], set()
    for row in rows:
        question, given = questions[row["doc_id"]], row["filtered_resps"]
        (own,) = answer(question, inference, task == "demo_digits_video")
        seen.add(given)
        if given.strip() != own:
            faults.append(f"{name}: {task}: {question.id}: {given!r}, expected {own!r}")
    print(f"  {name}: {task}: {len(rows)} answers, {len(seen)} different")
    return faults


def main() -> int:
    from llava.data.records import read_file
    from llava.eval.questions import read_questions
    from llava.inference.engine import Inference

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-path", required=True, help="the questions")
    parser.add_argument("--image-folder", required=True)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="config values that the run had")
    parser.add_argument("--results", type=Path, nargs="+", required=True, help="--output_path of each run")
    args = parser.parse_args()
    inference = Inference.load(args.model_path, device="cpu")
    for assignment in args.set:
        setattr(inference.model.config, *assignment.split("="))
    questions = read_questions(read_file(args.data_path), args.data_path, args.image_folder, inference.template)
    one_digit = [question for question in questions if question.kind == "one_digit"]
    pictures = [question for question in questions if len(question.turns) == 1 and len(question.paths) == 1]
    faults = []
    for folder in args.results:
        _, samples = read_run(folder)
        for task, rows in sorted(samples.items()):
            asked = pictures if task == "demo_digits_image" else one_digit
            faults += check(folder.name, task, rows, asked, inference)
    print(*faults[:20], sep="\n", file=sys.stderr)
    print(f"{len(faults)} differences" if faults else "lmms-eval's own models of LLaVA and this package agree")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
