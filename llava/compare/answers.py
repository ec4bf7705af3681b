"""What the runs of a comparison answered: their evaluation files, read and held against each other."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from llava.errors import LlavaError

_SHARED = ("id", "kind", "image", "question", "answer")


@dataclass
class Answers:
    """One evaluation of all runs.

    scores: tower -> seed -> the run's score, as its file has it
    n: number of questions; None where a task does not say
    questions: what all runs were asked, {id, kind, image, question, answer} each (of a task {id, image}); None where
        only the score is known
    values: tower -> seed -> one number for each question, whose mean is the score; empty where `questions` is None
    predictions: tower -> seed -> texts; empty for a task
    blanks: tower -> seed -> the file's `blank_images`
    image_folder: where the questions' images are, of exact match
    note: why there are no numbers for each question
    """

    name: str
    scores: dict = field(default_factory=dict)
    n: int | None = None
    questions: list[dict] | None = None
    values: dict = field(default_factory=dict)
    predictions: dict = field(default_factory=dict)
    blanks: dict = field(default_factory=dict)
    image_folder: str | None = None
    note: str | None = None
    is_task: bool = False


def read_answers(runs: dict, names: list[str]) -> list[Answers]:
    """All evaluations, in the order of `names`; a file of lmms-eval holds one for each task.

    Args:
        runs: tower -> seed -> folder, with eval_NAME.json in it. A run without the file has no part in that evaluation.

    Raises:
        LlavaError: a file that cannot be read, or runs that were not asked the same questions.
    """
    found = []
    for name in names:
        files = {}
        for tower, seeds in runs.items():
            for seed, folder in sorted(seeds.items()):
                path = Path(folder) / f"eval_{name}.json"
                if path.is_file():
                    files[tower, seed] = (path, _read(path))
        kinds = {content.get("kind", "exact_match") for _, content in files.values()}
        if len(kinds) > 1:
            path = next(iter(files.values()))[0]
            raise LlavaError(
                f"{path}: evaluations of {name} are of kinds {sorted(kinds)}, expected one kind in all runs"
            )
        if kinds == {"lmms_eval"}:
            found += _tasks(files)
        elif files:
            found.append(_exact_match(name, files))
    seen = set()
    for answers in found:
        if answers.name in seen:
            raise LlavaError(f"{answers.name}: two evaluations or tasks have this name, expected different ones")
        seen.add(answers.name)
    return found


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LlavaError(f"{path}: cannot be read ({error}), expected the JSON of an evaluation") from None
    kind = content.get("kind", "exact_match") if isinstance(content, dict) else None
    needed = {"exact_match": "questions", "lmms_eval": "tasks"}.get(kind)
    if needed is None or needed not in content:
        raise LlavaError(f"{path}: has no questions and no tasks, expected those of an evaluation")
    return content


def _exact_match(name: str, files: dict) -> Answers:
    answers = Answers(name)
    for (tower, seed), (path, content) in files.items():
        rows = content["questions"]
        if not rows:
            raise LlavaError(f"{path}: has no questions, expected at least one")
        try:
            asked = [{key: row[key] for key in _SHARED} for row in rows]
            values = [float(bool(row["correct"])) for row in rows]
            predictions = [str(row["prediction"]) for row in rows]
        except (KeyError, TypeError) as error:
            raise LlavaError(f"{path}: a question lacks {error}, expected what llava.eval.exact_match writes") from None
        if answers.questions is None:
            answers.questions, answers.n, first = asked, len(asked), path
            answers.image_folder = content.get("image_folder")
        _check_same(asked, path, answers.questions, first, _SHARED)
        answers.values.setdefault(tower, {})[seed] = values
        answers.scores.setdefault(tower, {})[seed] = math.fsum(values) / len(values)
        answers.predictions.setdefault(tower, {})[seed] = predictions
        if content.get("blank_images"):
            answers.blanks.setdefault(tower, {})[seed] = content["blank_images"]
    return answers


def _check_same(asked: list[dict], path: Path, expected: list[dict], first: Path, keys: tuple) -> None:
    if len(asked) != len(expected):
        raise LlavaError(f"{path}: has {len(asked)} questions, expected the {len(expected)} of {first}")
    for at, (one, other) in enumerate(zip(asked, expected, strict=True)):
        for key in keys:
            if one[key] != other[key]:
                where = f"{path}: question {at} (id {one['id']})"
                raise LlavaError(f"{where}: {key} is {one[key]!r}, expected {other[key]!r} as in {first}")


# --- lmms-eval --------------------------------------------------------------------------------------------------------


def _tasks(files: dict) -> list[Answers]:
    names = list(dict.fromkeys(task for _, content in files.values() for task in content["tasks"]))
    return [_task(name, {run: file for run, file in files.items() if name in file[1]["tasks"]}) for name in names]


def _task(name: str, files: dict) -> Answers:
    answers, metric, first = Answers(name, is_task=True), None, None
    for (tower, seed), (path, content) in files.items():
        row = content["tasks"][name]
        score, n = _number(row.get("score"), f"{path}: task {name}: score"), row.get("n")
        if first is None:
            metric, answers.n, first = row.get("metric"), n, path
        for key, value, expected in (("metric", row.get("metric"), metric), ("n", n, answers.n)):
            if value != expected:
                raise LlavaError(f"{path}: task {name}: {key} is {value!r}, expected {expected!r} as in {first}")
        answers.scores.setdefault(tower, {})[seed] = score
    if not all(content.get("samples", {}).get(name) for _, content in files.values()):
        answers.note = "no scores of single questions (--log_samples)"
        return answers
    _take_samples(answers, files, first)
    factor = _factor(answers)
    if factor is None:
        answers.values, answers.questions = {}, None
        answers.note = "the score is not the mean of its questions' scores"
        return answers
    for seeds in answers.values.values():
        for seed, values in seeds.items():
            seeds[seed] = [factor * value for value in values]
    return answers


def _take_samples(answers: Answers, files: dict, first: Path) -> None:
    """Scores of single questions, in the first run's order: several processes may have written them in another."""
    name, places = answers.name, None
    for (tower, seed), (path, content) in files.items():
        rows = content["samples"][name]
        if answers.questions is None:
            answers.questions = [{"id": row.get("id"), "image": row.get("image")} for row in rows]
            places = {row["id"]: at for at, row in enumerate(answers.questions)}
        if len(places) == len(answers.questions) and all(row.get("id") in places for row in rows):
            rows = sorted(rows, key=lambda row: places[row["id"]])
        asked = [{"id": row.get("id"), "image": row.get("image")} for row in rows]
        _check_same(asked, f"{path}: task {name}", answers.questions, first, ("id", "image"))
        where = f"{path}: task {name}: score of a question"
        answers.values.setdefault(tower, {})[seed] = [_number(row.get("score"), where) for row in rows]


def _factor(answers: Answers) -> int | None:
    """1 or 100, where every run's score is so many times the mean of its questions' scores; None where it is not."""
    runs = [
        (answers.scores[tower][seed], math.fsum(values) / len(values))
        for tower, seeds in answers.values.items()
        for seed, values in seeds.items()
    ]
    for factor in (1, 100):
        if all(math.isclose(score, factor * mean, rel_tol=1e-4, abs_tol=1e-6 * factor) for score, mean in runs):
            return factor
    return None


def _number(value, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise LlavaError(f"{where} is {value!r}, expected a number")
    return float(value)
