"""1,000 steps of two processes over records of every kind at random, under ZeRO-2 and ZeRO-3 (scripts/test_long.sh).

A step of one rank may have one image, several, a video or none at all, whatever the other's has.
"""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).parents[2]
STEPS = 1000


def mixed_records(folder: Path, count: int) -> Path:
    """A JSON file of so many records: an image, two, a video (a folder of frames), text, drawn at random."""
    draw = random.Random(0)
    path = Path(tiny.records(folder, "".join(draw.choice("imtv") for _ in range(count)).replace("v", "i")))
    records = json.loads(path.read_text())
    for record in draw.sample([record for record in records if isinstance(record.get("image"), str)], count // 4):
        clip = folder / "videos" / record["id"]
        clip.mkdir(parents=True)
        for frame in range(draw.randint(1, 4)):
            shutil.copy(folder / "images" / record["image"], clip / f"{frame}.png")
        record["video"] = record["id"]
        del record["image"]
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return dict(
        model_name_or_path=tiny.llm(folder / "llm"),
        vision_tower=tiny.tower(folder / "clip"),
        data_path=mixed_records(folder, 400),
        image_folder=folder / "images",
        video_folder=folder / "videos",
    )


@pytest.mark.parametrize("stage", [2, 3])
def test_no_step_hangs(tmp_path, parts, stage):
    flags = tiny.train_flags(
        tmp_path,
        **parts,
        per_device_train_batch_size=1,
        train_sampling_strategy="random",
        max_steps=STEPS,
        learning_rate=1e-4,
        use_cpu=True,
        ddp_timeout=300,
        deepspeed=ROOT / f"scripts/zero{stage}.json",
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, str(ROOT / "llava/train/train_mem.py"), *flags]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-4000:]
    losses = [entry["loss"] for entry in tiny.history(tmp_path / "out")]
    assert len(losses) == STEPS and all(map(math.isfinite, losses))
    assert sum(losses[-100:]) < sum(losses[:100])
