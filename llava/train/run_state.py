"""`run_state.json` and `run.lock` of a run's folder: what has become of the run, and that there is one at a time."""

import contextlib
import datetime
import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from llava.errors import LlavaError
from llava.train.checkpoints import tidy, write_json
from llava.train.ranks import from_rank0, gather, together, world_size
from llava.train.stopping import Preempted
from llava.utils import rank0_print

STATE_FILE, LOCK_FILE = "run_state.json", "run.lock"
STATES = ("running", "finished", "preempted", "failed")
REFRESH = 15  # seconds; a lock of another machine is looked after no more when it is four times as old


def read_state(out: str | Path) -> dict | None:
    """The state of the last run in a folder; None where there is none, or none that can be read."""
    try:
        state = json.loads((Path(out) / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and state.get("state") in STATES else None


class RunState:
    """The state of this run, written to its folder.

    Args:
        out: the folder.
        writes: whether this process is the one that does (of several that share the folder).
    """

    def __init__(self, out: str, writes: bool):
        self.out, self.writes = Path(out), writes
        self.started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.step: int | None = None
        self.begun = False  # it has something to lose: until then the folder's earlier run stands

    def tell(self, state: str, step: int | None = None, *, signal: str | None = None, message: str | None = None):
        """Write the state; `step` None: the last one told."""
        self.step = self.step if step is None else step
        self.begun = True
        if self.writes:
            content = {"state": state, "step": self.step, "signal": signal, "host": socket.gethostname()}
            content |= {"pid": os.getpid(), "started": self.started, "message": message}
            write_json(self.out / STATE_FILE, content)

    @contextlib.contextmanager
    def told_at_the_end(self, goes_on: Callable[[int | None], str]) -> Iterator[None]:
        """Write how the run inside ended, if not by itself. What it had not begun to change stays what it was.

        Args:
            goes_on: says how the run goes on after so many steps (None: it was stopped before); the interruption says
                it from there on.
        """
        try:
            yield
        except (KeyboardInterrupt, Preempted) as stop:
            said = goes_on(getattr(stop, "step", None))
            self._end("preempted", signal=getattr(stop, "signal", "SIGINT"), message=said)
            stop.args = (*(stop.args if isinstance(stop, Preempted) else ()), said)
            raise
        except Exception as error:
            said = (str(error).strip().splitlines() or [""])[0]
            if self.begun or not isinstance(error, LlavaError):  # else it was refused, and leaves no trace
                kind = "" if isinstance(error, LlavaError) else f"{type(error).__name__}: "
                self._end("failed", message=f"{kind}{said}")
            raise

    def _end(self, state: str, **why) -> None:
        before = read_state(self.out) or {}
        if self.begun or before.get("state") != "finished":
            self.tell(state, self.step if self.begun else before.get("step"), **why)


@contextlib.contextmanager
def one_run(args) -> Iterator[None]:
    """Hold a run's folder, on every machine that has one of its own; every rank must enter it.

    Args:
        args: the run's `TrainingArguments`.

    Raises:
        LlavaError: on every rank: another run has the folder, or not all machines share it.
    """
    with contextlib.ExitStack() as held:

        def take() -> None:
            if args.should_save:
                held.enter_context(Lock(args.output_dir))
                tidy(args.output_dir)

        together(take)
        if world_size() > 1 and not args.save_on_each_node:
            _check_shared(Path(args.output_dir) / LOCK_FILE)
        yield


def _check_shared(lock: Path) -> None:
    token, end = from_rank0(lambda: _read(lock).get("token")), time.monotonic() + 10
    while _read(lock).get("token") != token and time.monotonic() < end:
        time.sleep(0.2)  # network file systems show new files late
    blind = gather(None if _read(lock).get("token") == token else socket.gethostname())
    if names := sorted({name for name in blind if name}):
        raise LlavaError(
            f"output_dir: {lock.parent}: what rank 0 writes there is not seen on {', '.join(names)}; expected a folder "
            "that all machines share, or --save_on_each_node true for folders of their own"
        )


class Lock:
    """One run per folder: a context that holds `run.lock`, which names the process that writes there.

    Raises on entry:
        LlavaError: another process that is alive has it.
    """

    def __init__(self, out: str):
        self.path = Path(out) / LOCK_FILE
        self.owner = {"host": socket.gethostname(), "boot": _boot(), "pid": os.getpid(), "start": _start(os.getpid())}
        self.owner |= {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "token": uuid.uuid4().hex}
        self._released = threading.Event()

    def __enter__(self):
        folder = self.path.parent
        try:
            self._made = not folder.is_dir()
            folder.mkdir(parents=True, exist_ok=True)
            while not self._take():
                self._remove_stale()
        except OSError as error:
            raise LlavaError(f"output_dir: {folder} cannot be written to: {error.strerror}") from None
        threading.Thread(target=self._refresh, daemon=True, name="run.lock").start()
        return self

    def __exit__(self, *error):
        self._released.set()
        if _read(self.path).get("token") == self.owner["token"]:
            self.path.unlink(missing_ok=True)
        if self._made and self.path.parent.is_dir() and not any(self.path.parent.iterdir()):
            self.path.parent.rmdir()

    def _take(self) -> bool:
        """Make the lock, with its content at once: of two that try, one succeeds."""
        mine = self.path.with_name(f".{LOCK_FILE}.{self.owner['token']}")
        mine.write_text(json.dumps(self.owner), encoding="utf-8")
        try:
            os.link(mine, self.path)
            return True
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):  # file systems without hard links
                raise
            return self._take_without_links()
        finally:
            mine.unlink()

    def _take_without_links(self) -> bool:
        try:
            with open(self.path, "x", encoding="utf-8") as file:
                json.dump(self.owner, file)
            return True
        except FileExistsError:
            return False

    def _refresh(self) -> None:
        while not self._released.wait(REFRESH):
            try:
                os.utime(self.path)
            except OSError:  # the folder has gone; the run will find out when it saves
                return

    def _remove_stale(self) -> None:
        """Remove the lock of a process that is no more."""
        held = _read(self.path)
        if _is_alive(self.path, held, self.owner["host"]):
            raise LlavaError(
                f"output_dir: {self.path.parent} is in use by process {held.get('pid')} on {held.get('host')}, started "
                f"{held.get('time')}; expected one run per folder (if no such process runs, remove {self.path})"
            )
        apart = self.path.with_name(f".{LOCK_FILE}.{self.owner['token']}.stale")
        try:
            os.rename(self.path, apart)
        except FileNotFoundError:  # another one was faster
            return
        if _read(apart) != held:  # and has it now
            os.rename(apart, self.path)
            return
        apart.unlink()
        if held:
            rank0_print(
                f"{self.path}: of a run that has gone (process {held.get('pid')} on {held.get('host')}); removed"
            )


def _is_alive(path: Path, held: dict, here: str) -> bool:
    """Whether the process that a lock names is there. Of another machine the lock's age tells, after a short wait."""
    if held.get("host") != here:
        return _is_refreshed(path, held)
    if held.get("boot") != _boot() or held.get("pid") == os.getpid():  # this process has let go of it, or never had it
        return False
    return held.get("start") is not None and _start(held.get("pid")) == held["start"]


def _is_refreshed(path: Path, held: dict) -> bool:
    try:
        before, now = path.stat().st_mtime, time.time()
    except FileNotFoundError:
        return False
    if not held:  # empty: cut off by a full disk or a loss of power
        return now - before < REFRESH
    rank0_print(f"{path}: process {held.get('pid')} on {held.get('host')} has it; waiting for a sign of life")
    end = time.monotonic() + 4 * REFRESH
    while time.monotonic() < end:
        time.sleep(1)
        try:
            if path.stat().st_mtime != before:
                return True
        except FileNotFoundError:
            return False
    return False


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _start(pid) -> int | str | None:
    """When a process began, in the machine's ticks; None where there is no such process, or a dead one."""
    try:
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError, TypeError):
        return _started_elsewhere(pid)
    return None if fields[0] in ("Z", "X") else int(fields[19])


def _started_elsewhere(pid) -> str | None:
    """The same where there is no /proc: that the process is there."""
    if os.path.isdir("/proc/self"):
        return None
    try:
        os.kill(int(pid), 0)
    except (OSError, ValueError, TypeError):
        return None
    return "alive"
