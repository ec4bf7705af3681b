"""The benchmark of lengths, with few records; nothing here hangs on a time."""

import importlib
import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def test_all_ways_find_the_same(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    script = importlib.import_module("lengths")
    output = tmp_path / "deep" / "lengths.json"
    assert script.main(["--records", "2100", "--processes", "1", "2", "--output", str(output)]) == 0
    figures = json.loads(output.read_text())["figures"]
    found = [figures[f"{count} processes"][name] for count in (1, 2) for name in ("first", "kept")]
    assert len({row["tokens"] for row in found}) == 1 and found[0]["tokens"] > 2100 * 577
    assert all(row.keys() >= {"records_per_s", "cpu_seconds"} for row in found)
