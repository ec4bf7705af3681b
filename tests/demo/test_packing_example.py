"""The example prints the walk that the tower's docstring describes."""

import re
from pathlib import Path

import pytest

from tests.support.forks import SCRIPT

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["packing_tower_example", "example_packing_tower_usage"])  # the published name
def test_walk(forks, tmp_path, name):
    assert forks.run([ROOT / "playground" / f"{name}.py"], tmp_path / "log", program=SCRIPT) == 0
    batch, mixed = (tmp_path / "log").read_text().split("-- a list")
    lines = [re.split(r"\s{2,}", line, maxsplit=1) for line in batch.splitlines() if re.match(r"[a-z].*\[", line)]
    assert lines == [
        ["images", "[4, 3, 224, 224]"],
        ["hidden_states", "[784, 768]"],
        ["grid_thw", str([[1, 14, 14]] * 4)],
        ["encoder output", "[784, 64]"],
        ["features", "[4, 196, 64]"],
    ]
    assert "equal to tower(images)  True" in batch
    assert "[[196, 64], [40, 64], [144, 64]]" in mixed and "[(14, 14), (4, 10), (8, 6)]" in mixed
    assert float(mixed.rsplit(None, 1)[1]) < 1e-5
