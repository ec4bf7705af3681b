"""A comparison from its YAML to its report: checks, runs in their order, and what is left to be collected."""

import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from llava.compare import facts as told
from llava.compare import record, validation
from llava.compare.comparison import Comparison, Entry
from llava.compare.plan import Run, file_hash, is_whole, owners, plan_runs, shared_stages
from llava.compare.runs import PROGRAM, Job, Runner, unfinished
from llava.errors import LlavaError


@dataclass
class Plan:
    """A comparison with its runs.

    Attributes:
        common: {what: value} of what is the same for all its runs, whichever towers and seeds are added.
        data: {stage: data file without the validation images}.
    """

    comparison: Comparison
    out: Path
    runs: list[Run]
    common: dict[str, str]
    data: dict[str, str] = field(default_factory=dict)

    def of(self, entry: Entry) -> list[Run]:
        return [run for run in self.runs if run.entry is entry]

    def chosen(self, entry: Entry) -> list[Run]:
        """The runs that count: of several learning rates, those of the chosen one."""
        if not entry.learning_rates:
            return self.of(entry)
        rate = validation.read_choice(self.out, entry.name)
        return [run for run in self.of(entry) if run.learning_rate == rate]


def make_plan(comparison: Comparison, out: Path, written: bool = False) -> Plan:
    """The comparison's runs.

    Args:
        written: the validation images are apart already.
    """
    data = {}
    if comparison.chooses_rates:
        data = _data_there(comparison, out) if written else validation.split(comparison, out)
    return Plan(comparison, out, plan_runs(comparison, out, data), _common(comparison), data)


def _data_there(comparison: Comparison, out: Path) -> dict[str, str]:
    folder, found = out / validation.FOLDER, {}
    for stage in comparison.recipe.stages:
        mixture = folder / f"{stage.name}.yaml"
        found[stage.name] = str(mixture if mixture.is_file() else folder / f"{stage.name}.json")
    return found


def _common(comparison: Comparison) -> dict[str, str]:
    found = {"recipe": comparison.recipe.name, "match": comparison.match}
    for one in comparison.recipe.evaluations:
        path = told.data_of(comparison, one) if one.kind == "exact_match" else None
        value = f"{path} ({file_hash(path)})" if path and os.path.isfile(path) else path or ", ".join(one.tasks)
        found[f"evaluation {one.name}"] = value
    if comparison.chooses_rates:
        found["validation"] = f"share {comparison.validation.share:g}, seed {comparison.validation.seed}"
    return found


def check(plan: Plan) -> told.Facts:
    """All that can be refused before anything is trained; `state.json` is begun.

    Raises:
        LlavaError: in one line.
    """
    comparison = plan.comparison
    record.check_folder(plan.out, comparison.name, plan.runs, plan.common)
    return told.check(comparison, plan.runs)


def keep(plan: Plan, facts: told.Facts) -> None:
    """Write what is fixed and what differs, for reports that are made without the data."""
    values = {"fixed": facts.fixed, "fixed_hash": facts.hash, "differences": facts.differences}
    record.write_state(plan.out, plan.comparison.name, plan.common, **values)


def select(plan: Plan, only: list[str] | None) -> list[Run]:
    """The runs of the named towers; None: all.

    Raises:
        LlavaError: a name that there is not.
    """
    names = [entry.name for entry in plan.comparison.entries]
    for name in only or ():
        if name not in names:
            raise LlavaError(f"--only {name}: no such tower, expected some of {', '.join(names)}")
    return [run for run in plan.runs if only is None or run.entry.name in only]


def steps_of(plan: Plan, runs: list[Run]) -> list[list[Job]]:
    """The jobs of runs that are not finished, in groups: each begins when the one before it has ended.

    First the stages that others wait for, one group for each; then the runs themselves, where a learning rate is to be
    chosen only their training and its validation; then the runs with the chosen learning rates, whose jobs `chosen`
    makes when it is known.
    """
    owner = owners(runs, plan.runs)
    todo = [run for run in unfinished(runs) if run.learning_rate is None or validation.score_of(run) is None]
    groups: dict[str, list[Job]] = {}
    for run, stage in shared_stages([*todo], owner):
        folder = next(one.folder for one in run.stages if one.stage.name == stage)
        if not is_whole(folder):
            groups.setdefault(stage, []).append(Job(run, stage))
    last = plan.comparison.recipe.stages[-1].name
    jobs = [Job(run) if run.learning_rate is None else _graded(plan, run, last) for run in todo]
    return [*groups.values(), *([jobs] if jobs else [])]


def _graded(plan: Plan, run: Run, last: str) -> Job:
    return Job(run, last, [validation.command(run, plan.out)])


def chosen(plan: Plan, runs: list[Run]) -> list[Job]:
    """Choose the learning rates, and the jobs of the runs with them that are not finished."""
    jobs = []
    for entry in plan.comparison.entries:
        own = [run for run in runs if run.entry is entry]
        if not own or not entry.learning_rates:
            continue
        choice = validation.choose(own)
        validation.write_choice(plan.out, entry.name, choice)
        jobs += [Job(run) for run in unfinished(own) if run.learning_rate == choice["learning_rate"]]
    return jobs


def run_all(plan: Plan, runs: list[Run], count: int, program=PROGRAM, stream=None) -> list[int]:
    """Run what is not finished, `count` at a time.

    Returns:
        The signals that came meanwhile; after one, nothing more was begun.
    """
    runner = Runner(plan.comparison.recipe.path, owners(runs, plan.runs), count, program, stream)
    groups, done = steps_of(plan, runs), 0
    total = sum(map(len, groups))
    record.write_state(plan.out, plan.comparison.name, plan.common, state="running")
    failed: set[str] = set()
    for group in groups:
        group = [job for job in group if job.run.name not in failed]  # not tried again at once
        if not runner.came:
            runner.execute(group, total, done)
            done += len(group)
        failed |= {job.run.name for job in group if job.status == "failed"}
    if plan.comparison.chooses_rates and not runner.came:
        runner.execute(chosen(plan, runs))
    return runner.came


def describe(plan: Plan, runs: list[Run]) -> list[str]:
    """What would be run: commands, steps, and stages that several runs have in common."""
    owner, lines = owners(runs, plan.runs), []
    for run in runs:
        status = record.status_of(run)[0]
        lines.append(f"{run.name} ({'to be run' if status == 'missing' else status}):")
        lines.append(f"  python -m llava.train.recipe {plan.comparison.recipe.path} {_shell(run)}")
        for one in run.stages:
            other = owner[run.prints[one.stage.name]]
            shared = "" if other is run else f", the same as of {other.name}: not trained again"
            lines.append(f"  {one.stage.name}: {steps_text(one)}{shared}")
    trained = {run.prints[one.stage.name]: one for run in runs for one in run.stages}
    several = sum(len(run.stages) for run in runs)
    lines.append(f"{len(runs)} runs, {len(trained)} stages to train of {several}")
    return lines


def _shell(run: Run) -> str:
    return shlex.join(["--output_dir", str(run.folder), "--prepared", *run.words])


def steps_text(one) -> str:
    """How many steps a stage takes, on one device where its data say it."""
    settings = one.settings
    steps = settings.get("max_steps", -1)
    if isinstance(steps, int) and steps > 0:
        return f"{steps} steps"
    epochs = settings.get("num_train_epochs", 3)
    return f"{epochs:g} epochs of {settings.get('data_path')}"
