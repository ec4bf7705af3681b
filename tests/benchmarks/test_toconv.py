"""The token compression benchmark and its checks in the GPU suite, in tiny shapes; nothing here hangs on a time."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks"
CASES = ["none, 24x24", "24 -> 12", "24 -> 8", "none, 16x16", "16 -> 12", "16 -> 8"]
# 5 crops of a 1100x808 image: base, then the unpadded map of 2x2 crops with a newline per row
IMAGE_TOKENS = [576 + 36 * 49, 144 + 18 * 25, 64 + 12 * 17, 256 + 24 * 33, 144 + 18 * 25, 64 + 12 * 17]


@pytest.fixture
def bench(monkeypatch):
    """The modules toconv and gpu_checks.toconv, the demo sizes made tiny."""
    monkeypatch.syspath_prepend(str(FOLDER))
    script = importlib.import_module("toconv")
    checks, models = importlib.import_module("gpu_checks.toconv"), importlib.import_module("gpu_checks.models")
    llm = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    monkeypatch.setitem(models.LLMS, "demo", llm | {"vocab_size": 64})
    clip = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=1, patch_size=14)
    monkeypatch.setitem(models.TOWERS, "demo", clip | {"image_size": 56})
    monkeypatch.setattr(checks, "INPUT_SETS", 1)
    monkeypatch.setattr(checks, "free_memory", lambda device: None)  # half the time of shapes as small as these
    return script, checks


def run(script, folder, *flags):
    """(exit status, JSON)."""
    output = folder / "deep" / "toconv.json"
    status = script.main(["--device", "cpu", "--repeats", "1", "--output", str(output), *flags])
    return status, json.loads(output.read_text())


def test_report(bench, tmp_path, capsys):
    script, checks = bench
    status, report = run(script, tmp_path)
    assert status == 0 and report["passed"] is True and len(report["verdicts"]) == 12
    assert report["hardware"]["device"] == "cpu" and report["versions"]["torch"] and report["commit"]
    figures = report["figures"]
    assert list(figures) == CASES
    assert [entry["tokens"]["per_crop"] for entry in figures.values()] == [576, 144, 64, 256, 144, 64]
    assert [entry["tokens"]["per_image"] for entry in figures.values()] == IMAGE_TOKENS
    kernels = [0, 3, 3, 0, 5, 3]
    sizes = [
        k and 32 * 32 * k * k + 2 * 32 + 32 * side**2 for k, side in zip(kernels, (0, 12, 8, 0, 12, 8), strict=True)
    ]
    assert [entry["parameters"]["compressor"] for entry in figures.values()] == sizes
    for name in CASES:
        plain = figures["none, 24x24" if "24" in name else "none, 16x16"]
        for timed in checks.TIMED:
            entry = figures[name][timed]
            assert 0 < entry["ms_min"] <= entry["ms"] <= entry["ms_max"]
            assert entry["faster_by"] == pytest.approx(plain[timed]["ms"] / entry["ms"], rel=1e-2)
    printed = capsys.readouterr().out
    for line in ("LLM prefill", "training step", "24 -> 8, first token: faster by", "(aim at Qwen2-7B shape"):
        assert line in printed


@pytest.mark.parametrize("parts", ["adapter", "all"])
def test_what_a_training_step_moves(bench, parts):
    """The compressor of the case and the projector; encoder and language model only with all parts."""
    _, checks = bench
    made = checks.Bench("cpu", "demo", "demo")
    made.start_training(checks.PARTS[parts])
    case = made.cases[1]
    made.use(case)
    watched = {
        "projector": made.model.get_model().mm_projector,
        "compressor": case.tower.token_compressor,
        "encoder": case.tower.vision_tower,
        "language model": made.model.get_model().layers,
        "other compressor": made.cases[2].tower.token_compressor,
    }
    before = {name: [p.detach().clone() for p in module.parameters()] for name, module in watched.items()}
    made.train_step(case)(0)
    moved = {
        name: any(not torch.equal(a, b) for a, b in zip(before[name], module.parameters(), strict=True))
        for name, module in watched.items()
    }
    everything = parts == "all"
    assert moved == {
        "projector": True,
        "compressor": True,
        "encoder": everything,
        "language model": everything,
        "other compressor": False,
    }


def test_cases_share_their_encoder(bench):
    _, checks = bench
    cases = checks.Bench("cpu", "demo", "demo").cases
    encoders = [case.tower.vision_tower for case in cases]
    assert encoders[0] is encoders[1] is encoders[2] and encoders[3] is encoders[4] is encoders[5]
    for case in cases:
        assert case.tower(case.prompts[0]["images"][0]).isfinite().all()


def counts(**changes):
    tokens = {"crops": 5, "per_crop": 64, "per_crop_by_formula": 64}
    tokens |= {"per_image": 268, "per_image_by_formula": 268, "per_image_counted_ahead": 268}
    losses = changes.pop("losses", [2.0, 1.5])
    return {"24 -> 8": {"tokens": tokens | changes, "losses": losses, "train_step": {}}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [True, True]),
        ({"crops": 4}, [False, True]),
        ({"per_crop": 65}, [False, True]),
        ({"per_image": 269}, [False, True]),
        ({"per_image_by_formula": 269}, [False, True]),
        ({"per_image_counted_ahead": 269}, [False, True]),
        ({"losses": [2.0, math.nan]}, [True, False]),
        ({"losses": [math.inf, 1.5]}, [True, False]),
        ({"losses": []}, [True, False]),
    ],
)
def test_verdicts(bench, changes, expected):
    _, checks = bench
    assert [holds for _, holds, _ in checks.verdicts(counts(**changes))] == expected


def wrong_count_ahead(monkeypatch, checks):
    from llava.model.language_model.llava_qwen import LlavaQwenForCausalLM

    plain = LlavaQwenForCausalLM.visual_token_counter
    monkeypatch.setattr(LlavaQwenForCausalLM, "visual_token_counter", lambda self: lambda *args: plain(self)(*args) + 1)


def wrong_formula(monkeypatch, checks):
    monkeypatch.setattr(checks, "tokens_by_formula", lambda side: 5 * side**2)


def not_a_number(monkeypatch, checks):
    plain = checks.Bench.start_training

    def start(self, parts):
        plain(self, parts)
        with torch.no_grad():
            self.cases[2].tower.token_compressor.norm.weight.fill_(math.nan)

    monkeypatch.setattr(checks.Bench, "start_training", start)


def does_not_fit(monkeypatch, checks):
    plain = checks.Bench.train_step

    def train_step(self, case):
        if case is self.cases[0]:
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 9 GiB.")
        return plain(self, case)

    monkeypatch.setattr(checks.Bench, "train_step", train_step)


@pytest.mark.parametrize(
    ("fault", "failed"),
    [
        (wrong_count_ahead, {f"{name}, visual tokens" for name in CASES}),
        (not_a_number, {f"{name}, losses finite" for name in CASES}),  # the projector they share is NaN after it
        (does_not_fit, {"none, 24x24, losses finite"}),
    ],
)
def test_a_wrong_figure_fails(bench, tmp_path, monkeypatch, capsys, fault, failed):
    script, checks = bench
    fault(monkeypatch, checks)
    status, report = run(script, tmp_path)
    assert status == 1 and report["passed"] is False
    found = {verdict["label"] for verdict in report["verdicts"] if not verdict["passed"]}
    assert found == failed
    assert "error: a verdict failed" in capsys.readouterr().err


def test_options_refused(bench, tmp_path):
    script, _ = bench
    for flags, message in (
        (["--repeats", "0"], "--repeats 0"),
        (["--layers", "0"], "--layers 0"),
        (["--llm", "giant"], "size 'giant': expected one of demo"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(script, tmp_path, *flags)


def test_help_loads_nothing_heavy():
    code = "import sys, toconv; toconv.build_parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=FOLDER).returncode == 0


# --- the checks of the GPU suite --------------------------------------------------------------------------------------


def run_suite(folder, *names):
    suite = importlib.import_module("gpu_suite")
    output = folder / "out.json"
    status = suite.main(["--device", "cpu", "--output", str(output), "--workdir", str(folder), "--only", *names])
    return status, {entry["name"]: entry for entry in json.loads(output.read_text())["checks"]}


def test_checks_pass(bench, tmp_path):
    status, found = run_suite(tmp_path, "toconv_golden", "toconv_speed")
    assert status == 0 and list(found) == ["toconv_golden", "toconv_speed"]
    golden = found["toconv_golden"]
    assert [test["label"] for test in golden["tests"]] == ["cases", "24 -> 12", "24 -> 8", "16 -> 12", "16 -> 8"]
    assert all(golden["figures"][name]["float32"] <= 1e-5 for name in ("24 -> 12", "16 -> 8"))
    assert len(found["toconv_speed"]["tests"]) == 12
    assert len(found["toconv_speed"]["figures"]) == 2 + 6 * 5  # device, aim; each case's counts and four times


@pytest.mark.parametrize("fault", [1.01, math.nan])
def test_golden_check_fails_on_wrong_values(bench, tmp_path, monkeypatch, fault):
    from llava.model.multimodal_encoder.token_compressor import TokenCompressor

    plain = TokenCompressor.forward
    monkeypatch.setattr(TokenCompressor, "forward", lambda self, tokens: plain(self, tokens) * fault)
    status, found = run_suite(tmp_path, "toconv_golden")
    assert status == 1
    assert [test["passed"] for test in found["toconv_golden"]["tests"]] == [True, False, False, False, False]


def test_speed_check_fails_on_a_wrong_count(bench, tmp_path, monkeypatch):
    _, checks = bench
    wrong_formula(monkeypatch, checks)
    status, found = run_suite(tmp_path, "toconv_speed")
    assert status == 1 and not found["toconv_speed"]["passed"]
