"""The training-step benchmark in tiny shapes: ways that compute the same have the same losses."""

import importlib
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("train_step"), importlib.import_module("gpu_checks.train_ways")


def run(script, folder, *flags):
    output = folder / "deep" / "train_step.json"
    shapes = ["--device", "cpu", "--size", "tiny", "--steps", "2", "--repeats", "1", "--output", str(output)]
    return script.main([*shapes, *flags]), json.loads(output.read_text())


def test_four_ways(bench, tmp_path, capsys):
    script, _ = bench
    status, report = run(script, tmp_path)
    assert status == 0 and report["schema"] == 1 and report["repeats"] == 1 and report["host"]["device"] == "cpu"
    assert list(report["ways"]) == ["llava_next", "stock", "unpacked", "packed"]
    for way in report["ways"].values():
        assert way.keys() == {"samples_per_s", "seconds_per_step", "peak_memory_mb", "losses"}
        assert len(way["losses"]) == 2 and way["samples_per_s"] > 0
    losses = {name: way["losses"] for name, way in report["ways"].items()}
    assert losses["packed"] == pytest.approx(losses["llava_next"], abs=1e-5)
    assert losses["unpacked"] == pytest.approx(losses["llava_next"], abs=1e-5)
    assert losses["stock"] == pytest.approx(losses["packed"], abs=0.1)  # several pictures become more tokens there
    packed = report["ways"]["packed"]["samples_per_s"]
    assert report["ratios"]["packed/stock"] == pytest.approx(
        packed / report["ways"]["stock"]["samples_per_s"], abs=1e-2, rel=1e-2
    )
    assert report["ratios"].keys() >= {"packed/llava_next", "packed/unpacked", "memory packed/llava_next"}
    assert "packed/unpacked" in capsys.readouterr().out


def test_stock_transformers_has_the_same_losses_of_single_pictures(bench, tmp_path, monkeypatch):
    script, ways = bench
    single = [sample for sample in ways.read_mixture(56 / 336) if len(sample["images"]) < 2]
    monkeypatch.setattr(ways, "read_mixture", lambda scale: single)
    losses = {name: way["losses"] for name, way in run(script, tmp_path)[1]["ways"].items()}
    assert losses["stock"] == pytest.approx(losses["packed"], abs=2e-5)


def test_losses_that_differ_are_an_error(bench, tmp_path, monkeypatch, capsys):
    script, ways = bench
    own = ways.Project.loss
    monkeypatch.setattr(ways.Project, "loss", lambda self, samples: own(self, samples) * 1.01)
    status, _ = run(script, tmp_path, "--ways", "llava_next", "packed")
    assert status == 1 and "losses of packed and llava_next differ by" in capsys.readouterr().err


def test_the_mixture_is_what_its_seed_makes_and_wastes_what_it_says(bench, tmp_path):
    script, ways = bench
    committed = json.loads(ways.MIXTURE.read_text())
    assert committed["samples"] == ways.make_mixture(committed["seed"], len(committed["samples"]))
    assert run(script, tmp_path, "--steps", "6", "--ways", "packed")[1]["shapes"]["padding_share"] > 0.3
