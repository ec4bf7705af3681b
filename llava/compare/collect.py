"""From a comparison's runs to results.json and the report, whatever is there of them."""

import json
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

from llava.compare import record
from llava.compare.comparison import Comparison, Entry
from llava.compare.driver import Plan
from llava.compare.plan import Run, is_whole
from llava.errors import LlavaError
from llava.train.checkpoints import write_json
from llava.train.children import Child, handing_on
from llava.train.recipe_state import commit

RESULTS = "results.json"


def collect(plan: Plan, probe_folder: str | None = None, cost: bool = True) -> tuple[dict, list[Path]]:
    """Write results.json and the report of what is there.

    Args:
        probe_folder: labelled pictures for `llava.compare.probe`.
        cost: measure what the towers cost, where it is not known yet.

    Returns:
        (the content of results.json, the files that were written).

    Raises:
        LlavaError: evaluations that are not of the same questions, or a probe's folder that is none.
    """
    from llava.compare.report import write_report
    from llava.compare.scores import read_scores

    comparison = plan.comparison
    towers = [_tower(plan, entry) for entry in comparison.entries]
    finished = {entry.name: _finished(plan, entry) for entry in comparison.entries}
    folders = {name: {run.seed: run.folder for run in runs} for name, runs in finished.items() if runs}
    state = record.read_json(plan.out / record.STATE)
    results = {"schema": 1, "name": comparison.name, "commit": commit(), "host": socket.gethostname()}
    results |= {"match": comparison.match, "seeds": list(comparison.seeds), "towers": towers}
    scored = read_scores(folders, comparison.recipe.evaluations, comparison.groups)
    for tower in towers:
        tower["scores"] = scored.scores.get(tower["name"], {})
    results |= {"pairs": scored.pairs, "detectable_difference": scored.detectable, "groups": scored.groups}
    results |= {"differences": state.get("differences") or []}
    results |= {"fixed": state.get("fixed") or {}, "fixed_hash": state.get("fixed_hash")}
    notes = [*_notes(plan), *scored.notes]
    costs, said = _cost(plan, {name: runs[0] for name, runs in finished.items() if runs}, measure=cost)
    for tower in towers:
        tower["cost"] = costs.get(tower["name"])
    results["notes"] = [*notes, *said]
    if probe_folder is not None:
        _probe(plan, probe_folder, results)
    write_json(plan.out / RESULTS, results)
    return results, [plan.out / RESULTS, *write_report(plan.out, results, scored.details)]


def _finished(plan: Plan, entry: Entry) -> list[Run]:
    return [run for run in plan.chosen(entry) if record.status_of(run)[0] == "finished"]


def _tower(plan: Plan, entry: Entry) -> dict:
    """The row of a tower: finished, partial (some seeds), failed, or missing (not begun, or not at its end)."""
    runs = plan.chosen(entry)
    told = [record.status_of(run) for run in runs] if runs else [record.status_of(run) for run in plan.of(entry)]
    done = sum(status == "finished" for status, _ in told) if runs else 0
    failed = [
        f"{run.name}: {error}"
        for run, (status, error) in zip(runs or plan.of(entry), told, strict=True)
        if status == "failed"
    ]
    whole = bool(runs) and done == len(runs)
    status = "finished" if whole else "partial" if done else "failed" if failed else "missing"
    rate = runs[0].learning_rate if runs else None
    row = {"name": entry.name, "config": entry.tower, "status": status, "error": failed[0] if failed else None}
    return row | {"n_seeds": done, "learning_rate": rate}


def _notes(plan: Plan) -> list[str]:
    comparison, notes = plan.comparison, []
    if comparison.chooses_rates:
        held = plan.out / "validation" / "validation.json"
        count = len(json.loads(held.read_text(encoding="utf-8"))) if held.is_file() else 0
        notes.append(
            f"Learning rates of {comparison.learning_rate_stage} were chosen on {count} records of images that no run was "
            "trained on; the evaluations took no part in it."
        )
        for entry in comparison.entries:
            lost = [run.name for run in plan.of(entry) if run not in plan.chosen(entry) and not _graded(run)]
            if entry.learning_rates and lost:
                notes.append(
                    f"{entry.name}: learning rates without all their seeds were not chosen: {', '.join(lost)}."
                )
    return notes


def _graded(run: Run) -> bool:
    from llava.compare.validation import score_of

    return score_of(run) is not None


def is_complete(plan: Plan, results: dict) -> bool:
    """Whether all runs are finished, those of learning rates that were not chosen included."""
    rates = all(_graded(run) for run in plan.runs if run.learning_rate is not None)
    return rates and all(tower["status"] == "finished" for tower in results["towers"])


# --- cost and probe ---------------------------------------------------------------------------------------------------


def _cost(plan: Plan, runs: dict[str, Run], measure: bool) -> tuple[dict, list[str]]:
    """({tower: cost}, notes); what was measured before of the same runs stays."""
    from llava.compare.cost import write_subjects

    file, subjects = plan.out / "cost.json", plan.out / "cost_subjects.json"
    before = record.read_json(file)
    asked = {name: record.asked(run) for name, run in runs.items()}
    if before.get("asked") == asked and before.get("towers"):
        return before["towers"], before.get("notes") or []
    if not measure or not runs:
        return {}, []
    write_subjects(subjects, {name: subject(plan.comparison, run) for name, run in runs.items()})
    made = plan.out / "cost_measured.json"
    status, last = run_child([sys.executable, "-m", "llava.compare.cost", str(subjects), str(made)])
    if status:
        return {}, [f"What the towers cost could not be measured: {last}"]
    content = record.read_json(made)
    write_json(file, {"asked": asked, "towers": content.get("towers") or {}, "notes": content.get("notes") or []})
    return content.get("towers") or {}, content.get("notes") or []


def subject(comparison: Comparison, run: Run) -> dict:
    """What `llava.compare.cost` measures of a run."""
    return {"model": str(run.model), "argv": run.stages[-1].argv}


def run_child(words: list[str], env: dict[str, str] | None = None) -> tuple[int, str]:
    """(exit status, last line) of a program that a signal ends with this one."""
    child: list[Child] = []
    with handing_on(lambda number: [one.tell(number) for one in child]) as came:
        child.append(Child(words, env, 2, 2))
        status = child[0].wait()
    if came:
        raise KeyboardInterrupt if signal.SIGINT in came else SystemExit(0)
    return status, child[0].last_line
