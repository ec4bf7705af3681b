"""Runs of two processes under torchrun to which a fault happens; see `tests.support.faults` for what does."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from llava.train.launcher import process

ROOT = Path(__file__).parents[2]
TIMEOUT = 40  # seconds that a rank waits for another; a busy machine must start two within them
WORKERS = {"dataloader_num_workers": 1, "max_steps": 1000}
CASES = {  # name -> (fault, its rank, its step), keys
    "stop": (("stop", 1, 3), {}),
    "raise": (("raise", 1, 3), WORKERS),
    "launcher": (("none", 0, 0), WORKERS),
}
LONG = bool(os.environ.get("LLAVA_LONG_TESTS"))
if not LONG:  # test_launcher.py kills the launchers of smaller processes
    del CASES["launcher"]


@dataclass
class Run:
    """One that has ended: its exit status, what it said, and the numbers of its processes, workers included."""

    status: int
    said: str
    pids: set[int]
    rank_pids: dict[int, int]


def start(kit, out: Path, fault, changes) -> subprocess.Popen:
    flags = kit.flags(out, "iitiittiiiti", ddp_timeout=TIMEOUT, use_cpu=True, per_device_train_batch_size=2, **changes)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, "-m", "tests.support.faults", *map(str, fault), *flags]
    with open(f"{out}.txt", "w") as file:
        return subprocess.Popen(command, env=env, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)


def until(true, seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def below(pid: int) -> set[int]:
    """The processes that this one has started, and those that they have."""
    found = {int(p.name): process(int(p.name)) for p in Path("/proc").glob("[0-9]*")}
    tree = {pid}
    while more := {number for number, one in found.items() if one and one.parent in tree} - tree:
        tree |= more
    return tree


@pytest.fixture(scope="module")
def runs(kit, tmp_path_factory):
    """All cases, which take place at the same time; a launcher is killed in the second step of its run."""
    folder = tmp_path_factory.mktemp("runs")
    shared = set(os.listdir("/dev/shm"))
    started = {case: start(kit, folder / case, *what) for case, what in CASES.items()}
    said = {case: folder / f"{case}.txt" for case in CASES}
    pids: dict[str, set[int]] = {case: set() for case in CASES}
    killed = False

    def look() -> bool:
        nonlocal killed
        for case, launcher in started.items():
            pids[case] |= below(launcher.pid)
        if LONG and not killed and said["launcher"].read_text().count("step 2") == 2:
            started["launcher"].kill()
            killed = True
        waits_for = re.search(r"Sending process (\d+) closing signal", said["stop"].read_text())
        if waits_for and process(int(waits_for[1])):
            os.kill(int(waits_for[1]), signal.SIGKILL)  # torchrun does so after half a minute
        return all(launcher.poll() is not None for launcher in started.values())

    try:
        until(look)
        until(lambda: not any(process(pid) for found in pids.values() for pid in found), 60)
        left = set(os.listdir("/dev/shm")) - shared
    finally:
        for pid in {pid for found in pids.values() for pid in found if process(pid)} - {os.getpid()}:
            os.kill(pid, signal.SIGKILL)
    assert not [name for name in left if name.startswith(("torch_", "sem.mp", "psm_"))], left
    ended = {}
    for case, launcher in started.items():
        text = said[case].read_text()
        ranks = {int(rank): int(pid) for rank, pid in re.findall(r"rank (\d) pid (\d+)", text)}
        ended[case] = Run(launcher.returncode, text, pids[case], ranks)
    return ended


def summary(run: Run) -> str:
    """What torchrun says is the cause."""
    return run.said.partition("Root Cause")[2]


def test_a_rank_that_stands_still_is_named(runs):
    run = runs["stop"]
    lines = [line for line in run.said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, run.said
    assert re.match(
        rf"error: rank 1 \(pid {run.rank_pids[1]} on .*\) is stopped by a signal, last heard in the .* of step [123]; "
        rf"rank 0 waited for it in the [a-z ]+ of step 3, \d+ s$",
        lines[0],
    ), lines
    assert "[rank0]: Traceback" not in run.said and run.status == 1
    assert f"traceback : {lines[0]}" in run.said  # torchrun's, of rank 0


def test_of_a_rank_that_fails_there_is_one_traceback_and_its_last_line(runs):
    run = runs["raise"]
    assert run.status == 1
    assert run.said.count("[rank1]: KeyError: 'what is not there'") == 1 and "[rank0]: Traceback" not in run.said
    assert "rank      : 1 " in summary(run)
    assert re.search(r"traceback : KeyError: 'what is not there' \(.*faults.py:\d+\)\n", summary(run))


@pytest.mark.skipif(not LONG, reason="half a minute more: scripts/test_long.sh runs it (LLAVA_LONG_TESTS)")
def test_nothing_is_left_of_a_run_whose_launcher_is_killed(runs):
    run = runs["launcher"]
    assert run.status == -signal.SIGKILL and len(run.pids) >= 5  # two ranks with a worker each
    lines = [line for line in run.said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "error: the launcher is gone (torch.distributed.run, pid " in lines[0]
    assert not any(map(process, run.pids))
    assert run.said.count("Exception raised") <= 2  # PyTorch's page on a store that is gone: once for each rank at most


def test_library_warnings_are_shown_once(runs):
    text = runs["raise"].said
    notices = [line for line in text.splitlines() if line.startswith("[transformers]") or "Warning: " in line]
    ours = [re.sub(r"^\[rank\d\]:|\d", "", line) for line in notices if "reducer.cpp" not in line]  # C++ says that
    assert len(ours) == len(set(ours)), ours
