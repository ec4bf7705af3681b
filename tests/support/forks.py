"""Training runs as processes of their own that start at once: forked from one that has imported what they need.

    with Forks() as forks:
        run = forks.start(flags, log, change="tests.train.faults:slow_steps:1")  # `train(flags)`, with that change
        forks.wait_for(log, "'loss'")
        os.kill(run, signal.SIGTERM)
        assert forks.end(run) == 0
        status, said = forks.runs(2, [flags, flags], folder)  # one after the other, on two ranks

Only the start is another than torchrun's, through which test_bad_records.py, test_hangs.py and test_two_nodes.py go.
The forking process runs no backward pass itself: after one, a fork could run none. What its first run imported it
imports as well, for those that follow.
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = "tests.support.forks:script"


def hear_all() -> None:
    """In a new process, before its program begins: let it hear the signals that were ignored where the tests were
    started (`nohup`, `&`), as it would at a terminal. A shell script could not do so itself."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)


class Forks:
    """The process that forks; a context, at whose end it and all runs have gone."""

    def __init__(self):
        self._ended: dict[int, int] = {}
        self._running: set[int] = set()

    def __enter__(self):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        env["LOCAL_SIZE"] = "1"  # as DeepSpeed's launcher says it; else DeepSpeed asks numactl at every gradient
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        options = {"cwd": ROOT, "env": env, "preexec_fn": hear_all}
        self.process = subprocess.Popen([sys.executable, "-m", "tests.support.forks"], **options, **pipes)
        return self

    def __exit__(self, *error):
        for run in self._running:
            os.killpg(run, 9)
        self.process.stdin.close()
        self.process.wait()

    def start(
        self,
        flags: list[str],
        log: Path,
        change: str | None = None,
        env: dict | None = None,
        program: str = "llava.train.train:train",
    ) -> int:
        """The process of a run; it leads a group of its own.

        Args:
            flags: its command line.
            log: what it prints.
            change: "module:function" or "module:function:argument", called before it trains.
            env: variables of its environment.
            program: "module:function", which takes the command line and may return an exit status; see `SCRIPT`.
        """
        request = {"flags": list(map(str, flags)), "log": str(log), "change": change, "env": env or {}}
        request["program"] = program
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        run = self._read("started")
        self._ended.pop(run, None)  # of an earlier process with its number
        self._running.add(run)
        return run

    def end(self, run: int) -> int:
        """How a run ended: its exit status, or minus the signal that killed it."""
        while run not in self._ended:
            self._read(None)
        return self._ended[run]

    def run(self, flags: list[str], log: Path, **options) -> int:
        return self.end(self.start(flags, log, **options))

    def start_ranks(
        self, number: int, flags: list[str], log: Path, program: str, env: dict | None = None, **options
    ) -> list[int]:
        """The processes of a program on so many ranks (1: a plain process); what they say is in LOG.0, LOG.1, ..."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"), number)
        group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started = []
        for rank in range(number):
            file = Path(f"{log}.{rank}")
            file.unlink(missing_ok=True)
            place = group | {"RANK": rank, "LOCAL_RANK": rank} if number > 1 else {}
            place = {name: str(value) for name, value in place.items()} | (env or {})
            started.append(self.start(flags, file, env=place, program=program, **options))
        return started

    def ranks(self, number: int, flags: list[str], log: Path, program: str, **options) -> tuple[int, str]:
        """What `start_ranks` starts, to its end; where one fails, the others end.

        Returns:
            the worst exit status, and what the ranks said, one after the other.
        """
        started = self.start_ranks(number, flags, log, program, **options)
        limit = self._kill_after(900, started)
        while set(started) - self._ended.keys():
            self._read(None)
            if any(self._ended.get(run) for run in started):
                limit.cancel()
                limit = self._kill_after(20, started)  # they may still say why
        limit.cancel()
        status = max((self._ended[run] for run in started), key=abs)
        return status, "".join(Path(f"{log}.{rank}").read_text(errors="replace") for rank in range(number))

    def runs(self, number: int, runs: list, folder: Path, name: str = "runs", **options) -> tuple[int, str]:
        """(Exit status, what was said) of what `tests.support.runs` takes, on so many ranks."""
        listed = folder / f"{name}.json"
        listed.write_text(json.dumps(runs))
        return self.ranks(number, [str(listed)], folder / f"{name}.log", "tests.support.runs:main", **options)

    def _kill_after(self, seconds: float, runs: list[int]) -> threading.Timer:
        def kill():
            for run in set(runs) & self._running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(run, signal.SIGKILL)

        timer = threading.Timer(seconds, kill)
        timer.daemon = True
        timer.start()
        return timer

    def wait_for(self, log: Path, text: str, seconds: float = 120) -> None:
        """Until a run has printed this."""
        end = time.monotonic() + seconds
        while not (log.exists() and text in log.read_text(errors="replace")):
            assert time.monotonic() < end, f"{text!r} is not in {log}:\n{log.read_text()[-3000:]}"
            time.sleep(0.02)

    def _read(self, key: str | None) -> int | None:
        while line := self.process.stdout.readline():
            told = json.loads(line)
            if "ended" in told:
                self._ended[told["ended"]] = told["status"]
                self._running.discard(told["ended"])
            if key is None or key in told:
                return told.get(key)
        raise RuntimeError("the forking process has gone")


def script(words: list[str]) -> None:
    """A program for `start`: a file of Python code, and its arguments."""
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def _tell(**words) -> None:
    os.write(1, (json.dumps(words) + "\n").encode())


def _train(request: dict, imported: int) -> None:
    os.setsid()
    known = set(sys.modules)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(request["env"])
    if request["change"]:
        module, function, *argument = request["change"].split(":")
        getattr(importlib.import_module(module), function)(*argument)
    module, function = request["program"].split(":")
    status = 1
    try:
        status = getattr(importlib.import_module(module), function)(request["flags"]) or 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(imported, json.dumps(sorted(set(sys.modules) - known)).encode())
        os._exit(status)


def main() -> None:
    gc.disable()  # what is imported is no garbage
    import llava.train.evaluation
    import llava.train.llava_trainer  # noqa: F401
    from llava.config.schema import all_keys
    from llava.train.arguments import training_arguments_class

    all_keys(), training_arguments_class()  # both are kept
    with contextlib.suppress(ImportError):
        import deepspeed  # noqa: F401
    gc.enable()
    runs: dict[int, object] = {}
    open_stdin = True
    while runs or open_stdin:
        if open_stdin and select.select([sys.stdin], [], [], 0.02)[0]:
            line = sys.stdin.readline()
            if line:
                request = json.loads(line)
                if "--deepspeed" in request["flags"] or request["program"] == "tests.support.runs:main":
                    _load_extension()
                imported = tempfile.TemporaryFile()  # noqa: SIM115
                gc.freeze()  # the runs need not look through what is here
                run = os.fork()
                if run == 0:
                    _train(request, imported.fileno())
                runs[run] = imported
                _tell(started=run)
            open_stdin = bool(line)
        for run in list(runs):
            ended, status = os.waitpid(run, os.WNOHANG)
            if ended:
                _import(runs.pop(run))
                _tell(ended=run, status=os.waitstatus_to_exitcode(status))


@functools.cache
def _load_extension() -> None:
    """DeepSpeed's of collectives on the CPU, which every process would take seconds to load."""
    with contextlib.suppress(Exception), contextlib.redirect_stdout(sys.stderr):  # no DeepSpeed, no compiler
        importlib.import_module("deepspeed.comm.torch").build_shm_op()


def _import(file) -> None:
    """Import the modules that a run has listed."""
    file.seek(0)
    for name in json.loads(file.read() or b"[]"):
        with contextlib.suppress(Exception):  # some come into being with others, or in a run alone
            importlib.import_module(name)
    file.close()


if __name__ == "__main__":
    main()
