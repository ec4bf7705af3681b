"""The configurations of DeepSpeed in scripts/, and what of ZeRO++ a run refuses."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava.config import resolve
from llava.config.deepspeed_file import check_deepspeed, check_zero_plus_plus
from llava.errors import LlavaError

SCRIPTS = Path(__file__).parents[2] / "scripts"
FILES = {  # name -> the settings that the name promises
    "zero2": {},
    "zero2_fused_adamw": {"optimizer.type": "AdamW"},
    "zero2_noopt": {"optimizer": None, "zero_optimization.overlap_comm": False},
    "zero2_offload": {"zero_optimization.offload_optimizer.device": "cpu"},
    "zero3": {},
    "zero3_offload": {"zero_optimization.offload_optimizer.device": "cpu"},
    "zero3pp": {"zero_optimization.zero_quantized_weights": True, "zero_optimization.zero_hpz_partition_size": 16},
}
THEIR_CHECK = """
import json, sys
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
for path in sys.argv[1:]:
    zero = json.load(open(path))["zero_optimization"]
    print(DeepSpeedZeroConfig(**{name: value for name, value in zero.items() if value != "auto"}).stage)
"""


def run_with(path) -> object:
    return resolve(["--deepspeed", str(path)])


def entry(content: dict, name: str):
    return functools.reduce(lambda found, part: (found or {}).get(part), name.split("."), content)


def test_all_files_are_named_here():
    assert {path.stem for path in SCRIPTS.glob("zero*.json")} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_file_is_what_its_name_says(name):
    run = run_with(SCRIPTS / f"{name}.json")
    check_deepspeed(run)
    content = json.loads((SCRIPTS / f"{name}.json").read_text())
    assert content["zero_optimization"]["stage"] == int(name[4])
    assert {key: entry(content, key) for key in FILES[name]} == FILES[name]


def test_deepspeed_knows_every_entry():
    paths = [str(SCRIPTS / f"{name}.json") for name in FILES]
    done = subprocess.run(
        [sys.executable, "-c", THEIR_CHECK, *paths],
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line for line in done.stdout.split() if line.isdigit()] == [name[4] for name in FILES]


@pytest.mark.parametrize(
    ("zero", "cuda", "processes", "said"),
    [
        ({"zero_quantized_weights": True}, False, 1, "zero_quantized_weights needs CUDA"),
        ({"zero_quantized_gradients": True}, False, 8, "zero_quantized_gradients needs CUDA"),
        ({"zero_quantized_weights": True}, True, 8, None),
        ({"zero_quantized_weights": False}, False, 1, None),
        ({"zero_hpz_partition_size": 16}, True, 24, "zero_hpz_partition_size is 16, which does not divide the 24"),
        ({"zero_hpz_partition_size": 16}, True, 8, None),
        ({"zero_hpz_partition_size": 8}, True, 24, None),
        ({}, False, 3, None),
    ],
)
def test_zero_plus_plus(tmp_path, zero, cuda, processes, said):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, **zero}}))
    if said is None:
        return check_zero_plus_plus(run_with(path), cuda, processes)
    with pytest.raises(LlavaError) as error:
        check_zero_plus_plus(run_with(path), cuda, processes)
    assert str(error.value).startswith(f"{path}: {said}") and "\n" not in str(error.value)


def test_a_run_on_the_cpu_says_it_in_a_line(monkeypatch, tmp_path):
    from llava.train.arguments import make_training_arguments

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # so that what the run sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    run = resolve(["--deepspeed", str(SCRIPTS / "zero3pp.json"), "--use_cpu", "--output_dir", str(tmp_path)])
    with pytest.raises(LlavaError, match=r"needs CUDA devices; scripts/zero3\.json does without"):
        make_training_arguments(run)
