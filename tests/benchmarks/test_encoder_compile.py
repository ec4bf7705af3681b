"""The benchmark of encoders as one graph and its check in the GPU suite, in their CPU mode; nothing hangs on a time."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = ["--device", "cpu", "--layers", "1", "--images", "4", "--sizes", "28", "42", "--repeats", "2"]


@pytest.fixture
def folder(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    torch._dynamo.reset()


@pytest.fixture
def wrong(monkeypatch):
    """torch.compile gives other numbers, and no graph."""

    def compiled(model, **options):
        def call(**inputs):
            out = model(**inputs)
            out.pooler_output = out.pooler_output * 1.01
            return out

        return call

    monkeypatch.setattr(torch, "compile", compiled)


def run_suite(folder):
    suite = importlib.import_module("gpu_suite")
    output = folder / "out.json"
    arguments = ["--device", "cpu", "--output", str(output), "--workdir", str(folder), "--only", "encoder_compiled"]
    status = suite.main(arguments)
    (entry,) = json.loads(output.read_text())["checks"]
    return status, entry


def test_check_passes(folder, tmp_path):
    status, entry = run_suite(tmp_path)
    assert status == 0 and len(entry["tests"]) == 4 and all(test["passed"] for test in entry["tests"])
    labels = [test["label"] for test in entry["tests"]]
    assert labels[0].startswith("padded, demo, float32") and labels[2].startswith("packed, demo, float32")
    assert len(entry["figures"]) == 2 * (1 + 4)  # differences; two modes of two sides


def test_check_fails_on_other_numbers(folder, tmp_path, wrong):
    status, entry = run_suite(tmp_path)
    assert status == 1 and not any(test["passed"] for test in entry["tests"])


def test_report(folder, tmp_path, capsys):
    benchmark = importlib.import_module("encoder_compile")
    output = tmp_path / "deep" / "out.json"
    assert benchmark.main([*TINY, "--backend", "eager", "--output", str(output)]) == 0
    report, printed = json.loads(output.read_text()), capsys.readouterr().out
    assert report["equal"] is True and report["graphs"] == {"padded": 1, "packed": 1} and report["versions"]["torch"]
    for kind in ("padded", "packed"):
        assert all(value <= limit for value, limit in report["differences"][kind].values())
        for timed in report["figures"][kind].values():
            assert timed["eager"]["ms_min"] <= timed["eager"]["ms"] <= timed["eager"]["ms_max"]
            assert timed["compiled"]["faster_by"] == pytest.approx(
                timed["eager"]["ms"] / timed["compiled"]["ms"], rel=0.01
            )
    assert "faster by" in printed and "1 graph(s)" in printed


def test_report_fails_on_other_numbers(folder, tmp_path, wrong, capsys):
    benchmark = importlib.import_module("encoder_compile")
    assert benchmark.main([*TINY, "--output", str(tmp_path / "out.json")]) == 1
    assert "error: graph and eager outputs differ" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--images", "3"], ["--repeats", "0"], ["--sizes", "56", "28"]])
def test_refused(folder, tmp_path, flags):
    benchmark = importlib.import_module("encoder_compile")
    with pytest.raises(SystemExit, match="error: --images"):
        benchmark.main([*TINY, *flags, "--output", str(tmp_path / "x.json")])


def test_help_loads_nothing_heavy():
    code = "import sys, encoder_compile; encoder_compile.build_parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=FOLDER).returncode == 0
