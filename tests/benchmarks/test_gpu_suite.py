"""The GPU suite's light checks in their CPU mode, its registry, its verdicts and its JSON."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.forks import SCRIPT

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks"


@pytest.fixture
def suite(monkeypatch):
    """The modules gpu_suite and gpu_checks.registry; what a test registers is gone after it."""
    monkeypatch.syspath_prepend(str(FOLDER))
    module, registry = importlib.import_module("gpu_suite"), importlib.import_module("gpu_checks.registry")
    registry.load_checks()
    monkeypatch.setattr(registry, "CHECKS", dict(registry.CHECKS))
    return module, registry


def run(module, folder, *names, flags=()):
    """(exit status, JSON) of a run of these checks in CPU mode."""
    output = folder / "report" / "out.json"
    arguments = ["--device", "cpu", "--output", str(output), "--workdir", str(folder), "--golden-cases", "2"]
    status = module.main([*arguments, "--only", *names, *flags])
    return status, json.loads(output.read_text())


def test_light_checks_pass(suite, tmp_path, capsys):
    module, _ = suite
    names = ["golden", "attention", "precision", "batched_generation", "packing"]
    status, report = run(module, tmp_path, *names)
    printed = capsys.readouterr().out
    assert status == 0 and report["passed"] is True
    assert [entry["name"] for entry in report["checks"]] == names
    assert "FAIL" not in printed and all(f"PASS {name}" in printed for name in names)
    tests = {entry["name"]: entry["tests"] for entry in report["checks"]}
    assert all(test["passed"] and test["text"] for entry in tests.values() for test in entry)
    assert len(tests["golden"]) == 5  # two checkpoints, eager and sdpa, and how many there were
    worst = report["checks"][0]["figures"]["llama_clip_pad_flat, eager"]
    assert set(worst) == {"embeddings", "logits", "loss", "training_loss"} and worst["logits"] <= 1e-4


def test_report_says_where_and_with_what(suite, tmp_path):
    module, registry = suite

    @registry.check("one")
    def one(context, result):
        result.figure("shape 3x4", ms=1.5, peak_gib=None)
        result.test("runs on", context.device == "cpu" and context.small, context.device)

    status, report = run(module, tmp_path, "one", flags=["--commit", "abc123"])
    assert status == 0
    assert report["commit"] == "abc123" and report["started"].endswith("+00:00")
    assert report["hardware"]["device"] == "cpu" and report["hardware"]["threads"] >= 1
    assert report["versions"]["torch"] and report["versions"]["transformers"]
    assert all(value > 0 for value in report["ceilings"].values())
    assert report["checks"][0]["figures"] == {"shape 3x4": {"ms": 1.5, "peak_gib": None}}


def _false(context, result):
    result.test("first", True, "1 <= 2")
    result.test("second", False, "3 > 2")


def _not_a_number(context, result):
    result.below("difference", value=(math.nan, 1.0))


def _raises(context, result):
    raise RuntimeError("no such thing")


def _silent(context, result):
    pass


@pytest.mark.parametrize("function", [_false, _not_a_number, _raises, _silent])
def test_failing_check_fails_the_run(suite, tmp_path, capsys, function):
    module, registry = suite
    registry.check("bad")(function)
    registry.check("after")(lambda context, result: result.test("still runs", True, "yes"))
    status, report = run(module, tmp_path, "bad", "after")
    assert status == 1 and report["passed"] is False
    assert [entry["passed"] for entry in report["checks"]] == [False, True]
    printed = capsys.readouterr().out
    assert "FAIL bad: " in printed and "1 of 2 checks passed" in printed


def test_registry_refuses_a_name_twice(suite):
    _, registry = suite
    with pytest.raises(ValueError, match="golden"):
        registry.check("golden")(_silent)
    assert all(entry.summary for entry in registry.load_checks().values())


def test_unknown_check_is_named(suite, tmp_path):
    module, _ = suite
    with pytest.raises(SystemExit, match="no check nonsense"):
        run(module, tmp_path, "nonsense")


def test_training_flops_by_hand(suite):
    """One row of a model with 1 layer: every matrix product counted by hand."""
    import torch

    models = importlib.import_module("gpu_checks.models")
    model = models.make_model(models.make_config("demo", "demo", layers=1), "cpu", torch.float32)
    batch = models.make_batch(model, 1, [(2, 2)], text=(10, 10), answer=(6, 6))
    (length,) = models.row_lengths(model, batch)
    embeds, labels, _ = models.merged_inputs(model, batch)
    assert embeds.shape[1] == length and int((labels != -100).sum()) == 6
    d, inner, kv = 128, 320, 64
    layer = 2 * d * d + 2 * d * kv + 3 * d * inner
    expected = 6 * layer * length + 6 * d * length**2 + 6 * 512 * d * 6
    crops, patches, tokens, vision = 5, 16, 17, 256
    expected += 6 * 2 * d * d * crops * patches  # projector
    encoder = 4 * d * d + 2 * d * vision
    expected += 3 * (6 * encoder * crops * tokens + 12 * d * crops * tokens**2)  # three of four layers are used
    expected += 4 * 3 * 14 * 14 * d * crops * patches  # pixels need no gradient
    assert models.training_flops(model, batch) == expected


def test_script_lists_the_checks():
    listed = subprocess.run(
        ["bash", str(FOLDER / "gpu_suite.sh"), "--device", "cpu", "--list"],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
        cwd="/",
    )
    assert listed.returncode == 0, listed.stderr
    names = [line.split()[0] for line in listed.stdout.splitlines()]
    expected = [
        "smoke",
        "golden",
        "attention",
        "precision",
        "batched_generation",
        "packing",
        "packing_speed",
        "demo",
        "generation_speed",
        "training_speed",
    ]
    assert [name for name in names if name in expected] == expected


@pytest.fixture
def smoke(suite, forks, monkeypatch):
    """The module gpu_checks.smoke. Its runs start at once, but for scripts/test_long.sh, where they are as on a GPU."""
    module = importlib.import_module("gpu_checks.smoke")

    def run(runner, title, *command):
        log = runner.folder / f"{title}.log"
        if forks.run(command, log, program=SCRIPT) != 0:
            raise RuntimeError(f"{title}: {log.read_text()[-300:]}")
        return 1.0

    if not os.environ.get("LLAVA_LONG_TESTS"):
        monkeypatch.setattr(module.Runner, "run", run)
    return module


def test_smoke(suite, smoke, tmp_path, capsys):
    """A shipped config in the precision and under the ZeRO stage that it names."""
    module, _ = suite
    status, report = run(module, tmp_path, "smoke", flags=["--smoke-configs", "finetune_lora"])
    assert status == 0, capsys.readouterr().out
    (entry,) = report["checks"]
    expected = ["finetune_lora: trains and resumes", "finetune_lora: answers"]
    assert [test["label"] for test in entry["tests"]] == expected
    run_config = json.loads((tmp_path / "smoke_runs/finetune_lora/run_config.json").read_text())["keys"]
    assert run_config["bf16"]["value"] and run_config["deepspeed"]["value"].endswith("zero3.json")
    weights = load_file(tmp_path / "smoke_runs/finetune_lora/adapter_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}


def test_smoke_tells_what_broke(suite, smoke, tmp_path, monkeypatch):
    module, _ = suite
    monkeypatch.setitem(smoke.SHRUNK, "learning_rate", "fast")
    status, report = run(module, tmp_path, "smoke", flags=["--smoke-configs", "demo_pretrain"])
    (test,) = report["checks"][0]["tests"]
    assert status == 1 and not test["passed"] and "learning_rate is 'fast'" in test["text"]
