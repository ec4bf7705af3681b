"""How far the runs of a comparison are: one block of lines on a terminal, single lines elsewhere."""

import re
import shutil
import sys
import time
from pathlib import Path

from llava.train.recipe_state import read_recipe_state
from llava.train.run_state import read_state

EVERY = 30.0  # seconds between two lines about running runs, where there is no terminal
_COUNT = re.compile(rb"(\d+)/(\d+) \[")  # of tqdm's bars
_TAIL = 8192


def progress(folder: Path, log: Path) -> tuple[str, int | None, int | None]:
    """(what a run is doing, steps done, steps in all) as its recipe.json and the last progress bar in its log say."""
    state = read_recipe_state(folder) or {}
    parts = [*state.get("stages", ()), *state.get("evaluations", ())]
    part = next((one["name"] for one in parts if one.get("status") == "running"), "")
    found = _COUNT.findall(_tail(log))
    if found:
        return part, int(found[-1][0]), int(found[-1][1])
    told = read_state(folder / part) if part else None
    return part, (told or {}).get("step"), None


def _tail(log: Path) -> bytes:
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL))
            return file.read()
    except OSError:
        return b""


def duration(seconds: float) -> str:
    """As people say it: 45 s, 12 min, 3 h 5 min."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class Display:
    """The progress of `total` jobs, of which `done` were done before.

    Args:
        stream: where it goes (default: stderr).
    """

    def __init__(self, total: int, done: int = 0, stream=None):
        self.total, self.done, self.stream = total, done, stream or sys.stderr
        self.terminal = self.stream.isatty()
        self.begun = self.said = time.monotonic()
        self._lines = 0  # of the block that stands on the terminal

    def line(self, text: str) -> None:
        """A line that stays."""
        self._clear()
        print(text, file=self.stream, flush=True)

    def started(self, title: str) -> None:
        if not self.terminal:
            self.line(f"{title}: started")

    def ended(self, title: str, status: str, seconds: float, error: str | None = None) -> None:
        self.done += 1
        why = f": {error}" if error else ""
        self.line(f"[{self.done}/{self.total}] {title}: {status} after {duration(seconds)}{why}")

    def show(self, running: list) -> None:
        """Tell how far the running jobs are; each has `title`, `folder`, `log` and `begun`."""
        now = time.monotonic()
        if self.terminal:
            self._draw(running)
        elif running and now - self.said >= EVERY:
            self.said = now
            texts = [f"{job.title} {_words(*progress(job.folder, job.log))}".rstrip() for job in running]
            self.line(f"[{self.done}/{self.total}] running: " + ", ".join(texts))

    def _draw(self, running: list) -> None:
        from tqdm import tqdm

        width = shutil.get_terminal_size((100, 24)).columns - 1
        now = time.monotonic()
        lines = [tqdm.format_meter(self.done, self.total, now - self.begun, ncols=width, prefix="runs", unit="run")]
        for job in running:
            part, step, most = progress(job.folder, job.log)
            prefix, spent = f"  {job.title} {part}".rstrip(), now - job.begun
            if most:
                bar = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}]"
                lines.append(tqdm.format_meter(step, most, spent, ncols=width, prefix=prefix, bar_format=bar))
            else:
                lines.append(f"{prefix}: {duration(spent)}"[:width])
        self._clear()
        self.stream.write("\n".join(lines) + "\n")
        self.stream.flush()
        self._lines = len(lines)

    def _clear(self) -> None:
        if self._lines:
            self.stream.write(f"\x1b[{self._lines}F\x1b[J")
            self._lines = 0


def _words(part: str, step: int | None, most: int | None) -> str:
    count = "" if step is None else f" {step}/{most}" if most else f" step {step}"
    return f"({part}{count})".replace("( ", "(") if part or count else ""
