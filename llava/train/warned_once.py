"""Warnings of libraries once in a run, in place of once on every rank, in every data-loader worker and every step."""

import contextlib
import logging
import mmap
import os
import re
import warnings
import zlib

from llava.utils import is_rank0

_NUMBERS = re.compile(r"0x[0-9a-f]+|\d+")
_PLACES = 2**20  # of texts in what this process shares with its workers
LOGGERS = ("", "transformers", "accelerate", "DeepSpeed", "torch")


@contextlib.contextmanager
def warned_once():
    """Inside, what is warned of a second time is not shown: by `warnings`, or by a library's logger.

    Two warnings from one line of code that differ in numbers alone are the same. Every warning is shown, by the rank
    that has it first; one that other ranks have before they have met is told at the end if rank 0 has not had it. A
    worker's is shown by the workers of rank 0. Gives a `Once`.
    """
    once, show = Once(), warnings.showwarning

    def show_once(message, category, filename, lineno, file=None, line=None):
        def now():
            show(message, category, filename, lineno, file, line)

        if once.is_new(f"{category.__name__} {filename}:{lineno} {message}", now):
            now()

    handlers = [handler for name in LOGGERS for handler in logging.getLogger(name).handlers]
    with warnings.catch_warnings():
        warnings.showwarning = show_once
        for handler in handlers:
            handler.addFilter(once)
        try:
            yield once
        finally:
            for handler in handlers:
                handler.removeFilter(once)
            once.tell_held()


class Once(logging.Filter):
    """Which warnings have been shown.

    Attributes:
        claim: a function of a text, given when the ranks have met: whether this rank is the first to have it; None
            where that cannot be known.
    """

    def __init__(self):
        super().__init__()
        self.claim = lambda text: None
        self._said = mmap.mmap(-1, _PLACES)  # forked workers write to it as well
        self._process = os.getpid()
        self._shown: list[str] = []  # before the ranks met
        self._held: list[tuple] = []

    def is_new(self, text: str, show=None) -> bool:
        """Whether to show it now; `show` shows it later where that is for another rank to say."""
        text = _NUMBERS.sub("#", text)
        place = zlib.crc32(text.encode()) % _PLACES
        if self._said[place]:
            return False
        self._said[place] = 1
        if os.getpid() != self._process:
            return is_rank0()
        first = self.claim(text)
        if first is None and is_rank0():
            self._shown.append(text)
        elif first is None and show is not None:
            self._held.append((text, show))
        return is_rank0() if first is None else first

    def meet(self, claim) -> None:
        """The ranks have met: from now on `claim` says which of them is the first."""
        for text in self._shown:
            claim(text)
        self.claim = claim

    def tell_held(self) -> None:
        """Show what no other rank has shown."""
        for text, show in self._held:
            if self.claim(text):
                show()

    def filter(self, record: logging.LogRecord) -> bool:
        """Only for a logger's warnings: its errors and information are shown as they come."""
        return record.levelno != logging.WARNING or self.is_new(f"{record.name} {record.getMessage()}")
