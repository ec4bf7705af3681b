"""The files of scripts/ by which DeepSpeed holds parameters or optimizer state on the CPU, or makes the optimizer, as
they are. Its own Adam is compiled at its first use."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).parents[2]
OTHERS = ("zero3_offload", "zero2_offload", "zero2_fused_adamw", "zero2_noopt")


@pytest.mark.parametrize("precision", ["bf16", None])
def test_steps_are_those_of_zero3(tmp_path, precision):
    tiny.llm(tmp_path / "llm")
    tiny.tower(tmp_path / "clip")
    tiny.records(tmp_path, "iitiitti")
    runs, parts = [], {"model_name_or_path": tmp_path / "llm", "vision_tower": tmp_path / "clip", "use_cpu": True}
    parts |= {"mm_vision_tower_lr": 1e-4, "mm_projector_lr": 3e-3, "weight_decay": 0.1}  # groups of parameters
    parts["data_path"] = tmp_path / "records.json"
    if precision:
        parts[precision] = True
    for name in ("zero3", *OTHERS):
        changes = {"output_dir": tmp_path / name, "deepspeed": ROOT / f"scripts/{name}.json"}
        runs.append(tiny.train_flags(tmp_path, **parts, **changes))
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    command = [sys.executable, "-m", "tests.support.runs", str(tmp_path / "runs.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    whole, *others = ([step["loss"] for step in tiny.history(tmp_path / run)] for run in ("zero3", *OTHERS))
    assert len(whole) == 3 and whole[2] < whole[0]
    for name, losses in zip(OTHERS, others, strict=True):
        assert losses == pytest.approx(whole, abs=1e-2 if precision else 1e-4), name
