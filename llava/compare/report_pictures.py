"""The two pictures of a comparison, drawn by matplotlib without its global state: accuracy over cost, and by kind."""

import io
import itertools
import math
import warnings

from llava.compare import report_numbers as numbers
from llava.compare.report_content import blank_of, frontiers
from llava.compare.report_numbers import evaluations, finite, score, unit
from llava.drawing.curves import PALE_BLUE
from llava.drawing.page import BLUE, FAINT, INK, LINE, ORANGE
from llava.errors import LlavaError

DPI = 130
WIDTH = 9  # inches
ROWS, PANELS, ACROSS = 8, 40, 5  # evaluations in the one picture, kinds in the other, kinds beside each other
LONGEST = 32  # characters of a name

_BAR = [c / 255 for c in PALE_BLUE]  # intervals and quartiles
_INK, _FAINT, _LINE, _BLUE, _ORANGE = ([c / 255 for c in colour] for colour in (INK, FAINT, LINE, BLUE, ORANGE))


def figure(width: float, height: float):
    """Inches. Raises: LlavaError: matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise LlavaError("a comparison's report needs matplotlib; install it with: pip install matplotlib") from None
    found = Figure((width, height), DPI)
    found.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    FigureCanvasAgg(found)
    return found


def png(picture) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in a script the typeface lacks: boxes
        picture.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    return file.getvalue()


def without(words: str) -> bytes:
    """A picture that says why there is none."""
    picture = figure(WIDTH, 1.2)
    picture.text(0.5, 0.5, words, ha="center", va="center", color=_FAINT)
    return png(picture)


def short(name: str) -> str:
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"


def tidy(axes, grid: str) -> None:
    axes.tick_params(colors=_FAINT, labelsize=8, length=0)
    axes.grid(axis=grid, color=_LINE)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_LINE)


def accuracy_vs_tokens(results: dict) -> bytes:
    """A PNG: a row for each group or evaluation, its scores over visual tokens and over time to the first token."""
    found = frontiers(results)
    if not found:
        return without("no tower has both a score and a measured cost")
    sides = [("visual_tokens", "visual tokens per picture"), ("ttft_ms", "time to first token, ms")]
    sides = [(at, *side) for at, side in enumerate(sides) if any(points[at] for _, points, _ in found)]
    rows = min(len(found), ROWS)
    picture = figure(WIDTH, 3.9 * rows)
    grid = picture.subplots(rows, len(sides), squeeze=False)
    names = []
    for line, (title, points, shown) in zip(grid, found, strict=False):
        for axes, (at, key, words) in zip(line, sides, strict=True):
            scatter(axes, results, title, key, points[at], shown)
            axes.set_xlabel(words, color=_FAINT, fontsize=9)
            names.append((axes, points[at], shown))
        line[0].set_ylabel(shown.title(title), color=_INK, fontsize=10, parse_math=False)
    if len(found) > rows:
        picture.suptitle(f"the first {rows} of {len(found)} evaluations", color=_FAINT, fontsize=9)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        picture.canvas.draw()  # sizes are known from here on
        picture.set_layout_engine("none")
        for axes, side, shown in names:
            write_names(axes, {name: (x, y * shown.factor) for name, (x, y) in side.items()})
    return png(picture)


def scatter(axes, results: dict, title: str, key: str, points: dict, shown) -> None:
    """Points with intervals and quartiles where they are known, and the Pareto front as a staircase."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    tidy(axes, "both")
    if not points:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=_FAINT)
        return
    for tower in results["towers"]:
        if tower["name"] not in points:
            continue
        x, y = points[tower["name"]]
        row = score(tower, title)
        row = row if row.get("mean") == y else {}  # of a group no interval is known
        if finite(row.get("low")) and finite(row.get("high")):
            axes.plot([x, x], [row["low"] * shown.factor, row["high"] * shown.factor], color=_BAR, linewidth=1.6)
        quartiles = (tower.get("cost") or {}).get(key)
        if isinstance(quartiles, dict) and finite(quartiles.get("p25")) and finite(quartiles.get("p75")):
            axes.plot([quartiles["p25"], quartiles["p75"]], [y * shown.factor] * 2, color=_BAR, linewidth=1.6)
    names, corners = numbers.front(points), staircase(points)
    axes.plot([x for x, _ in corners], [y * shown.factor for _, y in corners], color=_ORANGE, linewidth=1.4, zorder=2)
    colours = [_ORANGE if name in names else _BLUE for name in points]
    axes.scatter([x for x, _ in points.values()], [y * shown.factor for _, y in points.values()], 30, colours, zorder=3)
    axes.set_title("orange: Pareto front", loc="right", color=_ORANGE, fontsize=8)
    low, high = min(x for x, _ in points.values()), max(x for x, _ in points.values())
    if low > 0 and high > 3 * low:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter("{x:g}")
    if low == high:
        axes.set_xlim(low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)
    else:
        axes.margins(x=0.22)
    axes.margins(y=0.2)


def staircase(points: dict[str, tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of the Pareto front: the best score that is to be had at a cost."""
    corners, names = [], numbers.front(points)
    for name in names:
        corners += [(points[name][0], corners[-1][1])] if corners else []
        corners.append(points[name])
    return corners


def write_names(axes, points: dict[str, tuple[float, float]]) -> None:
    """Each point's name near it, over no other name, no point, no edge and not over the front; with a line to its point
    where it is far from it."""
    from matplotlib.patheffects import withStroke

    places = {name: axes.transData.transform(point) for name, point in points.items()}
    halo = [withStroke(linewidth=2.5, foreground="white")]
    taken, written = [(x - 9, y - 9, x + 9, y + 9) for x, y in places.values()], []
    for (x, y), (to, up) in itertools.pairwise(axes.transData.transform(staircase(points) or [(0, 0)])):
        taken.append((min(x, to) - 2, min(y, up) - 2, max(x, to) + 2, max(y, up) + 2))
    box = axes.get_window_extent()
    edges = (box.x0, box.y0, box.x1, box.y1)
    for name in sorted(places, key=lambda name: tuple(places[name])):
        x, y = places[name]
        text = axes.annotate(
            short(name),
            points[name],
            (0, 0),
            textcoords="figure pixels",
            fontsize=8,
            color=_INK,
            parse_math=False,
            zorder=4,
        )
        text.set_path_effects(halo)
        size = text.get_window_extent()
        left, bottom, far = free_place((x, y), (size.width, size.height), taken + written, edges)
        written.append((left, bottom, left + size.width, bottom + size.height))
        text.set_position((left, bottom))
        if far:
            ends = axes.transData.inverted().transform([(x, y), nearest((x, y), written[-1])])
            axes.plot(*zip(*ends, strict=True), color=_FAINT, linewidth=0.6, zorder=2.5, scalex=False, scaley=False)


def nearest(point, box) -> tuple[float, float]:
    """The point of a box (left, bottom, right, top) next to another point."""
    return min(max(point[0], box[0]), box[2]), min(max(point[1], box[1]), box[3])


def free_place(point, size, taken, edges) -> tuple[float, float, bool]:
    """(left, bottom, whether far from the point) of a box of `size` near `point` that lies inside `edges`, and over
    none of the boxes `taken` (each left, bottom, right, top) as far as there is such a place. Pixels."""
    (x, y), (width, height), fallback = point, size, None
    for reach in (8, 14, 22, 32, 44, 58, 74, 92, 112, 134, 160, 190, 230, 280):
        for turn in range(16):
            angle = turn * math.pi / 8
            across, up = math.cos(angle), math.sin(angle)
            left = x + reach * across - width * (1 - across) / 2
            bottom = y + reach * up - height * (1 - up) / 2
            box = (left, bottom, left + width, bottom + height)
            if box[0] < edges[0] or box[1] < edges[1] or box[2] > edges[2] or box[3] > edges[3]:
                continue
            fallback = fallback or (left, bottom, reach > 14)
            if not any(overlap(box, other) for other in taken):
                return left, bottom, reach > 14
    return fallback or (x + 8, y, False)


def overlap(one, other) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def panels(results: dict) -> list[tuple[str, str | None]]:
    """(evaluation, kind; None: all of them) of each panel."""
    found = []
    for name in evaluations(results):
        found += [(name, kind) for kind in numbers.kinds(results, name)] or [(name, None)]
    return found


def by_kind(results: dict) -> bytes:
    """A PNG: a panel for each kind of question, in it a row for each tower with its score, what it has with blank
    pictures, and chance."""
    found = panels(results)
    if not found:
        return without("no tower has a score")
    towers = [tower for tower in results["towers"] if tower.get("scores")]
    drawn = found[:PANELS]
    across = min(len(drawn), ACROSS)
    down = math.ceil(len(drawn) / across)
    picture = figure(WIDTH, down * (0.8 + 0.24 * max(len(towers), 2)) + 0.3)
    grid = picture.subplots(down, across, squeeze=False, sharey=True)
    marks, flat = set(), grid.ravel()
    for axes, (name, kind) in zip(flat, drawn, strict=False):
        marks |= kind_panel(axes, results, towers, name, kind)
    for axes in flat[len(drawn) :]:
        axes.set_axis_off()
    legend(picture, marks, f"the first {len(drawn)} of {len(found)} kinds" if len(found) > len(drawn) else "")
    return png(picture)


def kind_panel(axes, results: dict, towers: list[dict], evaluation: str, kind: str | None) -> set[str]:
    """Draws one panel; returns which of "blank" and "chance" are in it."""
    shown, marks, known = unit(results, evaluation), set(), []
    tidy(axes, "x")
    for place, tower in enumerate(towers):
        row = score(tower, evaluation)
        mean = ((row.get("by_kind") or {}).get(kind) or {}).get("mean") if kind else row.get("mean")
        blank = blank_of(row, kind) if kind else row.get("blank") or {}
        for value, mark in ((blank.get("chance"), "chance"), (blank.get("mean"), "blank"), (mean, "score")):
            if not finite(value):
                continue
            known.append(value * shown.factor)
            if mark == "score":
                axes.plot(known[-1], place, "o", color=_BLUE, markersize=5, zorder=3)
                axes.annotate(shown.show(value), (known[-1], place), (5, 0), textcoords="offset points", fontsize=7,
                              va="center", color=_INK)  # fmt: skip
            else:
                look = {"marker": "o", "markerfacecolor": "white"} if mark == "blank" else {"marker": "|"}
                axes.plot(known[-1], place, color=_FAINT, markersize=5 if mark == "blank" else 9, zorder=2, **look)
                marks.add(mark)
    if shown.sign == "%":  # one scale for all kinds
        axes.set_xlim(-8, 145)
        axes.set_xticks((0, 50, 100))
    else:
        low, high = min(known, default=0), max(known, default=1)
        room = (high - low) or abs(high) or 1
        axes.set_xlim(low - 0.1 * room, high + 0.45 * room)
        axes.locator_params(axis="x", nbins=4)
    axes.set_yticks(range(len(towers)), [short(tower["name"]) for tower in towers])
    axes.set_ylim(len(towers) - 0.5, -0.5)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
        label.set_color(_INK)
    several = len(evaluations(results)) > 1
    words = f"{evaluation}: {kind}" if kind and several else kind or evaluation
    axes.set_title(words, loc="left", fontsize=9, color=_INK, parse_math=False)
    axes.set_xlabel(shown.sign, color=_FAINT, fontsize=8)
    return marks


def legend(picture, marks: set[str], words: str) -> None:
    lines = [words] if words else []
    lines += ["filled: with pictures, hollow: with blank pictures"] if "blank" in marks else []
    lines += ["stroke: chance"] if "chance" in marks else []
    if lines:
        picture.suptitle("; ".join(lines), color=_FAINT, fontsize=9, x=0.01, ha="left")
