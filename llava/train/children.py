"""Programs that a recipe or a comparison starts: what they say passes through, signals reach them once, and they do not
outlive what started them."""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

from llava.train.launcher import process
from llava.train.stopping import SIGNALS

ABOVE = "LLAVA_STARTED_BY"  # the process that all training below it ends with; scripts/common.sh hands it on
_KEPT = 4096  # bytes of a stream's end that are looked at for its last line


class Child:
    """A program in a session of its own, whose two streams are handed on as they come.

    Args:
        words: the command.
        env: what its environment has beside this one's.
        out, err: file descriptors that its streams go to.

    """

    def __init__(self, words: list[str], env: dict[str, str] | None = None, out: int = 1, err: int = 2):
        self.process = subprocess.Popen(
            words,
            **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE},
            **{"env": _environment() | (env or {}), "start_new_session": True, "preexec_fn": _end_with_parent()},
        )
        self._said = ["", ""]
        streams = enumerate(((self.process.stdout, out), (self.process.stderr, err)))
        self._readers = [threading.Thread(target=self._hand_on, args=(i, *pair), daemon=True) for i, pair in streams]
        for reader in self._readers:
            reader.start()

    def _hand_on(self, number: int, stream, to: int) -> None:
        end = b""
        while part := os.read(stream.fileno(), 65536):
            with contextlib.suppress(OSError):  # nobody reads it any more: the program goes on
                os.write(to, part)
            end = (end + part)[-_KEPT:]
            lines = [line.rpartition(b"\r")[2].strip() for line in end.split(b"\n")]
            said = [line for line in lines if line and b"it/s]" not in line and b"s/it]" not in line]
            if said:
                self._said[number] = said[-1].decode(errors="replace")[:500]
        stream.close()

    @property
    def last_line(self) -> str:
        """What it has said last, progress bars apart: where it has failed, of its errors; "" if nothing."""
        out, err = self._said
        return (err or out) if self.process.poll() else (out or err)

    def wait(self) -> int:
        """Its exit status, as a shell has it: 128 + N where signal N ended it."""
        status = self.process.wait()
        for reader in self._readers:
            reader.join(5)  # something of its own may hold the streams open
        return status if status >= 0 else 128 - status

    def tell(self, number: int) -> None:
        """Send a signal to the program alone, not to what it has started."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)


def _environment() -> dict[str, str]:
    """This process's, where programs write at once and know how wide the terminal is, which they do not see."""
    env = dict(os.environ, PYTHONUNBUFFERED="1")
    if sys.stderr.isatty():
        env.setdefault("COLUMNS", str(shutil.get_terminal_size().columns))
    above = env.get(ABOVE, "")
    if not (above.isdigit() and int(above) in _ancestors()):
        env[ABOVE] = str(os.getpid())
    return env


def _ancestors() -> Iterator[int]:
    pid = os.getpid()
    while found := process(pid):
        yield pid
        pid = found.parent


def _end_with_parent() -> Callable[[], None] | None:
    """What a child calls before its program begins, so that Linux ends it with this process; None elsewhere."""
    if sys.platform != "linux":
        return None
    control = ctypes.CDLL(None, use_errno=True).prctl
    return lambda: control(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def handing_on(tell: Callable[[int], None]) -> Iterator[list[int]]:
    """Inside, a signal that asks this process to stop calls `tell(number)`; the list has those that came."""
    came: list[int] = []

    def receive(number, frame):
        came.append(number)
        tell(number)

    before = {}
    for number in (getattr(signal, name) for name in SIGNALS):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            before[number] = signal.signal(number, receive)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
