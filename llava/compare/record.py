"""What has become of a comparison's runs: `compare.json` in each run's folder, `state.json` in the comparison's."""

import json
from pathlib import Path

from llava.compare.plan import Run
from llava.errors import LlavaError
from llava.train.checkpoints import write_json
from llava.train.recipe_settings import digest
from llava.train.recipe_state import read_recipe_state

FILE, STATE = "compare.json", "state.json"


def read_json(path: Path) -> dict:
    """The content of a JSON file; {} where there is none, or none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def asked(run: Run) -> str:
    """A hash of all that a run is asked for, its evaluations included."""
    return digest([list(run.words), run.prints])


def tell(run: Run, status: str, error: str | None = None, seconds: float = 0.0) -> None:
    """Write what has become of a run: finished, failed or preempted, with the line that says why."""
    run.folder.mkdir(parents=True, exist_ok=True)
    content = {"status": status, "error": error, "seconds": round(seconds, 1), "asked": asked(run)}
    write_json(run.folder / FILE, content | {"stages": run.prints})


def status_of(run: Run) -> tuple[str, str | None]:
    """(finished, failed, preempted or missing; why it failed) of a run as it is asked for now."""
    told = read_json(run.folder / FILE)
    if not told:
        return _status_by_hand(run)
    if told.get("asked") != asked(run):
        return "missing", None
    return told.get("status", "missing"), told.get("error")


def _status_by_hand(run: Run) -> tuple[str, str | None]:
    """The same of a run that its command alone has made, as `--dry-run` lists it: what its recipe.json says."""
    state = read_recipe_state(run.folder) or {}
    before = {one.get("name"): one.get("settings") for one in state.get("stages", ())}
    parts = [*state.get("stages", ()), *state.get("evaluations", ())]
    if not parts or any(plan.changed(before.get(plan.stage.name)) for plan in run.stages):
        return "missing", None
    failed = next((one for one in parts if one.get("status") == "failed"), None)
    if failed is not None:
        return "failed", f"{failed.get('name')}: {failed.get('last_line')}"
    return ("finished" if all(one.get("status") == "finished" for one in parts) else "missing"), None


def check_name(out: Path, name: str) -> dict:
    """The content of a folder's `state.json`, {} where there is none.

    Raises:
        LlavaError: another comparison has the folder.
    """
    state = read_json(out / STATE)
    if not state and (out / "runs").exists():
        raise LlavaError(f"output: {out} holds runs without {STATE}, expected a comparison's folder, or a new one")
    if state and state.get("name") != name:
        raise LlavaError(
            f"output: {out} holds the comparison {state.get('name')!r}, expected {name!r}, or a folder of its own"
        )
    return state


def check_folder(out: Path, name: str, runs: list[Run], common: dict) -> None:
    """Refuse a folder that holds another comparison; more towers and seeds than before are the same one.

    Args:
        common: {what: value} of what a comparison cannot change, such as its recipe and its evaluations.

    Raises:
        LlavaError: names what is another.
    """
    state = check_name(out, name)
    if not state:
        return
    here = f"output: {out} holds the comparison {name!r}"
    if state.get("hash") != digest(common):
        before = state.get("common") or {}
        changed = [key for key in {**before, **common} if before.get(key) != common.get(key)]
        text = "; ".join(f"{key} {before.get(key)}, now {common.get(key)}" for key in changed)
        raise LlavaError(f"{here} with other settings ({text}); expected the same, or a folder of its own")
    for run in runs:
        told = read_json(run.folder / FILE).get("stages")
        other = [stage for stage, mark in (told or {}).items() if run.prints.get(stage) != mark]
        if other:
            raise LlavaError(
                f"{here}, where {run.name} was trained with other settings ({_changed(run, other[0])}); expected the "
                f"same, or a folder of its own, or {run.folder} removed"
            )


def _changed(run: Run, stage: str) -> str:
    """What is another in a stage's settings, as far as its recipe.json tells."""
    before = read_recipe_state(run.folder) or {}
    settings = {one.get("name"): one.get("settings") for one in before.get("stages", ())}
    plan = next(plan for plan in run.stages if plan.stage.name == stage)
    return f"{stage}: {plan.changed(settings.get(stage)) or 'other data'}"


def write_state(out: Path, name: str, common: dict, **values) -> None:
    """Change `state.json`; what is not given stays."""
    out.mkdir(parents=True, exist_ok=True)
    before = read_json(out / STATE)
    write_json(out / STATE, before | {"schema": 1, "name": name, "hash": digest(common), "common": common} | values)
