"""`playground/demo_patch_selection.py`: its table is that of the selections, its drawing shows them."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llava.model.adaptive_patches import patch_entropy, select_patches_by_budget, select_patches_by_threshold

PATH = Path(__file__).resolve().parents[2] / "playground" / "demo_patch_selection.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo_patch_selection", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(demo, monkeypatch, capsys, *flags) -> dict[str, list[int]]:
    """selection -> patches of each size, and tokens."""
    monkeypatch.setattr(sys, "argv", ["demo_patch_selection.py", *map(str, flags)])
    demo.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"drawn in {flags[-1] if '--output' in flags else 'patch_selection.png'}"
    rows = [line[:20].strip() for line in lines[2:-1]]
    return dict(zip(rows, [[int(word) for word in line[20:].split()[:4]] for line in lines[2:-1]], strict=True))


def test_the_drawn_picture(demo, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = run(demo, monkeypatch, capsys)
    assert list(found) == ["all", "v1", "v2, 1.0", "v2, 0.7", "budget, 0.5", "budget, 0.3"]
    pixels = torch.from_numpy(np.array(demo.draw_picture())).permute(2, 0, 1)[None]
    maps = patch_entropy(pixels, 14)
    expected = {"v1": select_patches_by_threshold(maps, [3.0, 2.0]), "budget, 0.3": select_patches_by_budget(maps, 0.3)}
    for name, (masks, _) in expected.items():
        counts = [int(masks[size].sum()) for size in (14, 28, 56)]
        assert found[name] == [*counts, sum(counts)] and all(counts)
    assert found["all"] == [1024, 0, 0, 1024] and 305 <= found["budget, 0.3"][3] <= 307
    assert [path.name for path in tmp_path.iterdir()] == ["patch_selection.png"]
    sheet = Image.open("patch_selection.png")
    assert sheet.width == 3 * 448 and sheet.height > 2 * 448


def test_a_picture_of_ones_own(demo, monkeypatch, capsys, tmp_path):
    Image.new("RGB", (300, 200), (9, 9, 9)).save(tmp_path / "p.png")
    found = run(demo, monkeypatch, capsys, "--image", tmp_path / "p.png", "--output", tmp_path / "out.png")
    assert found["all"][3] == 22 * 14 and found["v1"][3] < 40 and (tmp_path / "out.png").is_file()
    for flags, words in [
        (["--image", tmp_path / "p.png", "--output", tmp_path / "p.png"], "is the picture itself"),
        (["--image", tmp_path / "q.png", "--output", tmp_path / "out.png"], "no such file"),
        (["--image", tmp_path / "p.png", "--output", tmp_path / "none" / "out.png"], "cannot be written"),
        (["--image", tmp_path / "p.png", "--output", tmp_path / "out.what"], "cannot be written"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            run(demo, monkeypatch, capsys, *flags)
        printed = capsys.readouterr().err
        assert stopped.value.code == 2 and words in printed and printed.count("\n") == 1
    assert Image.open(tmp_path / "p.png").size == (300, 200)
