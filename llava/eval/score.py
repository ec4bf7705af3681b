"""Score the answers that `llava.eval.model_vqa` wrote.

    python -m llava.eval.score --answers A.jsonl --references R.json --metric vqa

The references are a list (.json) or lines (.jsonl) of `{question_id, answer}`, or `answers` where there are several.
The metrics are of `llava.eval.scorers`:

- exact: the same text as the answer, or as one of them
- vqa: VQA accuracy, against the answers of ten people (texts, or `{"answer": text}` as VQA has them)
- anls: similarity to the nearest answer
- relaxed: ChartQA's, the best over the answers
- choice: `options` (or `choices`), and `answer` the true letter or text

Where an id stands for several questions, `text` (or `question`), the question, tells them apart. A reference without an
answer row counts 0.
"""

import argparse
import json
from collections import defaultdict

from llava.data.records import read_file
from llava.errors import LlavaError, report_errors
from llava.eval import scorers


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
    if metric == "vqa":
        return scorers.vqa_accuracy(prediction, answers)
    if metric == "anls":
        return scorers.anls(prediction, answers)
    if metric == "choice":
        options = row.get("options", row.get("choices"))
        if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
            raise LlavaError(f"options: found {options!r}, expected a list of texts")
        return scorers.multiple_choice(prediction, answers[0], options)
    compare = scorers.relaxed_accuracy if metric == "relaxed" else scorers.exact_match
    return max(compare(prediction, answer) for answer in answers)


def key_of(path: str, number: int, row: dict) -> str:
    name = row.get("question_id", row.get("id"))
    if name is None:
        raise LlavaError(f"{path}: row {number}: found no question_id")
    return str(name)


def match_answers(answers: list[dict], references: list[dict], paths: tuple[str, str]) -> list[str | None]:
    """The predicted text of every reference, None where there is no answer row.

    Raises:
        LlavaError: an answer that belongs to no reference, or two for one.
    """
    by_key = defaultdict(list)
    for number, row in enumerate(answers, start=1):
        if not isinstance(row.get("text"), str):
            raise LlavaError(f"{paths[0]}: row {number}: text: found {row.get('text')!r}, expected the answer")
        by_key[key_of(paths[0], number, row)].append(row)
    counts = defaultdict(int)
    for number, row in enumerate(references, start=1):
        counts[key_of(paths[1], number, row)] += 1
    matched, used = [], 0
    for number, reference in enumerate(references, start=1):
        key = key_of(paths[1], number, reference)
        rows = by_key.get(key, [])
        if counts[key] > 1:
            question = reference.get("text", reference.get("question"))
            rows = [row for row in rows if row.get("prompt") == question]
        if len(rows) > 1:
            raise LlavaError(f"{paths[0]}: question {key}: found {len(rows)} answers, expected one")
        matched.append(rows[0]["text"] if rows else None)
        used += len(rows)
    if used < len(answers):
        extra = next((key for key in by_key if key not in counts), None)
        where = f"question {extra}" if extra else f"{len(answers) - used} answers"
        raise LlavaError(f"{paths[0]}: {where}: found no reference in {paths[1]}")
    return matched


def evaluate(metric: str, answers_path: str, references_path: str) -> dict:
    """`{metric, score, n, missing, by_category, rows: [{question_id, text, score}]}`; scores between 0 and 1."""
    answers, references = read_file(answers_path), read_file(references_path)
    if not references:
        raise LlavaError(f"{references_path}: found no row, expected true answers")
    texts = match_answers(answers, references, (answers_path, references_path))
    rows, by_category = [], defaultdict(list)
    for number, (text, reference) in enumerate(zip(texts, references, strict=True), start=1):
        key = key_of(references_path, number, reference)
        try:
            score = score_row(metric, text or "", reference) if text is not None else 0.0
        except LlavaError as error:
            raise LlavaError(f"{references_path}: question {key}: {error}") from None
        rows.append({"question_id": reference.get("question_id", reference.get("id")), "text": text, "score": score})
        by_category[str(reference.get("category", "all"))].append(score)
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
    parser.add_argument("--metric", required=True, choices=("exact", "vqa", "anls", "relaxed", "choice"))
    parser.add_argument("--output", help="JSON to write, with the score of every row")
    return parser


@report_errors
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    result = evaluate(args.metric, args.answers, args.references)
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
    if len(result["by_category"]) > 1:
        for name, part in result["by_category"].items():
            print(f"  {name:<16} {part['score']:.4f} (n={part['n']})")
    missing = f", {result['missing']} without an answer" if result["missing"] else ""
    print(f"{args.metric}: {result['score']:.4f} (n={result['n']}{missing})")


if __name__ == "__main__":
    main()
