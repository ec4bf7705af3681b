"""Two processes under ZeRO-2 and ZeRO-3 take the same steps as one process on the same global batch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).parents[2]
# Global batch 8 in 2 accumulated micro-batches. With two ranks of 2 rows, rank 1's first micro-batch has no image, and
# in the last step rank 0 has none at all.
KINDS = "iittimti" + "miittiti" + "ttiittim"


def run(flags, processes=1):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / "llava/train/train_mem.py"), *flags]
    result = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return result.stdout


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    run(tiny.train_flags(folder, KINDS, gradient_accumulation_steps=2))
    return folder


@pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed compiles an extension at first use: no C++ compiler")
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_equals_one_process(single, tmp_path, stage):
    flags = tiny.train_flags(
        tmp_path,
        KINDS,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        deepspeed=ROOT / f"scripts/zero{stage}.json",
    )
    run(flags, processes=2)
    ours, expected = tiny.history(tmp_path / "out"), tiny.history(single / "out")
    assert len(ours) == len(expected) == 3
    for got, want in zip(ours, expected, strict=True):
        assert abs(got["loss"] - want["loss"]) <= 1e-5, (got, want)
        assert abs(got["grad_norm"] - want["grad_norm"]) <= 1e-5, (got, want)

    # the saved model is whole, and the same
    import torch
    from safetensors.torch import load_file

    whole, other = load_file(single / "out/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert whole.keys() == other.keys()
    assert all(torch.allclose(whole[key], other[key], atol=1e-4) for key in whole)
