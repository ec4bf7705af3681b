"""A process that a launcher has started ends with it, with its workers; one that was started plainly lives on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava.errors import LlavaError, LostRank
from llava.train import launcher

ROOT = Path(__file__).parents[2]
# a rank with a worker of multiprocessing, whose main thread stands in a call
RANK = """
import multiprocessing, os, sys, time
from llava.train.launcher import under_launcher

@under_launcher
def main():
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,), daemon=True)
    worker.start()
    with open(sys.argv[1] + ".part", "w") as file:
        file.write(f"{os.getpid()} {worker.pid}")
    os.rename(sys.argv[1] + ".part", sys.argv[1])
    time.sleep(1000)

main()
"""
START = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"


@pytest.fixture
def start(tmp_path):
    """A function: a program of this name that starts a rank, and the numbers of the rank and its worker."""
    started = []

    def begin(name: str, command=(), **environment):
        program, said = tmp_path / name, tmp_path / f"pids_{name}"
        program.write_text(START)
        (tmp_path / "rank.py").write_text(RANK)
        words = [*command, sys.executable, str(program), str(tmp_path / "rank.py"), str(said)]
        env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        env.pop("TORCHELASTIC_RUN_ID", None)
        process = subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True)
        until(said.exists)
        started.extend(map(int, said.read_text().split()))
        return process, started[-2:]

    yield begin
    for pid in started:
        if launcher.process(pid):
            os.kill(pid, signal.SIGKILL)


def until(true, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["torchrun", "deepspeed", "accelerate"])
def test_a_rank_and_its_workers_end_with_the_launcher(start, name):
    process, pids = start(name)
    process.kill()
    until(lambda: not any(map(launcher.process, pids)))
    said = process.communicate()[1]
    assert said == f"error: the launcher is gone ({name}, pid {process.pid}): this run ends\n"


def test_a_rank_ends_with_the_script_above_its_launcher(start):
    script = 'export LLAVA_SCRIPT_PID=$$; "$@"; true'
    process, pids = start("torchrun", ["bash", "-c", script, "bash"])
    process.kill()
    until(lambda: not any(map(launcher.process, pids)))


def test_a_process_that_was_started_plainly_lives_on(start):
    process, pids = start("shell.py", ["setsid"])
    process.kill()
    process.wait()
    time.sleep(3)
    assert all(map(launcher.process, pids))


def test_which_programs_are_launchers(monkeypatch):
    commands = {
        "python -u -m torch.distributed.run --nproc_per_node 2 x.py": True,
        "python -m deepspeed.launcher.launch --world_info=x x.py": True,
        "python /usr/bin/torchrun x.py": True,
        "/usr/bin/accelerate launch x.py": True,
        "bash scripts/finetune.sh --deepspeed scripts/zero3.json": False,
        "python llava/train/train_mem.py --deepspeed scripts/zero3.json": False,
        "python -m llava.train.train --run_name torchrun": False,
        "tmux": False,
    }
    for command, expected in commands.items():
        monkeypatch.setattr(launcher.Path, "read_bytes", lambda path, c=command: c.replace(" ", "\0").encode())
        assert launcher._launches(1) is expected, command


def test_torchrun_is_told_one_line(tmp_path, monkeypatch):
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    def told(error):
        @launcher.under_launcher
        def main():
            raise error

        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
        with pytest.raises(type(error)):
            main()
        failure = ProcessFailure(0, 1, 1, str(tmp_path / "error.json"))
        return failure.message["extraInfo"]["py_callstack"], failure.timestamp

    now = int(time.time())
    assert told(LlavaError("a.json: found nonsense"))[0] == "error: a.json: found nonsense"
    line, second = told(KeyError("x\ny"))
    assert line.startswith("KeyError: ") and line.endswith(")") and f"{Path(__file__).name}:" in line
    assert "\n" not in line and now <= second <= now + 60
    assert told(LostRank("rank 1 is gone"))[1] > second  # not taken for the cause
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    (tmp_path / "error.json").unlink()
    with pytest.raises(LlavaError):
        launcher.under_launcher(lambda: (_ for _ in ()).throw(LlavaError("x")))()
    assert not (tmp_path / "error.json").exists()
