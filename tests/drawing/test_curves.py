"""Loss curves: what is drawn where, odd ones, and that matplotlib's global state is left alone."""

import subprocess
import sys

import numpy as np
import pytest

from llava.drawing.curves import loss_panel, smooth
from llava.drawing.page import BLUE
from llava.errors import LlavaError


def test_smoothing():
    assert smooth([3.0] * 9) == [3.0] * 9
    assert smooth([0.0, 0.0, 5.0, 0.0, 0.0], share=0.2)[2] == pytest.approx(1.0)


def heights(panel) -> np.ndarray:
    """Mean row of the smoothed curve in every column that has it; the legend, in its colour too, is above the axes."""
    blue = (np.asarray(panel)[60:] == BLUE).all(-1)
    rows = np.arange(60, 60 + len(blue))[:, None]
    return ((blue * rows).sum(0) / blue.sum(0).clip(1))[blue.any(0)]


def test_the_axis_is_logarithmic():
    """Losses that halve every ten steps fall along a straight line."""
    steps = list(range(1, 101))
    panel = loss_panel("stage", steps, [2.0 ** (-step / 10) for step in steps], (640, 330))
    assert panel.size == (640, 330) and panel.mode == "RGB"
    found = heights(panel)
    straight = np.linspace(found[0], found[-1], len(found))
    assert found[-1] - found[0] > 150 and np.abs(found - straight).max() < 4


@pytest.mark.parametrize("losses", [[1.0], [0.0, 0.0], [2.0, 2.0, 2.0], [3.0, 0.0, 3.0]])
def test_odd_curves_are_drawn(losses):
    panel = loss_panel("stage", list(range(1, len(losses) + 1)), losses, (500, 330))
    assert len(heights(panel)) > 0 or not any(losses)
    assert panel.getcolors(1 << 24) != [(500 * 330, (255, 255, 255))]


def test_without_matplotlib_one_line_says_what_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(LlavaError, match="pip install matplotlib"):
        loss_panel("stage", [1], [1.0], (500, 330))


def test_no_import_of_matplotlib_before_a_curve_and_none_of_pyplot():
    code = (
        "import sys\nfrom llava.eval import report\nfrom llava.drawing.curves import loss_panel\n"
        "assert 'matplotlib' not in sys.modules\nloss_panel('a', [1, 2], [1.0, 2.0], (300, 200))\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
