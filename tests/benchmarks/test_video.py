"""The benchmark of reading clips, with a small one; nothing here hangs on a time."""

import importlib
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def test_both_sides_read_the_clip(tmp_path, monkeypatch, capsys):
    pytest.importorskip("av", reason="PyAV (the video extra) is not installed")
    monkeypatch.syspath_prepend(str(FOLDER))
    script = importlib.import_module("video")
    output = tmp_path / "deep" / "video.json"
    flags = ["--codecs", "h264", "hevc", "--seconds", "1", "--resolution", "160", "128", "--frames", "8"]
    assert script.main([*flags, "--repeats", "2", "--size", "64", "64", "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert [row["source"] for row in report["figures"]] == ["exported", "matched"]
    for row in report["figures"]:
        assert row["frames"] == 30 and row["size"] == [64, 64] and row["patches"] == [16, 128]
        assert len(row["ratio"]["all"]) == 2 and all(
            row[name]["median"] > 0 for name in ("decode_s", "read_s", "ratio")
        )
    assert "h264.mp4: decoding 30 frames" in capsys.readouterr().out
