"""A run of two processes under DeepSpeed that was stopped goes on as if it had not been (scripts/test_long.sh)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return dict(
        model_name_or_path=tiny.llm(folder / "llm"),
        vision_tower=tiny.tower(folder / "clip"),
        data_path=tiny.records(folder, "iittimtimiittitittiittim"),
        image_folder=folder / "images",
    )


def run(folder: Path, out: Path, stage: int, parts: dict) -> str:
    flags = tiny.train_flags(
        folder,
        **parts,
        output_dir=out,
        per_device_train_batch_size=2,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        deepspeed=ROOT / f"scripts/zero{stage}.json",
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, str(ROOT / "llava/train/train_mem.py"), *flags]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("stage", [2, 3])
def test_resume(tmp_path, parts, stage):
    run(tmp_path, tmp_path / "whole", stage, parts)
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoint-4")
    (tmp_path / "stopped" / "trainer_state.json").unlink()
    assert "resuming from" in run(tmp_path, tmp_path / "stopped", stage, parts)
    whole, resumed = tiny.history(tmp_path / "whole"), tiny.history(tmp_path / "stopped")
    assert len(whole) == 4
    assert [(x["loss"], x["grad_norm"]) for x in resumed] == [(x["loss"], x["grad_norm"]) for x in whole]
