"""The runs of a comparison, one recipe run for each tower, seed and learning rate, and the stages that they share."""

import hashlib
import os
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from llava.compare.comparison import Comparison, Entry, Values, layered, words
from llava.errors import LlavaError
from llava.train.recipe_file import Overrides
from llava.train.recipe_settings import StagePlan, digest, plan_stages

TOWER = "mm_vision_tower"  # the part that a frozen entry leaves out


@dataclass(frozen=True)
class Run:
    """One run of the recipe.

    Attributes:
        folder: its output folder.
        words: what the recipe's command gets beside FILE and --output_dir.
        stages: of `plan_stages`, in their order.
        prints: {stage: fingerprint}; stages of one fingerprint are the same training.
    """

    entry: Entry
    seed: int
    learning_rate: float | None
    folder: Path
    words: tuple[str, ...]
    stages: tuple[StagePlan, ...] = field(hash=False, compare=False, default=())
    prints: dict[str, str] = field(hash=False, compare=False, default_factory=dict)

    @property
    def name(self) -> str:
        rate = "" if self.learning_rate is None else f"/lr_{self.learning_rate:g}"
        return f"{self.entry.name}/seed_{self.seed}{rate}"

    @property
    def model(self) -> Path:
        """The folder of the last stage, which is what is compared."""
        return self.stages[-1].folder


def plan_runs(comparison: Comparison, out: Path, data: dict[str, str] | None = None) -> list[Run]:
    """All runs of a comparison, in the order of its entries, seeds and learning rates.

    Args:
        out: the comparison's folder.
        data: {stage: data file without the validation images}, where learning rates are chosen.

    Raises:
        LlavaError: what `plan_stages` refuses, or a tower that is frozen where nothing else is trained.
    """
    runs = []
    for entry in comparison.entries:
        for seed in comparison.seeds:
            for rate in entry.learning_rates or (None,):
                runs.append(_plan(comparison, entry, seed, rate, out, data or {}))
    return runs


def _plan(comparison: Comparison, entry: Entry, seed: int, rate: float | None, out: Path, data: dict) -> Run:
    values = comparison.values_of(entry)
    values |= {(stage, "data_path"): path for stage, path in data.items()}
    values[None, "seed"] = seed
    if rate is not None:
        values[comparison.learning_rate_stage, "learning_rate"] = rate
    if entry.frozen:
        values = layered(comparison.recipe, values, _without_tower(comparison, entry, values))
    tower = [] if entry.tower is None else ["--tower", entry.tower]
    run = Run(entry, seed, rate, Path(), (*tower, *words(values)))
    run = replace(run, folder=out / "runs" / run.name)
    try:
        stages = plan_stages(comparison.recipe, run.folder, Overrides(comparison.recipe, list(run.words)))
    except LlavaError as error:
        raise LlavaError(f"{comparison.path}: towers: {entry.name}: {error}") from None
    prints = {plan.stage.name: _print(plan) for plan in stages}
    # what a stage starts from was trained on data of its own
    for plan in stages:
        if plan.stage.source is not None:
            prints[plan.stage.name] = digest([prints[plan.stage.name], prints[plan.stage.source]])
    return replace(run, stages=tuple(stages), prints=prints)


def _without_tower(comparison: Comparison, entry: Entry, values: Values) -> Values:
    """The trained parts of each stage that trains the tower, without it; other stages stay as they are."""
    from llava.config import resolve
    from llava.constants import TUNABLE_PARTS
    from llava.families.settings import trained_parts

    found, tower = {}, [] if entry.tower is None else ["--tower", entry.tower]
    given = [*tower, *words(values)]
    for plan in plan_stages(comparison.recipe, Path("run"), Overrides(comparison.recipe, given)):
        parts = trained_parts(resolve(plan.check_argv))
        if TOWER not in parts:
            continue
        left = [part for part in TUNABLE_PARTS if part in parts and part != TOWER]
        if not left:
            raise LlavaError(
                f"{comparison.path}: towers: {entry.name}: frozen, but {plan.stage.name} trains the vision tower "
                "alone; expected another part to train"
            )
        found[plan.stage.name, "mm_tunable_parts"] = ",".join(left)
    return found


# --- what the stages are trained on -----------------------------------------------------------------------------------


def _print(plan: StagePlan) -> str:
    """A hash of what a stage is trained with; of its data by their content, wherever they lie."""
    path = plan.settings.get("data_path")
    content = data_hash(path) if isinstance(path, str) else None
    left_out = {"from"} if content is None else {"from", "data_path"}
    settings = {key: value for key, value in plan.settings.items() if key not in left_out}
    return digest([settings, plan.stage.passes, content])


def data_hash(path: str) -> str | None:
    """Of the content of the files that a `data_path` names; None where one of them is not there."""
    from llava.data.records import data_files

    files = [path, *data_files(path)] if path.endswith((".yaml", ".yml")) else data_files(path)
    if not files or not all(map(os.path.isfile, files)):
        return None
    return digest([file_hash(file) for file in files])


def file_hash(path: str) -> str:
    found = os.stat(path)
    return _file_hash(path, found.st_size, found.st_mtime_ns)


@cache
def _file_hash(path: str, *_) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


# --- stages that several runs have in common --------------------------------------------------------------------------


def is_whole(folder: Path) -> bool:
    """A stage's folder is there, finished, and the run's own."""
    from llava.train.stage_end import read_state_of

    return not folder.is_symlink() and read_state_of(folder) == "finished"


def owners(runs: list[Run], everything: list[Run] | None = None) -> dict[str, Run]:
    """{fingerprint: the run that trains that stage}: one that has begun it, else the first one.

    Args:
        runs: those that are to be run.
        everything: all of the comparison, among which there may be one that has trained the stage before.
    """
    found: dict[str, Run] = {}
    for begun in (is_whole, lambda folder: folder.is_dir() and not folder.is_symlink(), None):
        for run in runs if begun is None else everything or runs:
            for plan in run.stages:
                if begun is None or begun(plan.folder):
                    found.setdefault(run.prints[plan.stage.name], run)
    return found


def shared_stages(runs: list[Run], owner: dict[str, Run]) -> list[tuple[Run, str]]:
    """(run, stage) of each training that another run is waiting for, in the order in which they can be trained."""
    found = []
    stages = [plan.stage.name for plan in runs[0].stages] if runs else []
    for stage in stages:
        for run in dict.fromkeys(owner[run.prints[stage]] for run in runs if owner[run.prints[stage]] is not run):
            found.append((run, stage))
    return found


def link_shared(run: Run, owner: dict[str, Run], until: str | None = None) -> None:
    """Put a link to the owner's folder where a stage of this run is another's.

    Raises:
        LlavaError: the other has not finished it.
    """
    for plan in run.stages:
        other = owner[run.prints[plan.stage.name]]
        if other is not run and not is_whole(plan.folder):
            theirs = next(one.folder for one in other.stages if one.stage.name == plan.stage.name)
            if not is_whole(theirs):
                raise LlavaError(f"needs {plan.stage.name} of {other.name}, which is not finished")
            _link(plan.folder, theirs)
        elif plan.folder.is_symlink():
            plan.folder.unlink()
        if plan.stage.name == until:
            return


def _link(folder: Path, theirs: Path) -> None:
    wanted = os.path.relpath(theirs, folder.parent)
    if folder.is_symlink():
        if os.readlink(folder) == wanted:
            return
        folder.unlink()
    elif folder.is_dir():
        raise LlavaError(f"{folder}: found a run of its own, expected none: {theirs} is the same; remove one of them")
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.symlink_to(wanted, target_is_directory=True)
