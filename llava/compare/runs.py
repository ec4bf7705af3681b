"""The runs of a comparison side by side: each in a process of its own, with its share of the machine.

A signal to stop is handed on to every run once; each saves and ends, and the same command goes on. A run that fails is
named with its last line and stops no other.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from llava.compare.display import Display
from llava.compare.plan import Run, is_whole, link_shared
from llava.compare.record import status_of, tell
from llava.errors import LlavaError
from llava.train.children import Child, handing_on
from llava.train.recipe_state import read_recipe_state

PROGRAM = (sys.executable, "-m", "llava.train.recipe")
_LOOK = 0.2  # seconds between two looks at the runs
_LAST = 15.0  # seconds that a run has to end after a second Ctrl-C
_DRIVERS = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")


@dataclass
class Job:
    """A part of a run that is done at one go.

    Attributes:
        until: the last stage that is trained; None: all, and the evaluations.
        then: further commands, after the recipe's.
        status: waiting, running, finished, failed or preempted; `error` says why it failed.
    """

    run: Run
    until: str | None = None
    then: list[list[str]] = field(default_factory=list)
    status: str = "waiting"
    error: str | None = None
    begun: float = 0.0

    @property
    def title(self) -> str:
        return self.run.name + (f" until {self.until}" if self.until else "")

    @property
    def folder(self) -> Path:
        return self.run.folder

    @property
    def log(self) -> Path:
        return self.run.folder / "log.txt"


class Runner:
    """Runs jobs, `count` at a time.

    Args:
        recipe: the recipe's file.
        owner: of `plan.owners`.
        program: the recipe's program.

    Attributes:
        came: the signals that came; once there are any, nothing more is begun.
    """

    def __init__(self, recipe: str, owner: dict[str, Run], count: int = 1, program=PROGRAM, stream=None):
        self.recipe, self.owner, self.program, self.stream = recipe, owner, list(program), stream
        self.slots = shares(count)
        self.came: list[int] = []

    def execute(self, jobs: list[Job], total: int | None = None, done: int = 0) -> None:
        """Bring every job to its end, as far as it goes, and set its status.

        Args:
            total, done: runs in all and those that are done, for the display.
        """
        display = Display(total or len(jobs), done, self.stream)
        waiting, active, free = list(jobs), [], list(range(len(self.slots)))
        with handing_on(self.came.append):
            while (waiting and not self.came) or active:
                while waiting and free and not self.came:
                    job = waiting.pop(0)
                    work = _Work(self, job, free[0], display)
                    if work.begin():
                        active.append(work)
                        free.pop(0)
                for work in list(active):
                    if work.ended():
                        active.remove(work)
                        free.append(work.slot)
                        free.sort()
                display.show([work.job for work in active])
                if active:
                    time.sleep(_LOOK)
        for job in waiting:
            job.status = "preempted"

    def words(self, job: Job) -> list[str]:
        until = ["--until", job.until] if job.until else []
        output = ["--output_dir", str(job.folder), "--prepared", *until]
        return [*self.program, self.recipe, *output, *job.run.words]


class _Work:
    """A job that is being done: one child process after the other."""

    def __init__(self, runner: Runner, job: Job, slot: int, display: Display):
        self.runner, self.job, self.slot, self.display = runner, job, slot, display
        self.told = self.at = 0
        self.stopped: float | None = None

    def begin(self) -> bool:
        """Whether there is something to wait for: a job whose shared stage is not there fails at once."""
        job = self.job
        job.begun, job.status = time.monotonic(), "running"
        try:
            link_shared(job.run, self.runner.owner, job.until)
            job.folder.mkdir(parents=True, exist_ok=True)
            self.file = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except (LlavaError, OSError) as error:
            self._end("failed", str(error))
            return False
        self.commands = [self.runner.words(job), *job.then]
        self.display.started(job.title)
        self._start()
        return True

    def _start(self) -> None:
        command = self.commands[self.at]
        os.write(self.file, f"$ {' '.join(command)}\n".encode())
        self.child = Child(command, self.runner.slots[self.slot], self.file, self.file)

    def ended(self) -> bool:
        """Hand on what has come meanwhile, and see to the child's end."""
        came = self.runner.came
        while self.told < len(came):
            self.child.tell(came[self.told])
            self.told += 1
            if came.count(signal.SIGINT) > 1 and self.stopped is None:
                self.stopped = time.monotonic()
        if self.child.process.poll() is None:
            if self.stopped is not None and time.monotonic() - self.stopped > _LAST:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.child.process.pid, signal.SIGKILL)
            return False
        code = self.child.wait()
        self.at += 1
        if not code and self.at < len(self.commands) and not came and self._stage_is_there():
            self._start()
            return False
        os.close(self.file)
        self._end(*self._outcome(code))
        return True

    def _stage_is_there(self) -> bool:
        return all(_finished(plan.folder) for plan in self._stages())

    def _stages(self):
        for plan in self.job.run.stages:
            yield plan
            if plan.stage.name == self.job.until:
                return

    def _outcome(self, code: int) -> tuple[str, str | None]:
        """(status, last line) of a job whose last child has ended."""
        state = read_recipe_state(self.job.folder) or {}
        evaluations = () if self.job.until else state.get("evaluations", ())
        whole = self._stage_is_there() and all(one.get("status") == "finished" for one in evaluations)
        if not code and whole and self.at == len(self.commands):
            return "finished", None
        if self.runner.came:
            return "preempted", None
        said = [one for one in (*state.get("stages", ()), *evaluations) if one.get("status") == "failed"]
        line = self.child.last_line if self.at > 1 else (said and said[0].get("last_line")) or self.child.last_line
        if code in (0, 143) and not said:
            line = line or "stopped before its end"
        part = f"{said[0]['name']}: " if said and self.at == 1 else ""
        return "failed", f"{part}{line}" if line else f"ended with status {code} (see {self.job.log})"

    def _end(self, status: str, error: str | None) -> None:
        job = self.job
        job.status, job.error = status, error
        seconds = time.monotonic() - job.begun
        if job.until is None or status != "finished":
            tell(job.run, status, error, seconds)
        self.display.ended(job.title, {"preempted": "stopped, to be gone on with"}.get(status, status), seconds, error)


def _finished(folder: Path) -> bool:
    return is_whole(folder.resolve())


def unfinished(runs: list[Run]) -> list[Run]:
    return [run for run in runs if status_of(run)[0] != "finished"]


# --- the machine ------------------------------------------------------------------------------------------------------


def shares(count: int) -> list[dict[str, str]]:
    """What the environment of each of `count` runs at once has beside this one's: its GPUs, or its CPU threads.

    NUM_GPUS, where it is set, is how many each run takes; else the GPUs are shared out evenly.

    Raises:
        LlavaError: fewer GPUs than that.
    """
    devices = cuda_devices()
    if not devices:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        given = {} if count == 1 else {"OMP_NUM_THREADS": str(max(1, cores // count))}
        return [{"CUDA_VISIBLE_DEVICES": "", **given} for _ in range(count)]
    each = int(os.environ.get("NUM_GPUS") or 0) or max(1, len(devices) // count)
    if each * count > len(devices):
        raise LlavaError(
            f"--jobs {count}: {each} GPUs for each are {each * count}, found {len(devices)}; expected fewer jobs"
        )
    parts = [devices[slot * each : (slot + 1) * each] for slot in range(count)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(part), "NUM_GPUS": str(len(part))} for part in parts]


def cuda_devices() -> list[str]:
    """The CUDA devices that runs may use, as CUDA_VISIBLE_DEVICES names them; none where NUM_PROCS asks for the CPU.

    Raises:
        LlavaError: there are some that PyTorch cannot use.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if os.environ.get("NUM_PROCS") or visible in ("", "-1"):
        return []
    if not any(map(os.path.exists, _DRIVERS)):
        return []
    asked = [sys.executable, "-W", "ignore", "-m", "llava.train.devices"]
    done = subprocess.run(asked, capture_output=True, text=True)
    if done.returncode:
        raise LlavaError(
            (done.stderr.strip().splitlines() or ["the GPUs cannot be looked at"])[-1].removeprefix("error: ")
        )
    names = visible.split(",") if visible else [str(number) for number in range(int(done.stdout))]
    return names[: int(done.stdout)]
