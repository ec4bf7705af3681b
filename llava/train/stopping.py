"""Signals that end a run early: the step is finished and a checkpoint saved, and the same command goes on from there.

SIGTERM, SIGHUP and SIGUSR1 are what schedulers send before they take a machine away, SIGINT is Ctrl-C. One rank that
gets a signal is enough: the ranks agree on the step in what they exchange anyway. A second Ctrl-C stops at once.
"""

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import context

from llava.utils import is_rank0

SIGNALS = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT")


class Preempted(BaseException):
    """A run was stopped by a signal and can go on; raised when its checkpoint is whole.

    As `KeyboardInterrupt`, it is no `Exception`, which a library might catch.

    Attributes:
        signal: its name.
        step: how many steps the run has taken; None: it was stopped before its first.
    """

    def __init__(self, signal: str, step: int | None):
        super().__init__(signal)
        self.signal, self.step = signal, step

    def __str__(self):
        return " ".join(self.args)


class Stopping:
    """A context in which signals ask for the run's end instead of ending it.

    Args:
        grace: seconds from a signal until the run must have begun to save; after them the process ends by itself, as
            one that waits for a lost rank would wait on.
        goes_on: what says how the run goes on, for that case.

    Attributes:
        agreed: the name of the signal, when every rank knows of it; None: there was none.
        saving: a checkpoint is being written.
    """

    def __init__(self, grace: float = 60, goes_on=lambda: ""):
        self.grace, self.goes_on = grace, goes_on
        self.agreed: str | None = None
        self.saving = False
        self._received = 0  # a signal's number
        self._phase = "before"  # the steps; "steps", "after"
        self._before: dict = {}
        self._owner = os.getpid()
        self._wakes = self._listens = None  # the two ends of a pipe

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            return self  # signals are the main thread's
        # written in the signal's own context: seen also while the main thread waits inside a library
        self._listens, self._wakes = os.pipe()
        os.set_blocking(self._wakes, False)
        self._wake_before = signal.set_wakeup_fd(self._wakes, warn_on_full_buffer=False)
        for number in (getattr(signal, name) for name in SIGNALS):
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                self._before[number] = signal.signal(number, self._receive)
        threading.Thread(target=self._watch, daemon=True, name="signals").start()
        return self

    def __exit__(self, *error):
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)
        self._phase = "after"
        if self._wakes is not None:
            signal.set_wakeup_fd(self._wake_before)
            os.close(self._wakes)  # ends the thread

    @contextlib.contextmanager
    def at_steps(self) -> Iterator[None]:
        """While steps are taken, a signal waits for the end of one; before, it ends the run; after, nothing more."""
        self._phase = "steps"
        yield
        self._phase = "after"

    @contextlib.contextmanager
    def while_saving(self) -> Iterator[None]:
        self.saving = True
        yield
        self.saving = False

    def _receive(self, number, frame) -> None:
        if os.getpid() != self._owner:  # a data loader's worker, before it has a say
            return
        first, self._received = not self._received, self._received or number
        if number == signal.SIGINT and (self._phase == "before" or (not first and self._received == number)):
            raise KeyboardInterrupt
        if self._phase == "before":
            raise Preempted(_name(number), None)
        if number == signal.SIGINT:
            self._received = number
        if first and is_rank0() and self._phase == "steps":
            name, again = ("Ctrl-C", "; again: stop at once") if number == signal.SIGINT else (_name(number), "")
            os.write(2, f"\n{name}: finish the step, save, stop{again}\n".encode())  # print is not for handlers

    def _watch(self) -> None:
        """End the process where a signal does not lead to a save in time."""
        with os.fdopen(self._listens, "rb", buffering=0) as wakes:  # open as long as signals may come
            while byte := wakes.read(1):
                if byte[0] in self._before and self._phase == "steps":
                    self._wait_for_a_save(byte[0])

    def _wait_for_a_save(self, number: int) -> None:
        end = time.monotonic() + self.grace
        while self._phase == "steps":
            if time.monotonic() > end and not self.saving:
                late = f"no step ended within save_grace_seconds ({self.grace:g} s)"
                print(f"error: {_name(number)}: {late}; {self.goes_on()}", file=sys.stderr, flush=True)
                os._exit(1)
            time.sleep(0.1)

    def asked(self) -> int:
        """The number of the signal that this process has got, or 0; for the ranks to agree on."""
        return self._received

    def agree(self, number: int) -> None:
        """Take note of what all ranks have exchanged: the largest of their numbers."""
        if number and self.agreed is None:
            self.agreed = _name(number)


def _name(number: int) -> str:
    return signal.Signals(number).name


def in_worker(then=None):
    """A data loader's `worker_init_fn`: signals are the main process's, though every process of a run may get them.

    A worker ends when the main process wants it to, or has gone.

    Args:
        then: another such function, called after it.
    """
    return functools.partial(_begin_worker, then)


def worker_context(given=None):
    """A data loader's `multiprocessing_context`, whose workers have the signals blocked from their first moment on.

    A signal to all processes of a run, as schedulers send it, else ends a worker that begins before `in_worker` has
    seen to it, and with the worker the run.

    Args:
        given: the context that was asked for, or its name; None: Python's usual one.
    """
    kind = given if isinstance(given, str) else (given or multiprocessing).get_start_method()
    return _CONTEXTS[kind]()


class _Blocked:
    def start(self):
        kept = signal.pthread_sigmask(signal.SIG_BLOCK, _numbers())
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, kept)


class _Fork(_Blocked, context.ForkProcess):
    pass


class _Spawn(_Blocked, context.SpawnProcess):
    pass


class _ForkServer(_Blocked, context.ForkServerProcess):
    pass


_CONTEXTS = {
    "fork": type("ForkContext", (context.ForkContext,), {"Process": _Fork}),
    "spawn": type("SpawnContext", (context.SpawnContext,), {"Process": _Spawn}),
    "forkserver": type("ForkServerContext", (context.ForkServerContext,), {"Process": _ForkServer}),
}


def _numbers() -> set[int]:
    return {getattr(signal, name) for name in SIGNALS}


def _begin_worker(then, *args) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, _numbers())
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True, name="signals").start()
    if then is not None:
        then(*args)


def _end_with(parent: int) -> None:
    while True:
        sent = signal.sigtimedwait({signal.SIGTERM}, 1)
        if os.getppid() != parent or (sent is not None and sent.si_pid == parent):
            os._exit(0)
