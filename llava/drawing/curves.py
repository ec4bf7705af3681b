"""Loss curves, drawn by matplotlib without its global state."""

from PIL import Image

from llava.drawing.page import BLUE, FAINT, INK, LINE
from llava.errors import LlavaError

DPI = 100
PALE_BLUE = (164, 192, 236)
SMOOTHING = 0.02  # of a curve's points are averaged


def smooth(values: list[float], share: float = SMOOTHING) -> list[float]:
    """Centred moving average over `share` of the points (at least five where there are as many)."""
    reach = max(2, round(len(values) * share / 2))
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def loss_panel(title: str, steps: list[int], losses: list[float], size: tuple[int, int]) -> Image.Image:
    """The loss over steps, as logged (pale) and smoothed, on a logarithmic axis with numbers.

    Args:
        size: (width, height) in pixels.

    Raises:
        LlavaError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullLocator
    except ImportError:
        raise LlavaError("loss curves need matplotlib; install it with: pip install matplotlib") from None

    ink, faint, line, blue, pale = ([c / 255 for c in colour] for colour in (INK, FAINT, LINE, BLUE, PALE_BLUE))
    figure = Figure([side / DPI for side in size], DPI)
    figure.set_layout_engine("constrained", w_pad=0.12)  # inches
    axes, even = figure.add_subplot(), smooth(losses)
    axes.plot(steps, losses, color=pale, linewidth=0.8)
    axes.plot(steps, even, color=blue, linewidth=1.8, marker="o" if len(steps) == 1 else None)
    floor = min((value for value in (*losses, *even) if value > 0), default=1e-3)
    # limits before the scale, which else looks at the losses, and they may all be 0
    axes.set_ylim(floor / 1.15, max(*losses, floor * 2) * 1.1)
    axes.set_yscale("log")
    axes.margins(x=0)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.tick_params(colors=faint, labelsize=9, left=False)
    axes.grid(axis="y", color=line)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(faint)
    axes.set_xlabel("step", color=faint, fontsize=9)
    axes.set_title(title, loc="left", color=ink, fontsize=12)
    axes.set_title(f"loss: as logged, smoothed; last {even[-1]:.3f}", loc="right", color=blue, fontsize=9)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.frombytes("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")
