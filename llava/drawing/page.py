"""A page that pictures and words are put on: its colours, its typeface and its size."""

import functools

from PIL import Image, ImageDraw, ImageFont

WIDTH, MARGIN = 1360, 32  # pixels
PAPER, INK, FAINT, LINE = (255, 255, 255), (33, 37, 41), (120, 128, 136), (226, 230, 234)
GREEN, RED, BLUE, ORANGE = (24, 128, 64), (200, 40, 40), (32, 92, 184), (232, 119, 34)


@functools.cache
def font(size: int):
    """Pillow's own typeface, so that no font needs to be installed."""
    return ImageFont.load_default(size)


def shorten(text: str, face, width: float) -> str:
    """`text`, of which what does not fit into `width` pixels ends in an ellipsis."""
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def wrap(text: str, face, width: float, lines: int = 2) -> list[str]:
    """`text` broken at spaces into at most `lines` lines of `width` pixels, the last one shortened."""
    rows = [""]
    for word in text.split():
        longer = f"{rows[-1]} {word}".strip()
        if rows[-1] and len(rows) < lines and face.getlength(longer) > width:
            rows.append(word)
        else:
            rows[-1] = longer
    return [shorten(row, face, width) for row in rows]


def fit(size: tuple[int, int], room: tuple[float, float]) -> tuple[int, int]:
    """(width, height) scaled to fit into `room`; small ones grow."""
    scale = min(room[0] / size[0], room[1] / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def enlarged(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resized for the page: few pixels stay visible as squares."""
    growing = size[0] > 3 * image.width
    return image.resize(size, Image.Resampling.NEAREST if growing else Image.Resampling.LANCZOS)


class Page:
    """A page that grows downwards: `top` is where the next part begins."""

    def __init__(self):
        self.image = Image.new("RGB", (WIDTH, 4000), PAPER)
        self.pen = ImageDraw.Draw(self.image)
        self.top = MARGIN

    def text(self, left: float, top: float, words: str, size: int = 15, fill=INK, anchor: str = "la", width=None):
        """A line of text; what does not fit into `width` pixels ends in an ellipsis."""
        words = words if width is None else shorten(words, font(size), width)
        self.pen.text((left, top), words, font=font(size), fill=fill, anchor=anchor)

    def frame(self, left: int, top: int, size: tuple[int, int], colour=LINE, width: int = 1):
        """An outline around a picture of `size`, outside it."""
        right, bottom = left + size[0] + width - 1, top + size[1] + width - 1
        self.pen.rectangle((left - width, top - width, right, bottom), outline=colour, width=width)

    def finished(self) -> Image.Image:
        return self.image.crop((0, 0, WIDTH, self.top + MARGIN))
