"""The benchmark of checkpoints, in a tiny shape; nothing here hangs on a time."""

import importlib
import json
from pathlib import Path


def test_every_part_is_measured(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    script = importlib.import_module("checkpoints")
    output = tmp_path / "deep" / "checkpoints.json"
    words = ["--megabytes", "1", "--files", "2", "--repeats", "2", "--folder", str(tmp_path), "--output", str(output)]
    assert script.main(words) == 0
    report = json.loads(output.read_text())
    assert report["shapes"] == {"megabytes": 1, "files": 2, "repeats": 2}
    figures = report["figures"]["seconds_per_gigabyte"]
    assert figures.keys() == {"written alone", "flushed and hashed", "full", "sizes"}
    assert all(value > 0 for name, value in figures.items() if name != "sizes")
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
