"""Runs that go on with another number of processes, under another ZeRO stage or none, as if nothing had changed
(scripts/test_long.sh). All take the same steps of four samples; each is held against the run that was not stopped."""

import json
import os
import shutil
import subprocess
import sys
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


def launch(folder: Path, processes: int, runs: list[list[str]]) -> None:
    (folder / f"runs{processes}.json").write_text(json.dumps(runs))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [*start, "-m", "tests.support.runs", str(folder / f"runs{processes}.json")]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    (folder / f"log{processes}").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    records = tiny.records(folder, "iittimtiitititittiit")
    common = dict(data_path=records, image_folder=folder / "images")
    llava = common | dict(model_name_or_path=tiny.llm(folder / "llm"), vision_tower=tiny.tower(folder / "clip"))
    return {"llava": llava, "qwen2_vl": common | dict(model_name_or_path=tiny.qwen2_vl(folder / "qwen"))}


@pytest.fixture(scope="module", params=MODELS)
def table(request, parts, tmp_path_factory):
    """(the folder of a model's runs: of each kind, and one per change; the changes)."""
    model, out = request.param, tmp_path_factory.mktemp(request.param)
    changes = CHANGES if model == "all" else {name: CHANGES[name] for name in FEWER}

    def flags(kind: str, folder: str) -> list[str]:
        name, processes = kind.split()
        settings = json.loads((ROOT / f"scripts/{name[:5]}.json").read_text()) if name != "plain" else None
        if name.endswith("offload"):
            settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        if settings is not None:
            (out / f"{name}.json").write_text(json.dumps(settings))
        keys = dict(
            **{"output_dir": out / folder, "max_steps": 8, "save_strategy": "steps", "save_steps": 3},
            **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2 // int(processes)},
            **{"weight_decay": 0.1, "warmup_steps": 2, "train_sampling_strategy": "random"},
            **{"deepspeed": out / f"{name}.json" if settings else None, "use_cpu": True},
        )
        if model == "qwen2_vl":
            keys |= parts["qwen2_vl"] | {"learning_rate": 1e-3, "logging_steps": 1, "disable_tqdm": True}
            return [part for key, value in keys.items() if value is not None for part in (f"--{key}", str(value))]
        return tiny.train_flags(out, **parts["llava"], **keys, **MODELS[model])

    kinds = sorted({change[0] for change in changes.values()})
    for processes in (1, 2):
        launch(out, processes, [flags(kind, kind) for kind in kinds if kind.endswith(f" {processes}")])
    for name, (before, _) in changes.items():
        shutil.copytree(out / before / "checkpoint-3", out / name / "checkpoint-3")
    for processes in (1, 2):
        runs = [flags(now, name) for name, (_, now) in changes.items() if now.endswith(f" {processes}")]
        launch(out, processes, runs)
    return out, changes


@pytest.mark.parametrize("change", CHANGES)
def test_goes_on_as_if_nothing_had_changed(table, change):
    out, changes = table
    if change not in changes:
        pytest.skip("tried with the model of which all parts are trained")
    whole, found = out / changes[change][0], out / change
    expected, got = tiny.history(whole), tiny.history(found)
    assert len(got) == len(expected) == 8
    for key in ("loss", "grad_norm", "learning_rate", "epoch"):
        assert [entry[key] for entry in got] == pytest.approx([entry[key] for entry in expected], abs=2e-5), key
    assert not list(found.glob(".universal*"))
    for path in whole.glob("*.safetensors"):
        before, after = load_file(path), load_file(found / path.name)
        assert before.keys() == after.keys()
        assert all(torch.allclose(value, after[name], atol=2e-4) for name, value in before.items()), path
