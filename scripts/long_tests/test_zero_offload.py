"""`scripts/zero3_offload.json` as it is: parameters and optimizer state on the CPU, in DeepSpeed's own Adam, which is
compiled at its first use."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("precision", ["bf16", None])
def test_steps_are_those_without_offload(tmp_path, precision):
    tiny.llm(tmp_path / "llm")
    tiny.tower(tmp_path / "clip")
    tiny.records(tmp_path, "iitiitti")
    runs, parts = [], {"model_name_or_path": tmp_path / "llm", "vision_tower": tmp_path / "clip", "use_cpu": True}
    parts["data_path"] = tmp_path / "records.json"
    if precision:
        parts[precision] = True
    for name in ("zero3", "zero3_offload"):
        changes = {"output_dir": tmp_path / name, "deepspeed": ROOT / f"scripts/{name}.json"}
        runs.append(tiny.train_flags(tmp_path, **parts, **changes))
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    command = [sys.executable, "-m", "tests.support.runs", str(tmp_path / "runs.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    whole, offloaded = ([step["loss"] for step in tiny.history(tmp_path / run)] for run in ("zero3", "zero3_offload"))
    assert len(whole) == 3 and whole[2] < whole[0]
    assert offloaded == pytest.approx(whole, abs=1e-2 if precision else 1e-4)
