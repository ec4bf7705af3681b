"""Runs that go on with another number of processes, under another ZeRO stage or none, as if nothing had changed
(scripts/test_long.sh). All take the same steps of four samples; each is held against the run that was not stopped."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny

ROOT = Path(__file__).parents[2]
CHANGES = {  # a checkpoint of the first goes on as the second: kind, processes
    "ddp 1-2": ("plain 1", "plain 2"),
    "ddp 2-1": ("plain 2", "plain 1"),
    "zero2 1-2": ("zero2 1", "zero2 2"),
    "zero2 2-1": ("zero2 2", "zero2 1"),
    "zero3 1-2": ("zero3 1", "zero3 2"),
    "zero3 2-1": ("zero3 2", "zero3 1"),
    "zero2-zero3 2": ("zero2 2", "zero3 2"),
    "zero3-zero2 2": ("zero3 2", "zero2 2"),
    "zero2-zero3 2-1": ("zero2 2", "zero3 1"),
    "zero3-zero2 1-2": ("zero3 1", "zero2 2"),
    "plain-zero2 1": ("plain 1", "zero2 1"),
    "plain-zero3 1-2": ("plain 1", "zero3 2"),
    "ddp-zero2 2": ("plain 2", "zero2 2"),
    "ddp-zero3 2-1": ("plain 2", "zero3 1"),
    "zero2-plain 2-1": ("zero2 2", "plain 1"),
    "zero2-ddp 1-2": ("zero2 1", "plain 2"),
    "zero3-plain 2-1": ("zero3 2", "plain 1"),
    "zero3-ddp 2": ("zero3 2", "plain 2"),
    "zero2 offload 2": ("zero2 2", "zero2_offload 2"),
    "zero2 no offload 2": ("zero2_offload 2", "zero2 2"),
    "zero2 offload 2-1": ("zero2_offload 2", "zero2 1"),
    "zero3 offload 2": ("zero3_offload 2", "zero3 2"),
    "zero3 offload 1-2": ("zero3 1", "zero3_offload 2"),
}
MODELS = {
    "all": {"mm_projector_lr": 2e-3, "mm_vision_tower_lr": 5e-4, "group_by_modality_length": True},
    "projector": {"mm_tunable_parts": "mm_mlp_adapter"},
    "lora": {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.0, "group_by_varlen": True},
    "qwen2_vl": {},
}
FEWER = ("zero3 2-1", "plain-zero2 1", "plain-zero3 1-2", "zero2-plain 2-1", "zero3-ddp 2")  # of the other models


LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def launch(folder: Path, processes: int, runs: list[list[str]]) -> None:
    (folder / f"runs{processes}.json").write_text(json.dumps(runs))
    command = [*LAUNCH, str(processes), "-m", "tests.support.runs", str(folder / f"runs{processes}.json")]
    done = subprocess.run(command, env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    (folder / f"log{processes}").write_text(done.stdout + done.stderr)
    told = done.stderr[max(done.stderr.find("failed: "), 0) :]  # the first run that failed
    assert done.returncode == 0, told[:6000]


CASES = [(model, name) for model in MODELS for name in (CHANGES if model == "all" else FEWER)]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    common = {"data_path": tiny.records(folder, "iittimtiitititittiit"), "image_folder": folder / "images"}
    llava = common | {"model_name_or_path": tiny.llm(folder / "llm"), "vision_tower": tiny.tower(folder / "clip")}
    return {"llava": llava, "qwen2_vl": common | {"model_name_or_path": tiny.qwen2_vl(folder / "qwen")}}


@pytest.fixture(scope="module")
def flags(parts, tmp_path_factory):
    """A function: the command line of a model's run of a kind."""
    settings = tmp_path_factory.mktemp("settings")

    def of(out: Path, model: str, kind: str, **changes) -> list[str]:
        name, processes = kind.split()
        keys = {"output_dir": out, "max_steps": 8, "save_strategy": "steps", "save_steps": 3, "use_cpu": True}
        keys |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2 // int(processes)}
        keys |= {"weight_decay": 0.1, "warmup_steps": 2, "train_sampling_strategy": "random"}
        if name != "plain":
            config = json.loads((ROOT / f"scripts/{name[:5]}.json").read_text())
            if name.endswith("offload"):
                config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
            keys["deepspeed"] = settings / f"{name}.json"
            keys["deepspeed"].write_text(json.dumps(config))
        if model == "qwen2_vl":
            keys |= parts["qwen2_vl"] | {"learning_rate": 1e-3, "logging_steps": 1, "disable_tqdm": True} | changes
            return [part for key, value in keys.items() for part in (f"--{key}", str(value))]
        return tiny.train_flags(out.parent, **parts["llava"], **keys, **MODELS[model], **changes)

    return of


@pytest.fixture(scope="module")
def table(flags, tmp_path_factory):
    """The folder of all runs: MODEL/KIND, and MODEL/CHANGE."""
    out = tmp_path_factory.mktemp("table")
    kinds = sorted({(model, CHANGES[name][0]) for model, name in CASES})
    for processes in (1, 2):
        here = [(model, kind) for model, kind in kinds if kind.endswith(f" {processes}")]
        launch(out, processes, [flags(out / model / kind, model, kind) for model, kind in here])
    for model, name in CASES:
        shutil.copytree(out / model / CHANGES[name][0] / "checkpoint-3", out / model / name / "checkpoint-3")
    for processes in (1, 2):
        here = [(model, name) for model, name in CASES if CHANGES[name][1].endswith(f" {processes}")]
        launch(out, processes, [flags(out / model / name, model, CHANGES[name][1]) for model, name in here])
    return out


@pytest.mark.parametrize("model, change", CASES)
def test_goes_on_as_if_nothing_had_changed(table, model, change):
    whole, found = table / model / CHANGES[change][0], table / model / change
    expected, got = tiny.history(whole), tiny.history(found)
    assert len(got) == len(expected) == 8
    for key in ("loss", "grad_norm", "learning_rate", "epoch"):
        assert [entry[key] for entry in got] == pytest.approx([entry[key] for entry in expected], abs=2e-5), key
    assert not list(found.glob(".universal*"))
    for path in whole.glob("*.safetensors"):
        before, after = load_file(path), load_file(found / path.name)
        assert before.keys() == after.keys()
        assert all(torch.allclose(value, after[name], atol=2e-4) for name, value in before.items()), path


# --- faults while the state is converted ------------------------------------------------------------------------------


@pytest.fixture
def converting(table, flags, tmp_path):
    """A function: a run of two processes that converts a checkpoint of one, and the process that does it."""
    out, started = tmp_path / "out", []
    shutil.copytree(table / "all/zero3 1/checkpoint-3", out / "checkpoint-3")
    command = [*LAUNCH, "2", str(ROOT / "llava/train/train_mem.py"), *flags(out, "all", "zero3 2", ddp_timeout=60)]

    def begin() -> tuple[subprocess.Popen, int]:
        run = subprocess.Popen(command, env=ENV, cwd=ROOT, start_new_session=True)
        started.append(run)
        end = time.monotonic() + 300
        while not (found := converters(out)):
            assert time.monotonic() < end and run.poll() is None
            time.sleep(0.02)
        return run, found[0]

    yield out, begin
    for run in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)


def converters(out: Path) -> list[int]:
    """The processes that convert a checkpoint of a run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"llava.train.universal" in words and str(out).encode() in words[-2]:
                found.append(int(path.parent.name))
    return found


def same_steps(out: Path, whole: Path) -> bool:
    losses = ([entry["loss"] for entry in tiny.history(folder)] for folder in (out, whole))
    return next(losses) == pytest.approx(next(losses), abs=2e-5) and not list(out.glob(".universal*"))


def test_a_conversion_may_take_longer_than_a_collective(table, converting):
    out, begin = converting
    run, converter = begin()
    os.kill(converter, signal.SIGSTOP)
    time.sleep(90)  # the ranks wait for a minute at most
    assert run.poll() is None
    os.kill(converter, signal.SIGCONT)
    assert run.wait(600) == 0 and same_steps(out, table / "all/zero3 1")


def test_a_run_that_is_killed_while_it_converts_is_begun_again(table, converting):
    out, begin = converting
    run, _ = begin()
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert list(out.glob(".universal*"))
    run, _ = begin()
    assert run.wait(600) == 0 and same_steps(out, table / "all/zero3 1")
