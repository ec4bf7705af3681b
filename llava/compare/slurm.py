"""A comparison as array jobs of Slurm, and a job that collects: scripts that are written, not submitted.

A task is one run on one node. Two minutes before its time limit it saves, and is queued again; scripts/supervise.sh
hands the signals on.
"""

import os
import shlex
import sys
from pathlib import Path

from llava.compare import driver, record, validation
from llava.compare.comparison import Comparison
from llava.compare.plan import Run, owners
from llava.compare.runs import Job, Runner
from llava.errors import LlavaError
from llava.train.checkpoints import write_json

FOLDER, JOBS = "slurm", "jobs.json"
STOPPED = 75  # exit status of a task that was stopped and is to be queued again
ROOT = Path(__file__).parents[2]

_HEAD = """#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --cpus-per-task={cpus}
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={folder}/%x-{number}.out
"""
_ARRAY = """#SBATCH --array=0-{last}{limit}
#SBATCH --signal=B:USR1@120
# {what}. Flags of sbatch stand above the lines above.
set -euo pipefail
cd {cwd}
export PYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}}
# shellcheck source=/dev/null
source {root}/scripts/supervise.sh

tell() {{
    kill -s "$1" "$2"
}}

status=0
supervise tell {command} --task "{group}:$SLURM_ARRAY_TASK_ID" {words} || status=$?
if [[ "$status" == {stopped} && "$TOLD" != TERM ]]; then # after TERM Slurm queues it again by itself
    if ((${{SLURM_RESTART_COUNT:-0}} >= ${{MAX_REQUEUES:-100}})); then
        echo "error: stopped before its end, and queued again ${{SLURM_RESTART_COUNT}} times already (MAX_REQUEUES)" >&2
        exit 2
    fi
    echo "stopped before its end; the task is queued again and goes on"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
"""
_COLLECT = """# Collects what the runs have left. Flags of sbatch stand above the lines above.
set -euo pipefail
cd {cwd}
export PYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}}
exec {command} --collect {words}
"""


def write(args, words: list[str], plan: driver.Plan, runs: list[Run]) -> list[str]:
    """Write DIR/slurm, and give the lines that submit it.

    Args:
        args: of the command line; `jobs` is how many tasks of an array may run at once.
        words: the `--key value` words of the command line.
        runs: those that are to be run.
    """
    groups = [[_told(job) for job in group] for group in driver.steps_of(plan, runs)]
    for entry in plan.comparison.entries if plan.comparison.chooses_rates else ():
        if entry.learning_rates and any(run.entry is entry for run in runs):
            groups += [[]] if not groups or "choose" not in (groups[-1] or [{}])[0] else []
            groups[-1] += [{"choose": entry.name, "seed": seed} for seed in plan.comparison.seeds]
    folder = plan.out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.sh"):
        old.unlink()
    write_json(folder / JOBS, {"groups": groups})
    files = []
    for number, group in enumerate(groups):
        files.append(folder / _file(groups, number))
        files[-1].write_text(_array(args, words, plan, number, group), encoding="utf-8")
    (folder / "collect.sh").write_text(_collect(args, words, plan), encoding="utf-8")
    lines = _submit([*files, folder / "collect.sh"])
    (folder / "submit.sh").write_text("\n".join(["#!/usr/bin/env bash", "set -euo pipefail", *lines, ""]))
    return [f"# {plan.out}: nothing is submitted yet; these lines, or: bash {folder / 'submit.sh'}", *lines]


def _told(job: Job) -> dict:
    return {"run": job.run.name, "until": job.until, "graded": bool(job.then)}


def _file(groups: list, number: int) -> str:
    """The runs are array.sh; what they wait for comes before them, and what waits for them behind."""
    kinds = ["chosen" if "choose" in group[0] else "array" if _is_last(group) else "shared" for group in groups]
    name = kinds[number]
    return f"{name}_{number}.sh" if kinds.count(name) > 1 else f"{name}.sh"


def _is_last(group: list[dict]) -> bool:
    return any(job.get("until") is None or job.get("graded") for job in group)


def _head(args, plan: driver.Plan, name: str, number: str) -> str:
    gpus = os.environ.get("NUM_GPUS") or "8"
    cpus = 8 * int(gpus)
    title = f"{plan.comparison.name}-{name}"
    return _HEAD.format(name=title, gpus=gpus, cpus=cpus, folder=(plan.out / FOLDER).resolve(), number=number)


def _command(args, plan: driver.Plan) -> str:
    command = [sys.executable, "-m", "llava.tools.compare_towers", str(args.comparison), "--output", str(plan.out)]
    return shlex.join(command)


def _array(args, words: list[str], plan: driver.Plan, number: int, group: list[dict]) -> str:
    limit = f"%{args.jobs}" if args.jobs else ""
    what = f"{len(group)} tasks: " + ", ".join(job.get("run") or f"{job['choose']}/seed_{job['seed']}" for job in group)
    values = {"last": len(group) - 1, "limit": limit, "what": what, "group": number, "stopped": STOPPED}
    values |= {"cwd": shlex.quote(os.getcwd()), "root": shlex.quote(str(ROOT)), "command": _command(args, plan)}
    return _head(args, plan, str(number), "%A_%a") + _ARRAY.format(words=shlex.join(words), **values)


def _collect(args, words: list[str], plan: driver.Plan) -> str:
    probe = ["--probe", args.probe] if args.probe else []
    extra = shlex.join([*probe, *(["--no-cost"] if args.no_cost else []), *words])
    values = {"cwd": shlex.quote(os.getcwd()), "root": shlex.quote(str(ROOT)), "command": _command(args, plan)}
    return _head(args, plan, "collect", "%j") + _COLLECT.format(words=extra, **values)


def _submit(files: list[Path]) -> list[str]:
    """Each job waits for the end of the one before, however that ends: what is there goes on."""
    lines = []
    for number, path in enumerate(files):
        after = f" --dependency=afterany:$job{number - 1}" if number else ""
        lines.append(f"job{number}=$(sbatch --parsable{after} {shlex.quote(str(path))})")
    return lines


def task(comparison: Comparison, out: Path, word: str, program) -> int:
    """One task of an array job: a run, as `jobs.json` has it.

    Returns:
        0: finished, 1: failed, `STOPPED`: to be gone on with.

    Raises:
        LlavaError: there is no such task.
    """
    group, _, number = word.partition(":")
    content = record.read_json(out / FOLDER / JOBS)
    try:
        told = content["groups"][int(group)][int(number)]
    except (KeyError, IndexError, ValueError):
        raise LlavaError(f"--task {word}: {out / FOLDER / JOBS} has no such task, expected one of --slurm") from None
    plan = driver.make_plan(comparison, out, written=True)
    record.check_folder(out, comparison.name, plan.runs, plan.common)
    job = _job(plan, told)
    runner = Runner(comparison.recipe.path, owners(plan.runs), 1, program)
    runner.execute([job])
    if job.status == "preempted":
        return STOPPED
    return 0 if job.status == "finished" else 1


def _job(plan: driver.Plan, told: dict) -> Job:
    if "choose" in told:
        entry = next(entry for entry in plan.comparison.entries if entry.name == told["choose"])
        choice = validation.choose(plan.of(entry))
        validation.write_choice(plan.out, entry.name, choice)
        found = [run for run in plan.chosen(entry) if run.seed == told["seed"]]
        if not found:
            raise LlavaError(f"{entry.name}: no learning rate has been validated with all seeds, expected one")
        return Job(found[0])
    run = next((run for run in plan.runs if run.name == told["run"]), None)
    if run is None:
        raise LlavaError(f"{plan.comparison.path}: has no run {told['run']!r} any more, expected it: --slurm anew")
    return Job(run, told["until"], [validation.command(run, plan.out)] if told["graded"] else [])
