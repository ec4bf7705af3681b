"""The tracer: what it lists of a real run, and what its rule leaves out."""

import importlib
import json
import subprocess
import sys
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tracer(monkeypatch, tmp_path):
    """The module, with this file and one that is not imported yet as the project's code."""
    (tmp_path / "imported_late.py").write_text("def at_import():\n    pass\n\n\nat_import()\n")
    for folder in (tmp_path, ROOT / "benchmarks"):
        monkeypatch.syspath_prepend(str(folder))
    module = importlib.import_module("trace_record")
    monkeypatch.setattr(module, "PACKAGES", (__file__, str(tmp_path)))
    yield module
    sys.modules.pop("imported_late", None)


def test_a_padded_image_from_record_to_loss(tmp_path):
    done = subprocess.run(
        [sys.executable, "benchmarks/trace_record.py", "--json", tmp_path / "trace.json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "trace.json").read_text())
    functions, files = found["functions"], found["files"]
    lines = done.stdout.splitlines()
    assert lines[-1] == f"total: {len(functions)} functions in {len(files)} files"
    assert lines[:-1] == [f"{each['file']}:{each['line']}  {each['name']}" for each in functions]
    assert files == sorted({each["file"] for each in functions}) and len(set(lines)) == len(lines) > 30
    names = [each["name"].rpartition(".")[2] for each in functions]
    assert names[0] == "__getitem__" and names.index("expand2square") < names.index("encode_images")
    assert names.index("compute_loss") < names.index("encode_images") < names.index("supervised_loss")
    assert names[-2:] == ["output_logits", "_behind_output"] and functions[-1]["file"] == "llava/model/loss.py"
    for each in functions:
        line = (ROOT / each["file"]).read_text().splitlines()[each["line"] - 1].strip()
        assert line.startswith(("def ", "@")), each
        assert "property" not in line and "<lambda>" not in each["name"] and "comp>" not in each["name"]


class Parts:
    def __init__(self):
        self.calls = 0

    def __getitem__(self, index):
        return [helper(part) for part in (self.whole, self.half)] + sorted([2, 1], key=lambda value: -value)

    @property
    def whole(self):
        return 1

    @cached_property
    def half(self):
        return helper(2)

    def compute_loss(self):
        import imported_late

        return self.compute(imported_late)

    def compute(self, kind):
        class Local:
            value = kind

        return Local


def helper(value):
    return value


def after():
    return helper(0)


def test_what_the_rule_counts(tracer):
    parts, watch = Parts(), tracer.Tracer()
    sys.setprofile(watch)
    try:
        after()  # before the first sample
        watch.dataset = parts
        Parts()[0]  # of another data set
        first = len(watch.seen)
        parts[0]
        parts.compute_loss()
        after()
    finally:
        sys.setprofile(None)
    assert first == 0
    assert [code.co_name for code in watch.seen] == ["__getitem__", "helper", "compute_loss", "compute"]
