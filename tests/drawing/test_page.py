"""The page: words that fit, pictures that fit, its height; and that the package is a leaf."""

import ast
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import llava.drawing
from llava.drawing.page import GREEN, MARGIN, PAPER, WIDTH, Page, enlarged, fit, font, shorten, wrap


def test_words_that_do_not_fit_end_in_an_ellipsis():
    face = font(15)
    assert shorten("left", face, 200) == "left"
    text = "one of the longer answers"
    short = shorten(text, face, 80)
    assert short == text[: len(short) - 3] + "..." and face.getlength(short) <= 80
    assert face.getlength(text[: len(short) - 2] + "...") > 80  # nor with a letter more


def test_text_is_broken_at_spaces_and_the_rest_is_shortened():
    face, text = font(13), "Which digit is at the far left of this picture, if there is one?"
    rows = wrap(text, face, 152)
    assert len(rows) == 2 and rows[1].endswith("...") and max(map(face.getlength, rows)) <= 152
    assert " ".join(wrap(text, face, 152, lines=9)) == text
    assert wrap("", face, 152) == [""]


@pytest.mark.parametrize(("size", "expected"), [((200, 100), (50, 25)), ((10, 20), (20, 40)), ((4000, 1), (50, 1))])
def test_pictures_fit_into_their_room(size, expected):
    assert fit(size, (50, 40)) == expected
    assert enlarged(Image.new("RGB", size), expected).size == expected


def test_few_pixels_stay_squares():
    picture = Image.fromarray(np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8))
    assert len(enlarged(picture, (8, 4)).getcolors()) == 2 < len(enlarged(picture, (6, 3)).getcolors())


def test_a_page_is_as_high_as_what_is_on_it():
    page = Page()
    page.frame(50, 60, (10, 20), GREEN, 3)
    page.top += 100
    image = page.finished()
    assert image.size == (WIDTH, 100 + 2 * MARGIN)
    green = (np.asarray(image) == GREEN).all(-1)
    assert green.sum() == 16 * 26 - 10 * 20 and not green[60:80, 50:60].any()
    assert image.getpixel((55, 70)) == PAPER


def test_the_package_imports_nothing_of_llava_but_its_errors():
    names = set()
    for file in Path(llava.drawing.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                names.add(node.module)
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
    inside = {name for name in names if name.split(".")[0] in ("llava", "llavavit")}
    assert "llava.drawing.page" in inside
    assert inside <= {"llava.errors", "llava.drawing.page", "llava.drawing.panels", "llava.drawing.curves"}
