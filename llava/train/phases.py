"""What this process does at the moment, in words, so that a run that stands still can say where."""

import contextlib
import threading
import time
from typing import NamedTuple


class Phase(NamedTuple):
    """name: "forward pass" and the like; step: the one that is taken, 0 before the first; since: `time.monotonic()`."""

    name: str
    step: int
    since: float

    @property
    def seconds(self) -> float:
        """How long this process has been in it."""
        return time.monotonic() - self.since

    def __str__(self):
        return place(self.name, self.step)


def place(name: str, step: int) -> str:
    """A phase in a sentence."""
    return f"{name} of step {step}" if step else name


_now = Phase("start", 0, time.monotonic())
changed = threading.Event()  # set by every phase; who waits for it clears it


def current() -> Phase:
    return _now


def enter(name: str, step: int | None = None) -> None:
    """A phase begins; `step` None: of the same step."""
    global _now
    _now = Phase(name, _now.step if step is None else step, time.monotonic())
    changed.set()


@contextlib.contextmanager
def during(name: str):
    """The phase of what is done inside, or of a decorated function.

    What fails inside leaves the phase as it is, for what is told of the fault.
    """
    before = _now.name
    enter(name)
    yield
    enter(before)
