"""From a comparison's runs to results.json and the report, whatever is there of them."""

import json
import signal
import socket
import sys
from pathlib import Path

from llava.compare import record
from llava.compare.comparison import Comparison, Entry
from llava.compare.driver import Plan
from llava.compare.plan import Run
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
    chosen = plan.chosen(entry)
    told = {run.name: record.status_of(run) for run in chosen or plan.of(entry)}
    failed = [f"{name}: {error}" for name, (status, error) in told.items() if status == "failed"]
    done = sum(status == "finished" for status, _ in told.values()) if chosen else 0
    whole = bool(chosen) and done == len(told)
    status = "finished" if whole else "partial" if done else "failed" if failed else "missing"
    row = {"name": entry.name, "config": entry.tower, "status": status, "error": failed[0] if failed else None}
    return row | {"n_seeds": done, "learning_rate": chosen[0].learning_rate if chosen else None}


def _notes(plan: Plan) -> list[str]:
    comparison, notes = plan.comparison, []
    if comparison.chooses_rates:
        held = plan.out / "validation" / "validation.json"
        count = len(json.loads(held.read_text(encoding="utf-8"))) if held.is_file() else 0
        notes.append(
            f"Learning rates of {comparison.learning_rate_stage} were chosen on {count} records of images that no run "
            "was trained on; the evaluations took no part in it."
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
    file, asked = plan.out / "cost.json", {name: record.asked(run) for name, run in runs.items()}
    before = record.read_json(file)
    if before.get("asked") == asked or not measure or not runs:
        same = before.get("asked") == asked
        return (before["costs"], before["notes"]) if same else ({}, [])
    subjects = {name: subject(plan.comparison, run) for name, run in runs.items()}
    found = _ask("llava.compare.cost", plan.out / "cost_subjects.json", {"subjects": subjects}, file)
    if found.get("costs") is None:
        return {}, [f"What the towers cost could not be measured: {found['error']}"]
    kept = {"asked": asked, "host": found.get("host"), "notes": found.get("notes") or [], "costs": found["costs"]}
    write_json(file, kept)
    return kept["costs"], kept["notes"]


def subject(comparison: Comparison, run: Run) -> dict:
    """What `llava.compare.cost` measures: the model of a run, with the choice of patches it was evaluated with."""
    from llava.config import resolve

    settings = resolve(run.stages[-1].argv)
    alone = settings["lora_enable"] or not any(run.model.glob("model*.safetensors"))
    values = comparison.values_of(run.entry)
    chosen = next((value for (_, key), value in values.items() if key == "selections" and value), None)
    chosen = chosen[0] if isinstance(chosen, list) else chosen
    base = settings["model_name_or_path"] if alone else None
    return {"model": str(run.model), "argv": run.stages[-1].argv, "base": base, "selection": chosen}


def _probe(plan: Plan, folder: str, results: dict) -> None:
    """Probe the towers as their YAMLs name them, and add how far that ranking agrees with the scores'."""
    from llava.compare.probe import agreement

    argv = {entry.name: plan.of(entry)[0].stages[0].check_argv for entry in plan.comparison.entries}
    asked = {"folder": folder, "output": str(plan.out / "probe"), "towers": argv}
    found = _ask("llava.compare.probing", plan.out / "probe_asked.json", asked, plan.out / "probe.json")
    if found.get("towers") is None:
        results["notes"].append(f"The towers could not be probed: {found['error']}")
        return
    for tower in results["towers"]:
        tower["probe"] = found["towers"].get(tower["name"])
    first = plan.comparison.measured[0]
    scores = {tower["name"]: tower["scores"].get(first, {}).get("mean") for tower in results["towers"]}
    linear = {name: row.get("linear") for name, row in found["towers"].items()}
    results["probe_agreement"] = agreement(linear, scores)


def _ask(module: str, file: Path, content: dict, answer: Path) -> dict:
    """What a program of this project writes to `answer` for the content of `file`; {"error": its last line}."""
    write_json(file, content)
    answer.unlink(missing_ok=True)
    status, last = run_child([sys.executable, "-m", module, str(file), str(answer)], answer.with_suffix(".log"))
    found = record.read_json(answer)
    return found if found and not status else {"error": last or f"ended with status {status}"}


def run_child(words: list[str], log: Path) -> tuple[int, str]:
    """(exit status, last line) of a program, which gets the signals that come meanwhile; its progress is shown, and
    what it says otherwise is in its log.

    Raises:
        Interrupted: a signal came.
    """
    child: list[Child] = []
    with open(log, "wb") as file, handing_on(lambda number: [one.tell(number) for one in child]) as came:
        child.append(Child(words, None, file.fileno(), 2))
        status = child[0].wait()
    if came:
        raise Interrupted(came)
    return status, child[0].last_line


class Interrupted(Exception):
    """Signals came; `status` is the exit status that they ask for."""

    def __init__(self, came: list[int]):
        super().__init__("stopped; the same command goes on")
        self.status = 130 if signal.SIGINT in came else 0
