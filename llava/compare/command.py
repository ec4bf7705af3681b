"""What `python -m llava.tools.compare_towers` does, by its options."""

import os
import signal
import sys
from pathlib import Path

from llava.compare import collect, driver, record, slurm
from llava.compare.comparison import Comparison, read_comparison
from llava.compare.runs import PROGRAM
from llava.errors import LlavaError
from llava.train.recipe import Stopped, prepare
from llava.train.run_state import Lock


def command(args, words: list[str], program=PROGRAM) -> int:
    """The exit status.

    Args:
        args: of the command line.
        words: the `--key value` words of it.
        program: the recipe's, for each run.

    Raises:
        LlavaError: what is refused.
    """
    _check_options(args)
    comparison = read_comparison(args.comparison, words)
    out = args.output or Path("compare") / comparison.name
    if args.dry_run:
        return _dry_run(args, comparison, out)
    if args.task is not None:
        return slurm.task(comparison, out, args.task, program)
    try:
        with Lock(str(out)):
            return _work(args, words, comparison, out, program)
    except (Stopped, collect.Interrupted) as stop:
        if str(stop):
            print(stop, file=sys.stderr)
        return stop.status


def _check_options(args) -> None:
    if args.jobs is not None and args.jobs < 1:
        raise LlavaError(f"--jobs {args.jobs}: expected at least 1")
    if sum([args.collect, args.slurm, args.dry_run]) > 1:
        raise LlavaError("--collect, --slurm and --dry-run: expected one of them at most")
    if (args.gpu is None) != (args.hours is None) or (args.gpu is not None and not args.dry_run):
        raise LlavaError("--gpu and --hours: only used together and with --dry-run, expected all three")
    if args.probe is not None and not os.path.isdir(args.probe):
        raise LlavaError(f"--probe {args.probe}: no such folder, expected one of labelled pictures")


def _work(args, words: list[str], comparison: Comparison, out: Path, program) -> int:
    if args.collect:
        plan = driver.make_plan(comparison, out, written=True)
        driver.select(plan, args.only)
        if (out / record.STATE).is_file():
            record.check_folder(out, comparison.name, [], plan.common)
        elif not (out / "runs").is_dir():
            raise LlavaError(f"--collect: {out} holds no comparison, expected one that was begun")
        return _report(args, plan)
    record.check_name(out, comparison.name)
    prepare(comparison.recipe, comparison.seeds[0])
    with _without_gpus():
        plan = driver.make_plan(comparison, out)
        runs = driver.select(plan, args.only)
        facts = driver.check(plan)
    for notice in facts.notices:
        print(f"note: {notice}", file=sys.stderr)
    driver.keep(plan, facts)
    if args.slurm:
        for line in slurm.write(args, words, plan, runs):
            print(line)
        return 0
    came = driver.run_all(plan, runs, args.jobs or 1, program)
    if came:
        record.write_state(out, comparison.name, plan.common, state="preempted")
        print(f"{out}: stopped before its end; the same command goes on", file=sys.stderr)
        return 130 if came.count(signal.SIGINT) > 1 else 0
    return _report(args, plan)


class _without_gpus:
    """This process looks at settings alone: a CUDA context of its own would take memory from the runs."""

    def __enter__(self):
        self.before = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

    def __exit__(self, *error):
        if self.before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.before


def _report(args, plan: driver.Plan) -> int:
    results, files = collect.collect(plan, args.probe, cost=not args.no_cost)
    whole = collect.is_complete(plan, results)
    record.write_state(plan.out, plan.comparison.name, plan.common, state="finished" if whole else "failed")
    for line in summary(plan, results):
        print(line)
    print(f"report: {', '.join(str(path) for path in files if path.suffix in ('.md', '.html'))}")
    return 0 if whole else 1


def summary(plan: driver.Plan, results: dict) -> list[str]:
    """A line for each tower: its scores, or what has become of it."""
    lines = []
    for tower in results["towers"]:
        known = {name: row["mean"] for name, row in tower["scores"].items() if row.get("mean") is not None}
        scores = ", ".join(f"{name} {mean:.3f}" for name, mean in known.items())
        status = "" if tower["status"] == "finished" else f" ({tower['status']}{_why(tower)})"
        lines.append(f"{tower['name']}: {scores or 'no score'}{status}")
    return lines


def _why(tower: dict) -> str:
    return f": {tower['error']}" if tower["error"] else ""


def _dry_run(args, comparison: Comparison, out: Path) -> int:
    """Say what would be run, as far as the files on this machine tell; nothing is written."""
    with _without_gpus():
        plan = driver.make_plan(comparison, out, written=True)
        runs = driver.select(plan, args.only)
        record.check_folder(out, comparison.name, plan.runs, plan.common)
    for line in driver.describe(plan, runs):
        print(line)
    if args.gpu is not None:
        for line in _estimate(args, runs):
            print(line)
    return 0


def _estimate(args, runs: list) -> list[str]:
    """What the stages that are to be trained take on NUM_GPUS (8) such GPUs, and what to leave out."""
    from llava.compare.estimate import Planned, estimate

    stages = {run.prints[one.stage.name]: (run, one) for run in reversed(runs) for one in run.stages}
    planned = [
        Planned(f"{run.name}/{one.stage.name}", run.entry.name, run.seed, one.check_argv)
        for run, one in reversed(stages.values())
    ]
    return estimate(planned, args.gpu, args.hours, int(os.environ.get("NUM_GPUS") or 8)).said
