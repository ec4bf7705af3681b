"""Bars beside bars, drawn with Pillow alone."""

from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw

from llava.drawing.page import INK, LINE, PAPER, font

COLOURS = ((190, 198, 208), (46, 110, 178), (232, 132, 52), (70, 150, 90))
WIDTH, HEIGHT, MARGIN, GAP = 760, 300, 56, 24  # of a panel; around it on the left; between panels


@dataclass
class Panel:
    """One set of axes: `series` {name: [a value for each label, or None]}; a dashed line at `line`."""

    title: str
    labels: list[str]
    series: dict[str, list[float | None]]
    line: float | None = None
    digits: int = 2
    colours: tuple = field(default=COLOURS)


def draw(panels: list[Panel], title: str, path: Path, columns: int = 1) -> None:
    """Write the panels as one PNG, `columns` of them in a row."""
    rows = -(-len(panels) // columns)
    top = 44
    size = columns * WIDTH + (columns + 1) * GAP, top + rows * (HEIGHT + GAP)
    image = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(image)
    pen.text((GAP, 12), title, fill=INK, font=font(16))
    for i, panel in enumerate(panels):
        _panel(pen, panel, GAP + i % columns * (WIDTH + GAP), top + i // columns * (HEIGHT + GAP))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def _panel(pen, panel: Panel, left: int, top: int) -> None:
    small = font(10)
    values = [value for series in panel.series.values() for value in series if value is not None]
    most = max([*values, panel.line or 0]) * 1.12 or 1.0
    begin, end, ceiling, floor = left + MARGIN, left + WIDTH, top + 46, top + HEIGHT - 24
    pen.text((left, top), panel.title, fill=INK, font=font(13))
    at = begin
    for name, colour in zip(panel.series, panel.colours, strict=False):
        pen.rectangle((at, top + 22, at + 10, top + 32), fill=colour)
        pen.text((at + 15, top + 20), name, fill=INK, font=small)
        at += 34 + round(pen.textlength(name, font=small))

    def height(value):
        return floor - value / most * (floor - ceiling)

    for value in _ticks(most):
        pen.line((begin, height(value), end, height(value)), fill=LINE)
        pen.text((begin - 6, height(value)), f"{value:g}", fill=INK, font=small, anchor="rm")
    if panel.line is not None:
        for x in range(round(begin), round(end), 8):
            pen.line((x, height(panel.line), x + 4, height(panel.line)), fill=INK)
    place = (end - begin) / max(len(panel.labels), 1)
    bar = place * 0.84 / max(len(panel.series), 1)
    for i, label in enumerate(panel.labels):
        x = begin + (i + 0.08) * place
        for series, colour in zip(panel.series.values(), panel.colours, strict=False):
            if series[i] is not None:
                pen.rectangle((x + 1, height(series[i]), x + bar - 1, floor), fill=colour)
                text = f"{series[i]:.{panel.digits}f}"
                at = x + bar / 2, height(series[i]) - 2
                pen.text(at, text, fill=INK, font=small, anchor="mb", stroke_width=2, stroke_fill=PAPER)
            x += bar
        pen.text((begin + (i + 0.5) * place, floor + 4), label, fill=INK, font=small, anchor="ma")
    pen.line((begin, floor, end, floor), fill=INK)


def _ticks(most: float) -> list[float]:
    """Up to six round values from 0."""
    step = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1e9) if most / s <= 6)
    return [i * step for i in range(int(most / step) + 1)]
