"""Panels: a picture with the grid of its patches, and a heat map, each with a legend below. Pillow and numpy alone."""

import numpy as np
from PIL import Image, ImageDraw

from llava.drawing.page import font

# Levels 1, 2, 3, ...: told apart by lightness as well as by hue. The first shows on light and on dark pictures by
# itself; patches with room for it have a dark line beside theirs.
COLOURS = ((255, 40, 160), (255, 222, 60), (60, 190, 255), (255, 130, 40), (150, 255, 120))
ROOM = 24  # drawn side in pixels from which a patch has lines of its own at all four edges, with the dark one
SEAM = 0.35  # what is left of the picture's brightness in the dark line
LONG_SIDE = 1200  # smaller pictures are enlarged by a whole number to about this many pixels
BACKGROUND, TEXT = (24, 24, 28), (235, 235, 235)
# importance from low to high: dark violet over red to light yellow, growing in lightness
HEAT = ((8, 8, 40), (66, 20, 110), (140, 40, 110), (205, 70, 75), (245, 125, 30), (250, 195, 60), (252, 250, 200))
OUTSIDE_GREY = 128


def zoom_of(width: int, height: int) -> int:
    """How many pixels a side a pixel of the picture is drawn with."""
    return min(max(round(LONG_SIDE / max(width, height)), 1), 12)


def patch_panel(picture: Image.Image, labels, counts: dict[int, int], zoom: int, title: str):
    """The picture with an outline around each kept patch, in the colour of its level, over a legend with counts.

    Args:
        picture: RGB, the base patch times the grid.
        labels: uint8 array [H1, W1], levels from 1.
        counts: {patch size in pixels of the picture: patches}, the base patch first.
        zoom: from `zoom_of`.
        title: first words of the legend.
    """
    side = min(counts) * zoom
    pixels = np.asarray(_enlarged(picture, zoom)).astype(np.float32)
    levels = labels.repeat(side, 0).repeat(side, 1)
    across, down = np.arange(levels.shape[1])[None], np.arange(levels.shape[0])[:, None]
    width = min(max(round(side / 28), 1), 4)
    entries = [(None, title)]
    for level, (size, count) in enumerate(sorted(counts.items()), start=1):
        colour, inside = COLOURS[(level - 1) % len(COLOURS)], levels == level
        # how far a pixel is from the nearest edge of its patch, the edge pixels themselves being 0
        depth = np.minimum(_depth(across, size * zoom), _depth(down, size * zoom))
        if size * zoom >= ROOM:
            pixels[inside & (depth == width)] *= SEAM
        pixels[inside & (depth < width)] = colour
        entries.append((colour, f"{size} px: {count:,}"))
    return _with_legend(Image.fromarray(pixels.astype(np.uint8)), entries)


def heat_panel(values, size: int, highest: float, zoom: int, width: int, height: int, title: str):
    """A map of importances as colours, over a legend with its scale from 0.

    Args:
        values: float array [h, w], NaN (drawn grey) where there is none.
        size: patch size of the map in pixels of the picture.
        highest: importance of the last colour.
        zoom: from `zoom_of`.
        width, height: of the picture.
        title: what the map shows.
    """
    known = np.nan_to_num(values / highest if highest else values * 0, nan=0).clip(0, 1)
    colours = _heat(known)
    colours[np.isnan(values)] = OUTSIDE_GREY
    blocks = colours.repeat(size * zoom, 0).repeat(size * zoom, 1)[: height * zoom, : width * zoom]
    return _with_legend(Image.fromarray(blocks), [(None, title), ("scale", f"{highest:.3g}")])


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    gap = max(left.width // 80, 4)
    canvas = Image.new("RGB", (left.width + gap + right.width, max(left.height, right.height)), BACKGROUND)
    canvas.paste(left, (0, 0))
    canvas.paste(right, (left.width + gap, 0))
    return canvas


def _enlarged(picture, zoom: int):
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.BICUBIC)


def _depth(places, size: int):
    inside = places % size
    return np.minimum(inside, size - 1 - inside) if size >= ROOM else inside


def _heat(share):
    """Numbers of 0..1 -> uint8 RGB."""
    anchors = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(share, anchors, channel) for channel in zip(*HEAT, strict=True)], -1).astype(np.uint8)


def _with_legend(picture: Image.Image, entries) -> Image.Image:
    """`picture` over lines of entries (colour of a swatch, "scale" for the heat scale or None; text)."""
    size = min(max(picture.width // 45, 12), 28)
    face = font(size)
    pad, swatch = size // 2, size
    measured = []
    for mark, text in entries:
        mark_width = {None: 0, "scale": 6 * size}.get(mark, swatch)
        zero = face.getlength("0 ") if mark == "scale" else 0
        measured.append((mark, text, mark_width, zero, zero + mark_width + (pad if mark else 0) + face.getlength(text)))
    lines, x = [[]], pad
    for entry in measured:
        if lines[-1] and x + entry[-1] + pad > picture.width:
            lines.append([])
            x = pad
        lines[-1].append((x, entry))
        x += entry[-1] + 2 * size
    line_height = round(1.5 * size)
    canvas = Image.new("RGB", (picture.width, picture.height + line_height * len(lines) + pad), BACKGROUND)
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        middle = picture.height + pad // 2 + round((number + 0.5) * line_height)
        for x, (mark, text, mark_width, zero, _) in line:
            if mark == "scale":
                draw.text((x, middle), "0", TEXT, face, anchor="lm")
                bar = _heat(np.linspace(0, 1, mark_width))[None].repeat(swatch, 0)
                canvas.paste(Image.fromarray(bar), (round(x + zero), middle - swatch // 2))
            elif mark:
                box = (x, middle - swatch // 2, x + swatch - 1, middle - swatch // 2 + swatch - 1)
                draw.rectangle(box, outline=mark, width=max(size // 6, 2))
            draw.text((x + zero + mark_width + (pad if mark else 0), middle), text, TEXT, face, anchor="lm")
    return canvas
