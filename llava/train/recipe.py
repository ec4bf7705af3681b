"""A recipe from its first stage to its report: `python -m llava.train.recipe FILE [--key value ...]`.

    python -m llava.train.recipe configs/recipes/demo.yaml
    python -m llava.train.recipe configs/recipes/llava_next.yaml --finetune.learning_rate 2e-5

Each stage is a training run of its own, launched as `scripts/finetune.sh CONFIG.yaml` launches one: a plain process,
torchrun or DeepSpeed. The same command goes on after an interruption; a stage begins only on a finished one.
"""

import argparse
import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from llava.errors import LlavaError, report_errors, report_interrupts
from llava.train.children import Child, handing_on
from llava.train.recipe_evaluation import command, draw_report, draws_report, keep, summary
from llava.train.recipe_file import Evaluation, Overrides, Recipe, Stage, read_recipe
from llava.train.recipe_settings import StagePlan, digest, plan_stages
from llava.train.recipe_state import RecipeState, read_recipe_state
from llava.train.run_state import Lock, RunState, read_state
from llava.train.stage_end import how_it_ended, read_state_of, state_text, wait_for_end

ROOT = Path(__file__).parents[2]


class Stopped(Exception):
    """The recipe was told to stop, or a part of it has failed; the message is for people, `status` the exit status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def stage_argv(recipe: Recipe, stage: Stage, folder: str | Path, overrides: list[str]) -> list[str]:
    """The command line of one stage of a recipe in `folder`, as `llava.config.resolve` takes it.

    Args:
        overrides: `--key value` and `--STAGE.key value` words, as the recipe's command takes them.
    """
    plans = plan_stages(recipe, Path(folder), Overrides(recipe, overrides))
    return next(plan.argv for plan in plans if plan.stage.name == stage.name)


def prepare(recipe: Recipe, seed: int) -> None:
    """Run what makes a recipe's data and first models; such a program does nothing where it has done its work.

    Raises:
        LlavaError: a command failed.
        Stopped: a signal came.
    """
    for template in recipe.prepare:
        words = [word.replace("{seed}", str(seed)) for word in template]
        words[0] = sys.executable if words[0] == "python" else words[0]
        try:
            status, came, last = run_child(words)
        except OSError as error:
            raise LlavaError(f"{recipe.path}: prepare: {words[0]}: {error.strerror}") from None
        if came:
            raise Stopped("stopped while data were prepared; the same command goes on", _status_of(came))
        if status:
            raise LlavaError(f"{recipe.path}: prepare: {' '.join(words)} ended with status {status}: {last}")


def run_child(words: list[str], env: dict[str, str] | None = None) -> tuple[int, list[int], str]:
    """Run a program: (exit status, signals that came meanwhile and were handed on, its last line)."""
    early: list[int] = []
    child: list[Child] = []

    def tell(number: int) -> None:
        child[0].tell(number) if child else early.append(number)

    with handing_on(tell) as came:
        child.append(Child(words, env))
        for number in early:
            child[0].tell(number)
        status = child[0].wait()
    return status, came, child[0].last_line


def _status_of(came: list[int]) -> int:
    return 130 if signal.SIGINT in came else 0


class RecipeRun:
    """One start of a recipe in a folder.

    Args:
        recipe: as read.
        out: its folder.
        overrides: of the command line.
        start: the stage to begin anew with; None: go on.
        until: the last stage; None: all, and what follows them.
        prepared: the data are there: run no command of `prepare`.
    """

    def __init__(self, recipe: Recipe, out: Path, overrides: Overrides, *, start=None, until=None, prepared=False):
        self.recipe, self.out, self.overrides = recipe, out, overrides
        self.start, self.until, self.prepared = start, until, prepared
        self.plans = plan_stages(recipe, out, overrides)
        whole = [plan.fingerprint for plan in self.plans] + [self._asked(one) for one in recipe.evaluations]
        # of several machines that train together, each starts its part of a stage; the first one does all else
        self.first = os.environ.get("RANK", "0") == "0"
        self.state = RecipeState(recipe, out, digest(whole), self.first)

    def run(self) -> None:
        """All that is not done yet. Raises: Stopped, LlavaError."""
        if self.start is not None:
            self.forget(self.start)
        todo = self.unfinished()
        if not todo and self.until is None and self.is_evaluated():
            found = "; ".join(summary(self.recipe, self.out))
            print(f"{self.out}: {self.recipe.name} is finished ({found}); run with --overwrite to train it again")
            return
        if self.first and todo and not self.prepared:
            prepare(self.recipe, self.overrides.seed)
        self.state.write()
        for plan in todo[1:]:
            self.check(plan)
        for plan in self.plans:
            if plan in todo:
                self.train(plan)
            elif read_state_of(plan.folder) == "finished":
                print(f"{plan.folder}: finished before", flush=True)
            if plan.stage.name == self.until:
                return
        if self.first:
            self.evaluate()

    def unfinished(self) -> list[StagePlan]:
        """The stages to train: a stage that is finished needs no other one any more.

        Raises:
            LlavaError: a finished stage had other settings.
        """
        names = [plan.stage.name for plan in self.plans]
        plans = self.plans[: names.index(self.until) + 1] if self.until else self.plans
        sources = {plan.stage.source for plan in plans}
        wanted, todo = {plan.stage.name for plan in plans} - sources, []
        for plan in reversed(plans):
            if read_state_of(plan.folder) == "finished":
                entry = self.state.stages[plan.stage.name]
                if changed := plan.changed(entry.get("settings")):
                    raise LlavaError(
                        f"{plan.folder}: is finished, with other settings ({changed}); expected the same, or --from "
                        f"{plan.stage.name} to train this stage and what follows anew, or --overwrite for all"
                    )
                entry |= {"status": "finished", "settings": plan.settings}
            elif plan.stage.name in wanted:
                todo.insert(0, plan)
                wanted.add(plan.stage.source)
        return todo

    def forget(self, start: str) -> None:
        """Remove what `start` and all after it have left. Raises: LlavaError: a stage before it is not finished."""
        names = [plan.stage.name for plan in self.plans]
        for plan in self.plans[: names.index(start)]:
            if read_state_of(plan.folder) != "finished":
                raise LlavaError(f"--from {start}: {plan.folder} is not finished, expected all stages before to be")
        for plan in self.plans[names.index(start) :]:
            remove(plan.folder)
            self.state.stages[plan.stage.name] |= {"status": "waiting", "seconds": 0.0, "steps": None}
        for entry in self.state.evaluations.values():
            entry |= {"status": "waiting", "seconds": 0.0, "fingerprint": None}

    def check(self, plan: StagePlan) -> None:
        """Refuse settings of a later stage before an earlier one trains. Raises: Stopped."""
        words = [sys.executable, "-m", "llava.config", "show", *plan.check_argv]
        with open(os.devnull, "w") as nowhere:
            child = Child(words, {"CUDA_VISIBLE_DEVICES": ""}, out=nowhere.fileno(), err=nowhere.fileno())
            with handing_on(child.tell) as came:
                status = child.wait()
        if came:
            raise Stopped("stopped before anything was trained; the same command goes on", _status_of(came))
        if status:
            self.state.tell(self.state.stages[plan.stage.name], status="failed", last_line=child.last_line)
            raise Stopped(child.last_line, status)

    def train(self, plan: StagePlan) -> None:
        entry = self.state.stages[plan.stage.name]
        words = ["bash", str(ROOT / "scripts/launch.sh"), *plan.argv]
        before, begun, spent = state_text(plan.folder), time.monotonic(), entry["seconds"] or 0.0
        self.state.tell(entry, status="running", command=" ".join(words), last_line=None, settings=plan.settings)
        env = {"PYTHON": sys.executable, "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"}
        status, came, last = run_child(words, env)
        if not self.first and status == 0:
            wait_for_end(plan.folder)
        state = how_it_ended(plan.folder, before, status, bool(came))
        told = read_state(plan.folder) or {}
        steps = told.get("step") if state != "failed" or state_text(plan.folder) != before else None
        seconds = round(spent + time.monotonic() - begun, 1)
        message = last if state != "failed" else (told.get("message") if steps is not None else None) or last
        self.state.tell(entry, status=state, seconds=seconds, steps=steps, last_line=message)
        if state == "preempted":
            goes_on = f"{plan.folder}: stopped before its end, and nothing after it was begun; the same command goes on"
            raise Stopped(goes_on, status if status == 130 else 0)
        if state == "failed":
            why = "" if status else f"error: {plan.folder}: the stage ended without a word of its end in run_state.json"
            raise Stopped(why, status or 2)
        for evaluation in self.state.evaluations.values():
            evaluation["fingerprint"] = None  # of another model

    # --- after the stages ---------------------------------------------------------------------------------------------

    def is_evaluated(self) -> bool:
        """Whether all that follows the stages is there."""
        return all(map(self._is_done, self.recipe.evaluations)) and (
            not draws_report(self.recipe) or (self.out / "report.png").is_file()
        )

    def _is_done(self, one: Evaluation) -> bool:
        entry = self.state.evaluations[one.name]
        as_asked = entry["status"] == "finished" and entry.get("fingerprint") == self._asked(one)
        return as_asked and (self.out / f"eval_{one.name}.json").is_file()

    def evaluate(self) -> None:
        for one in self.recipe.evaluations:
            if self._is_done(one):
                print(f"{self.out}/eval_{one.name}.json: evaluated before", flush=True)
            else:
                self._evaluate(one)
        if draws_report(self.recipe):
            draw_report(self.recipe, self.plans, self.out)
        for line in summary(self.recipe, self.out):
            print(line, flush=True)

    def _evaluate(self, one: Evaluation) -> None:
        entry, file, last = self.state.evaluations[one.name], self.out / f"eval_{one.name}.json", self.plans[-1]
        begun = time.monotonic()
        self.state.tell(entry, status="running", file=file.name, fingerprint=self._asked(one), last_line=None)
        status, came, said = run_child(*command(one, self.overrides.evaluation(one.name), last, file))
        ended = "preempted" if came else "failed" if status else "finished"
        if ended == "finished":
            said = keep(one, last, file) or said
        self.state.tell(entry, status=ended, seconds=round(time.monotonic() - begun, 1), last_line=said)
        if came:
            raise Stopped(f"stopped during the evaluation {one.name}; the same command goes on", _status_of(came))
        if status:
            raise Stopped("", status)

    def _asked(self, one: Evaluation) -> str:
        return digest(
            [vars(one) | {"args": one.args | self.overrides.evaluation(one.name)}, self.plans[-1].fingerprint]
        )


def remove(folder: Path) -> None:
    """A stage's folder; of one that is another run's, only the link to it."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.is_dir():
        shutil.rmtree(folder)


# --- the command ------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava.train.recipe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="--key value: a key of a training run, for all stages; --STAGE.key value: for one; --EVALUATION.key "
        "value: an argument of an evaluation. They stand above the recipe's `set`, that above the stage's YAML.",
    )
    parser.add_argument("recipe", metavar="FILE", help="the recipe's YAML, as those in configs/recipes")
    parser.add_argument("--output_dir", type=Path, help="folder of all stages (default: the recipe's)")
    parser.add_argument("--overwrite", action="store_true", help="begin anew: remove what the recipe has left there")
    parser.add_argument("--from", dest="start", metavar="STAGE", help="train this stage and all after it anew")
    parser.add_argument("--until", metavar="STAGE", help="stop when this stage is finished, without evaluations")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run")
    parser.add_argument("--print-folder", action="store_true", help="print the folder, for scripts")
    parser.add_argument("--prepared", action="store_true", help="the data are there: run no command of `prepare`")
    return parser


def read_command(argv: list[str]) -> tuple[argparse.Namespace, Recipe, Overrides]:
    args, words = build_parser().parse_known_args(argv)
    recipe = read_recipe(args.recipe)
    for flag, name in (("--from", args.start), ("--until", args.until)):
        if name is not None and name not in [stage.name for stage in recipe.stages]:
            known = ", ".join(stage.name for stage in recipe.stages)
            raise LlavaError(f"command line: {flag} {name}: {recipe.path} has no such stage, expected one of {known}")
    args.output_dir = args.output_dir or Path(recipe.output_dir)
    return args, recipe, Overrides(recipe, words)


def dry_run(run: RecipeRun) -> None:
    for template in run.recipe.prepare:
        print("prepare:", " ".join(word.replace("{seed}", str(run.overrides.seed)) for word in template))
    for plan in run.plans:
        state = read_state_of(plan.folder)
        print(f"{plan.stage.name} ({'to be trained' if state == 'unknown' else state}):", " ".join(plan.argv))
    for one in run.recipe.evaluations:
        print(f"{one.name} ({run.state.evaluations[one.name]['status']}): {one.kind} of {run.plans[-1].folder}")


def check_folder(recipe: Recipe, out: Path) -> None:
    """Raises: LlavaError: another recipe has the folder."""
    state = read_recipe_state(out)
    if state is not None and state.get("recipe") != recipe.name:
        raise LlavaError(
            f"output_dir: {out} holds the recipe {state.get('recipe')}, expected {recipe.name} or a folder of its own"
        )


@report_errors
@report_interrupts
def main(argv: list[str] | None = None) -> None:
    args, recipe, overrides = read_command(sys.argv[1:] if argv is None else argv)
    out = args.output_dir
    if args.print_folder:
        print(out)
        return
    check_folder(recipe, out)
    options = {"start": args.start, "until": args.until, "prepared": args.prepared}
    if args.dry_run:
        dry_run(RecipeRun(recipe, out, overrides, **options))
        return
    try:
        if os.environ.get("RANK", "0") != "0":
            RecipeRun(recipe, out, overrides, **options).run()
            return
        with Lock(str(out)), telling(RunState(str(out), writes=True)):
            if args.overwrite:
                overwrite(recipe, out)
            RecipeRun(recipe, out, overrides, **options).run()
    except Stopped as stop:
        if str(stop):
            print(stop, file=sys.stderr if stop.status else sys.stdout, flush=True)
        raise SystemExit(stop.status) from None


@contextlib.contextmanager
def telling(state: RunState) -> Iterator[None]:
    """Write what becomes of the recipe as a whole to its folder's run_state.json, as a training run does."""
    state.tell("running")
    try:
        yield
    except Stopped as stop:
        state.tell("preempted" if stop.status in (0, 130) else "failed", message=str(stop) or None)
        raise
    except KeyboardInterrupt:
        state.tell("preempted", signal="SIGINT")
        raise
    except Exception as error:
        state.tell("failed", message=str(error).partition("\n")[0])
        raise
    state.tell("finished")


def overwrite(recipe: Recipe, out: Path) -> None:
    """Remove what a recipe has left in its folder, and nothing else."""
    for stage in recipe.stages:
        remove(out / stage.name)
    for name in ("recipe.json", "report.png", *(f"eval_{one.name}.json" for one in recipe.evaluations)):
        (out / name).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
