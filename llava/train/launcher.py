"""What started this process: a process that it does not outlive, and that is told how it ended.

Started by torchrun, `deepspeed`, `accelerate` or a script of this project, a process ends where one of them is gone: a
launcher that is killed outright (SIGKILL, out of memory) cannot end what it has started. A process that was started
plainly has no launcher, and lives on where its shell goes away.
"""

import atexit
import functools
import itertools
import json
import multiprocessing
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NamedTuple

from llava.errors import LlavaError, LostRank, told

PROGRAMS = {"torchrun", "deepspeed", "deepspeed.pt", "ds", "accelerate", "accelerate-launch"}
MODULES = ("torch.distributed.", "deepspeed.launcher", "accelerate.commands")
SCRIPT = "LLAVA_SCRIPT_PID"  # scripts/common.sh sets it
_EVERY = 0.5  # seconds between two looks


def under_launcher(main):
    """Decorate a command-line `main` that a launcher may start, outside of `report_errors`.

    It ends with its launcher, and tells it of a fault. One of several ranks that has failed ends at once then: what
    Python does at its end takes seconds, and may wait for the other ranks.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        ended = threading.Event()
        if found := _above.setdefault(os.getpid(), launchers()):
            threading.Thread(target=_watch, args=(found, ended), name="launcher", daemon=True).start()
        try:
            return main(*args, **kwargs)
        except (Exception, SystemExit) as end:
            error = end.__context__ if isinstance(end, SystemExit) else end  # what `report_errors` has told
            if isinstance(error, Exception):
                tell_launcher(error)
                if found and int(os.environ.get("WORLD_SIZE", "1")) > 1:
                    if error is end:
                        sys.excepthook(type(error), error, error.__traceback__)  # PyTorch's, which says the rank
                    end_process(told(error)[1])
            raise
        finally:
            ended.set()

    return wrapper


def tell_launcher(error: Exception) -> None:
    """Write one line to the file that torchrun shows in its summary, if it has asked for one.

    Of several ranks the one with the earliest second counts as the cause, so that one which ended because of another
    dates itself later.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        second = int(time.time()) + (2 if isinstance(error, LostRank) else 0)
        extra = {"py_callstack": one_line(error), "timestamp": str(second)}
        Path(path).write_text(json.dumps({"message": {"message": one_line(error), "extraInfo": extra}}))


def one_line(error: BaseException) -> str:
    """A fault in one line: a user's as it is told, a program's with where it was raised."""
    text = " ".join(str(error).split())
    if isinstance(error, (LlavaError, LostRank)):
        return f"error: {text}"
    last = traceback.extract_tb(error.__traceback__)[-1:]
    where = "".join(f" ({frame.filename}:{frame.lineno})" for frame in last)
    return f"{type(error).__name__}: {text}{where}"


def end_process(status: int, line: str | None = None) -> None:
    """End this process and its data-loader workers at once, whatever its main thread stands in; `line`: said before.

    Nobody may read what is said, and what is done at exit may wait, so that neither is waited for long.
    """
    last = threading.Thread(target=_last, args=(line,), daemon=True)
    last.start()
    for child in multiprocessing.active_children():
        child.kill()
    last.join(5)
    os._exit(status)


def _last(line: str | None) -> None:
    _say(line)
    atexit._run_exitfuncs()  # reports to wandb and the like
    _say(None)


def _say(line: str | None) -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            if line and stream is sys.stderr:
                print(line, file=stream)
            stream.flush()
        except OSError:  # who read it is gone: there is nobody to tell
            return


# --- the processes above this one -------------------------------------------------------------------------------------


class Process(NamedTuple):
    """One of this machine; `start` tells it from a later one of the same number. state: a letter of /proc."""

    pid: int
    state: str
    parent: int
    start: str


def process(pid: int) -> Process | None:
    """None: there is none, or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return Process(pid, fields[0], int(fields[1]), fields[19]) if fields[0] not in "ZX" else None


def launchers() -> list[Process]:
    """The processes above this one, up to the last that is a launcher; none where this one was started plainly."""
    above, last, pid = [], 0, os.getppid()
    while pid > 0 and (found := process(pid)):
        above.append(found)
        if _launches(pid) or (len(above) == 1 and "TORCHELASTIC_RUN_ID" in os.environ):
            last = len(above)
        pid = found.parent
    return above[:last]


def _launches(pid: int) -> bool:
    return os.environ.get(SCRIPT) == str(pid) or _program(_command(pid)) is not None


def _program(words: list[str]) -> str | None:
    """The launcher that a command line starts."""
    named = [Path(word).name for word in words[:2]]
    modules = [word for flag, word in itertools.pairwise(words) if flag == "-m"]
    found = [name for name in named if name in PROGRAMS] + [word for word in modules if word.startswith(MODULES)]
    return found[0] if found else None


def _command(pid: int) -> list[str]:
    """The words of a process's command line, without an interpreter's single letters but -m."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
    return [word for word in words if word == "-m" or not (word.startswith("-") and len(word) == 2)]


_above: dict[int, list[Process]] = {}  # of this process: a forked one has others


def gone() -> Process | None:
    """A launcher of this process that has ended."""
    found = ((one, process(one.pid)) for one in _above.get(os.getpid(), ()))
    return next((one for one, now in found if now is None or now.start != one.start), None)


def _watch(above: list[Process], ended: threading.Event) -> None:
    commands = {one.pid: _command(one.pid) for one in above}
    names = {pid: _program(words) or Path((words or [""])[0]).name for pid, words in commands.items()}
    while not ended.wait(_EVERY):
        if one := gone():
            line = f"error: the launcher is gone ({names[one.pid]}, pid {one.pid}): this run ends"
            end_process(1, line if os.environ.get("LOCAL_RANK", "0") == "0" else None)
