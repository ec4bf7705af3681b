"""The benchmark of the watch over a run's numbers, in tiny shapes; nothing here hangs on a time."""

import importlib
import json
from pathlib import Path

from tests import tiny

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def test_both_sides_take_steps(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    script = importlib.import_module("number_watch")
    from llava.train.number_watch import NumberWatch

    own, taken = NumberWatch.gradient, []
    monkeypatch.setattr(NumberWatch, "gradient", lambda watch, norm: (taken.append(1), own(watch, norm)))
    for name in script.WATCHED:  # what the benchmark changes is undone
        monkeypatch.setattr(NumberWatch, name, getattr(NumberWatch, name))
    output = tmp_path / "deep" / "watch.json"
    words = tiny.train_flags(tmp_path, "iitt", per_device_train_batch_size=2)
    words = ["--device", "cpu", "--pairs", "2", "--block", "1", "--output", str(output), "--", *words]
    assert script.main(words) == 0
    report = json.loads(output.read_text())
    assert len(taken) == 3  # of the seven steps
    assert {"with", "without", "cost", "inside"} == report["figures"].keys() and report["shapes"]["batch"] == [2, 1, 1]
    assert report["figures"]["with"]["ms"] > 0 and report["hardware"]["device"] == "cpu"
