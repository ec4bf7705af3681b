"""The launch lines of the projects that this one follows, on stand-ins for their models: golden/launch_lines.json.

A row's "argv" are the flags of one line of a script, its shell variables filled in where the script or its comments say
with what; a variable that nobody fills in leaves a flag without a value.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llava.config import resolve
from llava.config.commandline import parse_command_line
from llava.errors import LlavaError
from llava.train.settings import check_settings
from tests import tiny
from tests.support.garbage import leave_imported_alone
from tests.train.stand_ins import StandIns

ROOT = Path(__file__).parents[2]
ROWS = json.loads((ROOT / "tests" / "golden" / "launch_lines.json").read_text(encoding="utf-8"))
RUNS = [row for row in ROWS if row["expects"] == "runs"]
REFUSED = [row for row in ROWS if row["expects"] == "refused"]
# keys that say how much is trained, how fast, from where and for how long
INDIFFERENT = (
    *("model_name_or_path", "data_path", "image_folder", "video_folder", "output_dir", "run_name", "report_to"),
    *("pretrain_mm_mlp_adapter", "deepspeed", "num_train_epochs", "per_device_train_batch_size", "tf32", "bf16"),
    *("per_device_eval_batch_size", "gradient_accumulation_steps", "save_steps", "save_total_limit", "save_strategy"),
    *("learning_rate", "weight_decay", "warmup_steps", "lr_scheduler_type", "logging_steps", "model_max_length"),
    *("dataloader_num_workers", "eval_strategy", "lazy_preprocess", "gradient_checkpointing", "dataloader_drop_last"),
    *("mm_vision_tower_lr", "mm_use_im_start_end", "torch_compile", "torch_compile_backend", "frames_upbound"),
)


def name_of(row: dict) -> str:
    return f"{row['source']}/{row['file']}"


def setup_of(row: dict) -> str:
    """What of a line decides which code runs."""
    values = parse_command_line(row["argv"]).values
    kind = StandIns.kind_of(values["model_name_or_path"])
    return json.dumps([kind, sorted((key, str(x)) for key, x in values.items() if key not in INDIFFERENT)])


def first_of_each(rows: list[dict], what) -> list:
    """One row for each value of `what`, the first that has it."""
    return [pytest.param(row, id=name_of(row)) for row in {what(row): row for row in reversed(rows)}.values()]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    return StandIns(tmp_path_factory.mktemp("stand_ins"))


def test_how_many_lines_there_are():
    assert len(ROWS) == len({name_of(row) for row in ROWS}) == 58
    assert (len(RUNS), len(REFUSED)) == (49, 9)
    lines = [row["argv"] for row in ROWS if row["program"] != "train.py"]
    empty = [line for line in lines if line[line.index("--version") + 1].startswith("--")]
    assert len(empty) == 14


@pytest.mark.parametrize("row", first_of_each(RUNS, lambda row: json.dumps(row["argv"])))
def test_line_passes_the_checks_of_a_run(row, stand_ins, tmp_path):
    run = resolve(stand_ins.line(row["argv"], tmp_path / "out"))
    check_settings(run)
    given = {word[2:].partition("=")[0] for word in row["argv"] if word.startswith("--")}
    assert {"model_max_length", "learning_rate"} <= given
    assert run.source("model_max_length") == run.source("learning_rate") == "command line"


@pytest.mark.parametrize("row", first_of_each(REFUSED, lambda row: json.dumps(row["argv"])))
def test_line_is_refused_in_a_line(row):
    with pytest.raises(LlavaError) as error:
        resolve(row["argv"])
    assert row["reason"] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("program", sorted({row["program"] for row in ROWS} - {"train.py"}))
def test_the_program_is_there(program):
    expected = 2 if any(row["program"] == program for row in REFUSED) else 0
    done = subprocess.run(
        [sys.executable, program, "--help"], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == expected, done.stderr
    assert expected == 0 or done.stderr.splitlines() == [
        "error: train_dpo: preference training (DPO) is not available in this version, expected train_mem.py"
    ]


def test_deepspeeds_files_are_there():
    named = {
        word for row in ROWS for key, word in zip(row["argv"], row["argv"][1:], strict=False) if key == "--deepspeed"
    }
    assert {"./scripts/zero2.json", "scripts/zero2_noopt.json", "./scripts/zero3_offload.json"} <= named
    assert all((ROOT / name).is_file() for name in named)


@pytest.mark.parametrize("words", (["--version"], ["--version", ""], ["--version="]))
def test_an_empty_version_is_the_default(words):
    run = resolve([*words, "--run_name", "mine"])
    assert run["version"] == "v0" and run["run_name"] == "mine"
    assert run.notices == ["command line: --version is empty: v0 is used"]


def test_an_empty_path_is_refused():
    with pytest.raises(LlavaError, match="--data_path needs a value"):
        resolve(["--data_path", "--version", "v1"])


@pytest.mark.parametrize("row", first_of_each(RUNS, setup_of))
def test_one_step(row, stand_ins, tmp_path):
    from llava.train.train import train

    leave_imported_alone()
    line = stand_ins.line(row["argv"], tmp_path / "out")
    if "--bits" in line:
        pytest.importorskip("bitsandbytes", reason="QLoRA wants bitsandbytes (pip install bitsandbytes) and a GPU")
    train(line)
    (step,) = tiny.history(tmp_path / "out")
    assert 5 < step["loss"] < 9  # of random weights: about the logarithm of the 703 tokens
