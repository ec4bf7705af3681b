"""Hold what lmms-eval wrote against this package's own answers to the same questions.

python scripts/lmms_eval/check_results.py --exact exact.json --data-path F.json --image-folder D --model-path DIR \\
    --output RESULTS [--output RESULTS ...]
"""

import argparse
import json
import sys
from pathlib import Path

from llava.errors import report_errors


def read_run(folder: Path):
    """(results.json, {task: sample rows}) that one lmms-eval run left under `folder`."""
    (results,) = folder.rglob("*_results.json")
    samples = {}
    for path in folder.rglob("*_samples_*.jsonl"):
        task = path.stem.split("_samples_")[1]
        samples[task] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return json.loads(results.read_text(encoding="utf-8"))["results"], samples


def check_answers(task: str, rows: list[dict], accuracy: float, own: list[dict]) -> list[str]:
    """Every answer is that of `llava.eval.exact_match` (`own`, in the documents' order), and so is the accuracy."""
    faults, correct, answers = [], 0, set()
    for row in rows:
        question, answer = own[row["doc_id"]], row["filtered_resps"]
        answers.add(answer)
        correct += question["correct"]
        if answer != question["prediction"]:
            faults.append(f"{task}: {question['id']}: {answer!r}, exact_match has {question['prediction']!r}")
    if abs(accuracy - correct / len(rows)) > 1e-9:
        faults.append(f"{task}: accuracy {accuracy}, exact_match has {correct / len(rows)}")
    print(f"  {task}: {len(rows)} answers ({len(answers)} different), accuracy {accuracy:.4f}")
    return faults


def check_choices(task: str, rows: list[dict], accuracy: float, questions: list, inference) -> list[str]:
    """The ten losses are those of the next token's logits after the prompt; the accuracy is that of the likeliest."""
    import torch

    from llava.images.reading import load_image

    digits = [inference.tokens(str(digit)) for digit in range(10)]
    assert all(len(ids) == 1 for ids in digits), "a digit is not one token: there is no formula to compare with"
    faults, correct, chosen = [], 0, set()
    for row in rows:
        question = questions[row["doc_id"]]
        inputs = inference.inputs([question.prompt(inference)], [[load_image(path) for path in question.paths]])
        with torch.no_grad():
            logs = inference.model(**inputs).logits[0, -1].double().log_softmax(-1)[[ids[0] for ids in digits]]
        losses = torch.tensor([float(choice[0]) for choice in row["filtered_resps"]], dtype=torch.float64)
        if not torch.allclose(losses, -logs, atol=1e-4):
            faults.append(f"{task}: {question.id}: losses {losses.tolist()}, logits say {(-logs).tolist()}")
        chosen.add(int(logs.argmax()))
        correct += int(logs.argmax()) == int(question.answer)
    if abs(accuracy - correct / len(rows)) > 1e-9:
        faults.append(f"{task}: accuracy {accuracy}, the logits' is {correct / len(rows)}")
    print(f"  {task}: {len(rows)} choices ({len(chosen)} different), accuracy {accuracy:.4f}")
    return faults


@report_errors
def main() -> int:
    from llava.data.records import read_file
    from llava.eval.questions import read_questions
    from llava.inference.engine import Inference

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--exact", required=True, help="what llava.eval.exact_match wrote")
    parser.add_argument("--data-path", required=True, help="the questions it was given")
    parser.add_argument("--image-folder", required=True)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--output", type=Path, action="append", required=True, help="--output_path of a run")
    args = parser.parse_args()
    own = json.loads(Path(args.exact).read_text(encoding="utf-8"))["questions"]
    inference = Inference.load(args.model_path, device="cpu")
    questions = read_questions(read_file(args.data_path), args.data_path, args.image_folder, inference.template)
    single = [answer for answer, question in zip(own, questions, strict=True) if len(question.turns) == 1]
    one_digit = [question for question in questions if question.kind == "one_digit"]
    faults = []
    for folder in args.output:
        print(f"{folder.name}:")
        results, samples = read_run(folder)
        for task, rows in sorted(samples.items()):
            if task == "demo_digits_choice":
                faults += check_choices(task, rows, results[task]["acc,none"], one_digit, inference)
            else:
                answers = single if task == "demo_digits_single" else own
                faults += check_answers(task, rows, results[task]["exact_match,none"], answers)
    print(*faults[:20], sep="\n", file=sys.stderr)
    print(f"{len(faults)} differences" if faults else "lmms-eval and llava.eval agree")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
