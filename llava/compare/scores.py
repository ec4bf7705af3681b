"""From the runs' evaluation files to a comparison's scores, pairs of towers and what its design could have shown."""

import itertools
import math
from dataclasses import dataclass, field

from llava.compare.answers import Answers, read_answers
from llava.compare.statistics import LEVEL, detectable, estimate, holm, share_interval, summarise


@dataclass
class Scores:
    """The parts of results.json that come from answers; all but `details` is plain JSON, without NaN.

    scores: tower -> evaluation -> {mean, low, high, per_seed, n, by_kind, blank (where measured)}
    pairs: {evaluation, a, b, difference (a - b), low, high, p, p_holm, significant} of every two towers
    detectable: evaluation -> difference, or None
    groups: tower -> group -> mean over the group's evaluations, or None where one is missing
    notes: lines that belong above the table
    details: evaluation -> {image_folder, questions: [{key, id, kind, image, question, answer, predictions: {tower:
        {seed: text}}, correct: {tower: {seed: bool}}}]}
    rows: (tower, seed, evaluation, kind, score, n), the lines of results.csv; kind "all" is the total
    """

    scores: dict = field(default_factory=dict)
    pairs: list = field(default_factory=list)
    detectable: dict = field(default_factory=dict)
    groups: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)
    details: dict = field(default_factory=dict)
    rows: list = field(default_factory=list)


def read_scores(runs: dict, evaluations: list, groups: dict | None = None) -> Scores:
    """Read and compare what is there.

    A tower with one seed has intervals over images alone, and its differences no p value. P values are Holm's over all
    pairs of all evaluations, since all of them are in one table and any star in it is read as a finding.

    Args:
        runs: tower -> seed -> folder of the run.
        evaluations: names, or a recipe's evaluations; eval_NAME.json is read where a run has it.
        groups: name -> evaluations or tasks of lmms-eval, which are averaged.

    Raises:
        LlavaError: a file that cannot be read, or runs that were not asked the same questions.
    """
    result = Scores({tower: {} for tower in runs})
    found = read_answers(runs, [getattr(one, "name", one) for one in evaluations])
    for answers in found:
        _add(result, answers)
    for pair, p in zip(result.pairs, holm([pair["p"] for pair in result.pairs]), strict=True):
        pair["p_holm"], pair["significant"] = p, p is not None and p < LEVEL
    _add_groups(result, groups or {})
    result.notes = _notes(found) + result.notes
    return result


def image_groups(images: list) -> list[int]:
    """Number of the group of each question: questions that share an image, also over others between them, are one.

    Args:
        images: of each question, a name, a list of names, or None: a question without an image is a group of its own.
    """
    named = [[image] if isinstance(image, str) else list(image or ()) for image in images]
    above: dict[str, str] = {}

    def root(name: str) -> str:
        while above.setdefault(name, name) != name:
            above[name] = name = above[above[name]]
        return name

    for names in named:
        for name in names[1:]:
            above[root(name)] = root(names[0])
    numbers: dict = {}
    keys = [root(names[0]) if names else at for at, names in enumerate(named)]
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def _add(result: Scores, answers: Answers) -> None:
    summaries, sizes = _summaries(answers)
    for tower in answers.scores:
        result.scores[tower][answers.name] = _score(answers, tower, summaries, sizes)
    for a, b in itertools.combinations(answers.scores, 2):
        result.pairs.append(_pair(answers, a, b, summaries, sizes))
    result.detectable[answers.name] = detectable(list(summaries.values()), sizes) if summaries else None
    if answers.predictions:
        result.details[answers.name] = _details(answers)
    result.rows += _rows(answers)


def _score(answers: Answers, tower: str, summaries: dict, sizes: list[int]) -> dict:
    seeds = answers.scores[tower]
    row = {"mean": _mean(seeds.values()), "low": None, "high": None}
    if summaries:
        found = estimate(summaries[tower], None, sizes)
        low, high = (found.low, found.high) if answers.is_task else share_interval(found, len(sizes))
        row |= {"low": _finite(low), "high": _finite(high)}
    row |= {"per_seed": {str(seed): score for seed, score in seeds.items()}, "n": answers.n}
    row["by_kind"] = _by_kind(answers, tower)
    if tower in answers.blanks:
        row["blank"] = _blank(list(answers.blanks[tower].values()))
    return row


def _pair(answers: Answers, a: str, b: str, summaries: dict, sizes: list[int]) -> dict:
    import numpy as np

    pair = {"evaluation": answers.name, "a": a, "b": b}
    pair["difference"] = _mean(answers.scores[a].values()) - _mean(answers.scores[b].values())
    pair |= {"low": None, "high": None, "p": None}
    if summaries:
        found = estimate(summaries[a], summaries[b], sizes)
        most = np.inf if answers.is_task else 1.0  # of two shares
        pair |= {"low": _finite(np.clip(found.low, -most, most)), "high": _finite(np.clip(found.high, -most, most))}
        if min(len(answers.scores[a]), len(answers.scores[b])) > 1:
            pair["p"] = _finite(found.p)
    return pair


def _summaries(answers: Answers) -> tuple[dict, list[int]]:
    """(tower -> Summary, sizes of the groups of questions); nothing where single questions are not known."""
    import numpy as np

    if answers.questions is None:
        return {}, []
    groups = image_groups([question["image"] for question in answers.questions])
    sizes, summaries = np.bincount(groups), {}
    for tower, seeds in answers.values.items():
        sums = np.stack([np.bincount(groups, weights=values) for values in seeds.values()])
        summaries[tower] = summarise(sums, sizes)
    return summaries, sizes


def _kinds(answers: Answers) -> dict[str, list[int]]:
    """kind -> numbers of its questions."""
    kinds: dict[str, list[int]] = {}
    for at, question in enumerate(answers.questions or ()):
        if "kind" in question:
            kinds.setdefault(str(question["kind"]), []).append(at)
    return kinds


def _by_kind(answers: Answers, tower: str) -> dict:
    return {
        kind: {"mean": _mean([run[at] for run in answers.values[tower].values() for at in places]), "n": len(places)}
        for kind, places in _kinds(answers).items()
    }


def _blank(files: list[dict]) -> dict:
    """The control with blank pictures, averaged over seeds."""
    kinds = list(dict.fromkeys(kind for file in files for kind in file["by_kind"]))
    rows = {kind: [file["by_kind"][kind] for file in files if kind in file["by_kind"]] for kind in kinds}
    by_kind = {
        kind: {"mean": _mean([row["exact_match"] for row in found]), "chance": found[0].get("chance")}
        for kind, found in rows.items()
    }
    return {"mean": _mean([file["exact_match"] for file in files]), "by_kind": by_kind}


def _details(answers: Answers) -> dict:
    questions = []
    for at, question in enumerate(answers.questions):
        predictions, correct = (
            {tower: {str(seed): kind(run[at]) for seed, run in seeds.items()} for tower, seeds in of.items()}
            for of, kind in ((answers.predictions, str), (answers.values, bool))
        )
        questions.append({"key": at, **question, "predictions": predictions, "correct": correct})
    return {"image_folder": answers.image_folder, "questions": questions}


def _rows(answers: Answers) -> list[tuple]:
    rows, kinds = [], _kinds(answers)
    for tower, seeds in answers.scores.items():
        for seed, score in seeds.items():
            rows.append((tower, seed, answers.name, "all", score, answers.n))
            for kind, places in kinds.items():
                values = [answers.values[tower][seed][at] for at in places]
                rows.append((tower, seed, answers.name, kind, _mean(values), len(places)))
    return rows


def _add_groups(result: Scores, groups: dict) -> None:
    for tower, scores in result.scores.items():
        for group, members in groups.items():
            missing = [name for name in members if name not in scores]
            mean = None if missing or not members else _mean([scores[name]["mean"] for name in members])
            result.groups.setdefault(tower, {})[group] = mean
            if missing and scores:
                result.notes.append(f"{tower}: no mean of {group}, since {', '.join(missing)} is missing")


def _notes(found: list[Answers]) -> list[str]:
    notes = []
    counts = {tower: len(seeds) for answers in found for tower, seeds in answers.scores.items()}
    for answers in found:
        for tower, seeds in answers.scores.items():
            counts[tower] = min(counts[tower], len(seeds))
    single = [tower for tower, count in counts.items() if count == 1]
    if single and len(single) == len(counts):
        said = "intervals are over images alone, and no difference is marked as significant"
        notes.append(f"one seed: seed noise unmeasured; {said}")
    elif single:
        said = "its intervals are over images alone, and no difference to it is marked as significant"
        notes.append(f"one seed of {', '.join(single)}: seed noise unmeasured; {said}")
    reasons: dict[str, list[str]] = {}
    for answers in found:
        if answers.note:
            reasons.setdefault(f"{answers.note}: no intervals and no p values", []).append(answers.name)
        elif answers.is_task and not any(question["image"] for question in answers.questions):
            reason = "which questions share an image is not known, so each counts as independent of the others"
            reasons.setdefault(reason, []).append(answers.name)
        elif len(set(image_groups([question["image"] for question in answers.questions]))) < 2:
            reasons.setdefault("all questions are about one image: no intervals and no p values", []).append(
                answers.name
            )
    return notes + [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]


def _mean(values) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def _finite(value) -> float | None:
    return float(value) if math.isfinite(value) else None
