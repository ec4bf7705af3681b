"""The panels of patches and of importance: their lines, colours and sizes."""

import numpy as np
import pytest
from PIL import Image

from llava.drawing.panels import COLOURS, SEAM, heat_panel, patch_panel, zoom_of


def test_lines_enclose_the_patches_of_each_level():
    labels = np.full((4, 8), 3, dtype=np.uint8)
    labels[:, 4:6], labels[:, 6:] = 2, 1
    panel = patch_panel(Image.new("RGB", (112, 56), (200, 200, 200)), labels, {14: 8, 28: 2, 56: 1}, 4, "title")
    pixels = np.asarray(panel)[: 56 * 4]
    colours = {level: (pixels == COLOURS[level - 1]).all(-1) for level in (1, 2, 3)}
    for level, left, size in [(3, 0, 224), (2, 224, 112), (1, 336, 56)]:
        block = colours[level][:size, left : left + size]
        assert block[0].all() and block[-1].all() and block[:, 0].all() and block[:, -1].all()
        assert block.mean() < 0.3 and not block[size // 2, size // 2]
        for other in {1, 2, 3} - {level}:
            assert not colours[other][:size, left : left + size].any()
    assert (pixels == round(200 * SEAM)).all(-1).any()  # the dark line beside them
    assert (np.asarray(panel)[56 * 4 :].max() > 200).any()  # the legend


def test_lines_of_small_patches_are_one_pixel_wide():
    labels = np.ones((2, 2), dtype=np.uint8)
    panel = patch_panel(Image.new("RGB", (28, 28), (200, 200, 200)), labels, {14: 4}, 1, "")
    lines = (np.asarray(panel)[:28] == COLOURS[0]).all(-1)
    assert lines[[0, 14]].all() and lines[:, [0, 14]].all() and lines.sum() == 4 * 28 - 4


def test_the_heat_map_grows_lighter_and_leaves_out_what_has_no_importance():
    values = np.array([[0.0, 1.0, 2.0, 3.0, np.nan]])
    panel = heat_panel(values, 10, 3.0, 2, 50, 10, "title")
    middles = np.asarray(panel.convert("L"))[10, 10:100:20]
    assert (np.diff(middles[:4].astype(int)) > 20).all()
    assert np.asarray(panel)[10, 90].tolist() == [128, 128, 128]


@pytest.mark.parametrize(
    "size, zoom", [((28, 28), 12), ((224, 224), 5), ((616, 420), 2), ((1204, 812), 1), ((28, 4000), 1)]
)
def test_small_pictures_are_enlarged(size, zoom):
    assert zoom_of(*size) == zoom
