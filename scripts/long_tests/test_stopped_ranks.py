"""A stopped rank under DeepSpeed, and DeepSpeed's own launcher killed (scripts/test_long.sh).

The tests have the same for plain runs under torchrun (tests/train/test_hangs.py).
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava.train.launcher import process
from tests import tiny
from tests.train.test_hangs import below, until

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
ENVIRONMENT["PYTHONPATH"] = str(ROOT)
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
DEEPSPEED = ["deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "29741", "--no_local_rank"]


def start(folder: Path, launcher: list[str], fault: list, **changes) -> tuple[subprocess.Popen, Path]:
    changes = {"use_cpu": True, "per_device_train_batch_size": 2, "ddp_timeout": 60, "max_steps": 1000} | changes
    flags = tiny.train_flags(folder, **changes)
    program = ["--module", "tests.support.faults"] if launcher is DEEPSPEED else ["-m", "tests.support.faults"]
    said = folder / "said.txt"
    with said.open("w") as file:
        command = [sys.executable, "-m", *launcher, *program, *map(str, fault), *flags]
        return subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT), said


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named(tmp_path, stage, rank):
    run, said = start(tmp_path, TORCHRUN, ["stop", rank, 3], deepspeed=ROOT / f"scripts/zero{stage}.json")
    assert run.wait(timeout=900) == 1
    lines = [line for line in said.read_text().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and lines[0].startswith(f"error: rank {rank} (pid "), said.read_text()[-4000:]
    assert re.search(rf"rank {1 - rank} waited for it in the [a-z ]+ of step [34], \d+ s$", lines[0]), lines
    assert "Traceback" not in said.read_text().partition("error: ")[0]


@pytest.mark.parametrize("launcher", [TORCHRUN, DEEPSPEED], ids=["torchrun", "deepspeed"])
def test_ranks_and_workers_end_with_their_launcher(tmp_path, launcher):
    changes = {"deepspeed": ROOT / "scripts/zero2.json", "dataloader_num_workers": 1, "ddp_timeout": 600}
    run, said = start(tmp_path, launcher, ["none", 0, 0], **changes)
    until(lambda: said.read_text().count("step 2") >= 2 or run.poll() is not None, 900)
    assert run.poll() is None, said.read_text()[-4000:]
    processes = below(run.pid)
    assert len(processes) >= 5
    run.send_signal(signal.SIGKILL)
    run.wait()
    began = time.monotonic()
    until(lambda: not any(map(process, processes)), 120)
    print(f"ended {time.monotonic() - began:.1f} s after the launcher")
    assert said.read_text().count("error: the launcher is gone") == 1
