"""5,000 steps hold no more descriptors, threads, workers, shared memory or memory than 1,000 (scripts/test_long.sh)."""

import os
import re
import subprocess
import sys
from pathlib import Path

from llava.train.launcher import process
from tests import tiny

ROOT = Path(__file__).parents[2]
STEPS, EVERY, WARM = 5000, 500, 1000


def status(pid: int, name: str) -> int:
    return int(re.search(rf"^{name}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M)[1])


def children(pid: int) -> list[int]:
    numbers = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [number for number in numbers if (one := process(number)) and one.parent == pid]


def sample(pid: int) -> dict[str, int]:
    workers = children(pid)
    return {
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": status(pid, "Threads"),
        "workers": len(workers),
        "shared memory": len(os.listdir("/dev/shm")),
        "MB": status(pid, "VmRSS") // 1024,
    }


def test_a_long_run_stays_as_large_as_it_is(tmp_path):
    # 100 epochs, each of which starts workers anew
    changes = dict(max_steps=STEPS, logging_steps=EVERY, dataloader_num_workers=2, per_device_train_batch_size=2)
    flags = tiny.train_flags(tmp_path, "iitimtti" * 12 + "it" * 2, use_cpu=True, **changes)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "llava.train.train", *flags]
    shared, samples = set(os.listdir("/dev/shm")), []
    with subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            if line.startswith("{'loss'"):
                samples.append(sample(run.pid))
                print(len(samples) * EVERY, samples[-1])
    assert run.returncode == 0 and len(samples) == STEPS // EVERY
    first, *later = samples[WARM // EVERY - 1 :]
    for name in ("descriptors", "threads", "workers", "shared memory"):
        # an epoch may be about to start or to end its workers
        assert all(one[name] <= first[name] + 4 for one in later), (name, samples)
    assert later[-1]["MB"] < first["MB"] * 1.05 + 20, samples
    assert not [name for name in set(os.listdir("/dev/shm")) - shared if name.startswith("torch_")]
