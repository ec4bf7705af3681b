"""Score the answers that `llava.eval.model_vqa` wrote.

    python -m llava.eval.score --answers A.jsonl --references R.json --metric vqa

The references are a list (.json) or lines (.jsonl) of `{question_id, answer}`, or `answers` where there are several; or
the LLaVA-format records that were asked. The metrics are of `llava.eval.scorers`:

- exact: the same text as the answer, or as one of them
- vqa: VQA accuracy, against the answers of ten people (texts, or `{"answer": text}` as VQA has them), or one;
  textvqa the same with TextVQA's normalisation
- anls: similarity to the nearest answer
- relaxed: ChartQA's, the best over the answers
- choice: `options` (or `choices`), and `answer` the true letter or text

docs/answers.md has an example of each. `text` (or `question`), the question, tells those apart that share an id, and an
answer to another question from one to this. Answers that belong to no reference, or to a model whose weights are others
by now, are refused (exit status 2). A reference without an answer counts 0, and the exit status is 1.
"""

import argparse
import json
import sys
from collections import defaultdict

from llava.data.records import read_file
from llava.errors import LlavaError, report_errors
from llava.eval import answer_origin, scorers
from llava.eval.references import match_answers, read_references
from llava.utils import get_model_name_from_path


def read_answers(row: dict) -> list[str]:
    """The true answers of a reference row."""
    answers = row.get("answers", row.get("answer"))
    answers = answers if isinstance(answers, list) else [answers]
    answers = [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]
    answers = [str(answer) if isinstance(answer, (int, float)) else answer for answer in answers]
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise LlavaError(f"answer: found {row.get('answers', row.get('answer'))!r}, expected text or a list of texts")
    return answers


def score_row(metric: str, prediction: str, row: dict) -> float:
    """The score of one prediction against its reference row.

    Raises:
        LlavaError: the row lacks what the metric needs.
    """
    answers = read_answers(row)
    if metric in ("vqa", "textvqa"):
        return (scorers.vqa_accuracy if metric == "vqa" else scorers.textvqa_accuracy)(prediction, answers)
    if metric == "anls":
        return scorers.anls(prediction, answers)
    if metric == "choice":
        options = row.get("options", row.get("choices"))
        if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
            raise LlavaError(f"options: found {options!r}, expected a list of texts")
        return scorers.multiple_choice(prediction, answers[0], options)
    compare = scorers.relaxed_accuracy if metric == "relaxed" else scorers.exact_match
    return max(compare(prediction, answer) for answer in answers)


def check_origin(answers_path: str, rows: list[dict], question_file: str | None = None, changed: bool = False) -> None:
    """Whether the answers are all of one model, the one that the file beside them names, as it is now.

    Args:
        question_file: what should have been asked.
        changed: let the model have changed since.

    Raises:
        LlavaError: they are not.
    """
    models = sorted({str(row["model_id"]) for row in rows if "model_id" in row})
    if len(models) > 1:
        raise LlavaError(f"{answers_path}: found answers of {models[0]!r} and of {models[1]!r}, expected one model's")
    meta = answer_origin.read(answers_path)
    if meta is None:
        beside = answer_origin.meta_path(answers_path)
        print(f"note: {answers_path}: no {beside} says what weights and questions it is of", file=sys.stderr)
        return
    named = get_model_name_from_path(meta["model"])
    if models and models != [named]:
        raise LlavaError(f"{answers_path}: found answers of {models[0]!r}, but of {named!r} in the file beside it")
    if question_file is not None and answer_origin.file_hash(question_file) != meta["questions_hash"]:
        raise LlavaError(f"{answers_path}: found answers to another question file than {question_file} as it is now")
    if not changed and answer_origin.has_changed(answers_path, meta):
        raise LlavaError(
            f"{answers_path}: the model in {meta['model']} has changed since it answered (other weights or config); "
            "answer anew (model_vqa --overwrite), or --allow_changed_model scores them as they are"
        )


def evaluate(metric: str, answers_path: str, references_path: str) -> dict:
    """`{metric, score, n, missing, by_category, rows: [{question_id, text, score}]}`; scores between 0 and 1."""
    answers, references = read_file(answers_path), read_references(references_path)
    texts = match_answers(answers, references, (answers_path, references_path))
    rows, by_category = [], defaultdict(list)
    for text, reference in zip(texts, references, strict=True):
        try:
            score = score_row(metric, text or "", reference.row)
        except LlavaError as error:
            raise LlavaError(f"{references_path}: question {reference.key}: {error}") from None
        score = score if text is not None else 0.0
        rows.append({"question_id": reference.id, "text": text, "score": score})
        by_category[reference.category].append(score)
    return {
        "metric": metric,
        "score": sum(row["score"] for row in rows) / len(rows),
        "n": len(rows),
        "missing": texts.count(None),
        "by_category": {
            name: {"score": sum(part) / len(part), "n": len(part)} for name, part in sorted(by_category.items())
        },
        "rows": rows,
    }


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Score answers against references.")
    parser.add_argument("--answers", required=True, help="what llava.eval.model_vqa wrote, .jsonl")
    parser.add_argument("--references", required=True, help="true answers, .json or .jsonl")
    parser.add_argument("--metric", required=True, choices=("exact", "vqa", "textvqa", "anls", "relaxed", "choice"))
    parser.add_argument("--question-file", help="the questions, to be sure that it is these that were answered")
    parser.add_argument(
        *("--allow_changed_model", "--allow-changed-model"),
        action="store_true",
        help="score answers of a model whose weights have changed since",
    )
    parser.add_argument("--output", help="JSON to write, with the score of every row")
    return parser


@report_errors
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    check_origin(args.answers, read_file(args.answers), args.question_file, args.allow_changed_model)
    result = evaluate(args.metric, args.answers, args.references)
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
    if len(result["by_category"]) > 1:
        for name, part in result["by_category"].items():
            print(f"  {name:<16} {part['score']:.4f} (n={part['n']})")
    missing = f", {result['missing']} without an answer" if result["missing"] else ""
    print(f"{args.metric}: {result['score']:.4f} (n={result['n']}{missing})")
    if missing:
        first = next(row["question_id"] for row in result["rows"] if row["text"] is None)
        said = f"{result['missing']} of {result['n']} references have no answer (first: question {first}) and count 0"
        print(f"error: {args.answers}: {said}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
