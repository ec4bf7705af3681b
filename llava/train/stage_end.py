"""What has become of a training run that another program started, as its folder says (in bash: supervise.sh)."""

import time
from pathlib import Path

from llava.train.run_state import STATE_FILE, read_state


def read_state_of(folder: Path) -> str:
    """running, finished, preempted or failed, as a run's folder says; `unknown` where it says nothing. A folder of an
    earlier version has no run_state.json, and a trainer_state.json where its run has finished."""
    state = read_state(folder)
    if state is not None:
        return state["state"]
    old = folder / "trainer_state.json"
    whole = old.is_file() and old.stat().st_size > 0 and not (folder / STATE_FILE).exists()
    return "finished" if whole else "unknown"


def state_text(folder: Path) -> str:
    try:
        return (folder / STATE_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def wait_for_end(folder: Path, seconds: float = 60) -> None:
    """Until the first machine has said how the run ended: network file systems show it late."""
    end = time.monotonic() + seconds
    while read_state_of(folder) == "running" and time.monotonic() < end:
        time.sleep(0.5)


def how_it_ended(folder: Path, before: str, status: int, stopped: bool) -> str:
    """finished, preempted or failed, of a run that was started when its run_state.json said `before` and has ended with
    an exit status. What counts is what the run says; one that ended before it said anything was stopped where this
    program was told to stop."""
    state = read_state_of(folder)
    if status and state_text(folder) == before:
        state = "unknown"  # what is said there is of an earlier run
    if state in ("finished", "preempted", "failed"):
        return state
    return "preempted" if stopped else "failed"
