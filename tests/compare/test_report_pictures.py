"""The pictures of a comparison: names do not cover each other, the front is a staircase, odd names are drawn."""

import io
import itertools

import pytest
from PIL import Image

from llava.compare import report_pictures
from llava.compare.report_content import frontiers
from llava.drawing.page import BLUE, ORANGE
from tests.compare.fake_comparison import TOWERS, comparison


def extents(points: dict[str, tuple[float, float]]):
    """(boxes of the names, box of the axes) after `write_names`."""
    picture = report_pictures.figure(6, 4)
    axes = picture.subplots()
    axes.scatter(*zip(*points.values(), strict=True))
    axes.margins(0.2)
    picture.canvas.draw()
    picture.set_layout_engine("none")
    report_pictures.write_names(axes, points)
    return [text.get_window_extent() for text in axes.texts], axes.get_window_extent()


@pytest.mark.parametrize(
    "points",
    [
        {f"tower_{i}": (49, 90 + i / 5) for i in range(12)},
        {f"tower_{i}": (20 + i / 3, 90) for i in range(7)},
        {f"tower_{i}": (1, 1) for i in range(12)},
        {f"tower_{i}_large": (i % 4, i // 4) for i in range(12)},
    ],
)
def test_names_do_not_cover_each_other(points):
    boxes, edges = extents(points)
    assert len(boxes) == len(points)
    for one, other in itertools.combinations(boxes, 2):
        assert min(one.x1, other.x1) - max(one.x0, other.x0) < 1 or min(one.y1, other.y1) - max(one.y0, other.y0) < 1
    for box in boxes:
        assert box.x0 >= edges.x0 - 1 and box.x1 <= edges.x1 + 1 and box.y0 >= edges.y0 - 1 and box.y1 <= edges.y1 + 1


def test_the_staircase_goes_right_then_up():
    points = {"a": (1, 5), "b": (3, 9), "c": (2, 4), "d": (7, 9), "e": (8, 10)}
    assert report_pictures.staircase(points) == [(1, 5), (3, 5), (3, 9), (8, 9), (8, 10)]
    assert report_pictures.staircase({}) == []


def colours(content: bytes) -> tuple[tuple[int, int], set]:
    with Image.open(io.BytesIO(content)) as picture:
        return picture.size, {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}


def test_front_and_others_have_their_colours(tmp_path):
    results, _ = comparison(tmp_path, {name: TOWERS[name] for name in ("clip", "hevc_vit", "dinov2")}, pictures=20)
    size, found = colours(report_pictures.accuracy_vs_tokens(results))
    assert {ORANGE, BLUE} <= found and size[0] > 1000
    tall, _ = colours(report_pictures.by_kind(results))
    for tower in results["towers"]:
        tower["cost"].pop("ttft_ms")
        tower["scores"]["heldout"]["by_kind"] |= {str(i): {"mean": 0.1 * i, "n": 3} for i in range(9)}
    assert ORANGE in colours(report_pictures.accuracy_vs_tokens(results))[1]
    assert colours(report_pictures.by_kind(results))[0][1] > 2 * tall[1]


def test_odd_names_are_drawn(tmp_path, recwarn):
    names = ["$x_{", "$a$ \\frac", "塔", "x" * 200, "a\nb"]
    results, _ = comparison(tmp_path, {name: TOWERS["clip"] for name in names}, pictures=4)
    for tower in results["towers"]:
        found = tower["scores"]["heldout"]
        tower["scores"] = {names[0]: found, names[2]: found | {"by_kind": {names[1]: found["by_kind"]["left digit"]}}}
    for draw in (report_pictures.accuracy_vs_tokens, report_pictures.by_kind):
        assert BLUE in colours(draw(results))[1]
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_groups_take_the_place_of_their_evaluations(tmp_path):
    results, _ = comparison(tmp_path, pictures=4)
    results["groups"] = {name: {"General": 0.5, "OCR": 0.25} for name in TOWERS}
    assert [title for title, _, _ in frontiers(results)] == ["General", "OCR"]
