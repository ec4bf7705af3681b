"""The walk as one picture, drawn with Pillow: photo, candidates, what the tower sees, and its visual tokens."""

import os

import torch
from PIL import Image

from llava.drawing.page import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    LINE,
    MARGIN,
    ORANGE,
    PAPER,
    WIDTH,
    Page,
    enlarged,
    fit,
    font,
)
from llava.drawing.panels import patch_panel
from llava.errors import LlavaError
from llava.tools.walk.steps import Walk
from llava.tools.walk.text import cuts_middle, kept_sizes, merges_map, rc, wh

GAP = 32  # pixels
PANEL_HEIGHT, TOKENS_HEIGHT, SKETCH = 380, 460, (136, 112)
SHOWN = 8  # candidates
WASTE = (214, 219, 224)


def draw(photo: Image.Image, name: str, walk: Walk, geometry, prompt, output: str) -> None:
    """Draw the walk of `photo` into the file `output`.

    Raises:
        LlavaError: the file cannot be written, or its ending names no picture.
    """
    page = Page()
    heading(page, name, walk, geometry)
    if walk.candidates:
        draw_candidates(page, photo, walk)
    draw_pixels(page, photo, walk, geometry)
    draw_tokens(page, walk, geometry)
    draw_total(page, walk, prompt, len(geometry.marks))
    try:
        page.finished().save(output)
    except (OSError, ValueError, KeyError) as error:
        raise LlavaError(f"--output {output}: cannot be written ({error})") from None


def heading(page: Page, name: str, walk: Walk, geometry) -> None:
    title = f"{os.path.basename(name)}: {wh(walk.size)} pixels become {walk.total:,} visual tokens"
    page.text(MARGIN, page.top, title, 26, width=WIDTH - 2 * MARGIN)
    below = f"{geometry.handling}; {geometry.layout}; {geometry.source}"
    page.text(MARGIN, page.top + 40, below, 15, FAINT, width=WIDTH - 2 * MARGIN)
    page.top += 84


def section(page: Page, title: str, note: str = "") -> None:
    page.pen.line((MARGIN, page.top, WIDTH - MARGIN, page.top), fill=LINE)
    page.text(MARGIN, page.top + 12, title, 18)
    if note:
        page.text(MARGIN + page.pen.textlength(title, font=font(18)) + 14, page.top + 15, note, 14, FAINT)
    page.top += 50


def draw_candidates(page: Page, photo: Image.Image, walk: Walk) -> None:
    """Sketches of the best resolutions with the photo in them, all at one scale; the chosen one in green."""
    more = len(walk.candidates) - SHOWN
    note = "kept: pixels of the photo, as a share; wasted: the canvas without them; the one that keeps most wins"
    section(page, "Candidates", note + (f"; {more} more are not shown" if more > 0 else ""))
    shown = walk.candidates[:SHOWN]
    scale = min(min(SKETCH[0] / each.width, SKETCH[1] / each.height) for each in shown)
    step = (WIDTH - 2 * MARGIN) // max(len(shown), 5)
    for index, each in enumerate(shown):
        centre = MARGIN + step * index + step // 2
        width, height = max(4, round(each.width * scale)), max(4, round(each.height * scale))
        left, top = centre - width // 2, page.top + (SKETCH[1] - height) // 2
        chosen = each[:2] == walk.best
        page.pen.rectangle((left, top, left + width - 1, top + height - 1), fill=WASTE)
        inner = fit(photo.size, (width, height))
        place = left + (width - inner[0]) // 2, top + (height - inner[1]) // 2
        page.image.paste(enlarged(photo, inner), place)
        page.frame(left, top, (width, height), GREEN if chosen else FAINT, 4 if chosen else 1)
        below = page.top + SKETCH[1] + 14
        page.text(centre, below, wh(each[:2]), 16, GREEN if chosen else INK, "ma")
        kept = each.effective / (walk.size[0] * walk.size[1])
        lost = each.wasted / (each.width * each.height)
        page.text(centre, below + 22, f"{kept:.1%} kept", 13, FAINT, "ma")
        page.text(centre, below + 39, f"{lost:.1%} wasted", 13, FAINT, "ma")
    page.top += SKETCH[1] + 92


def to_image(pixels: torch.Tensor, processor) -> Image.Image:
    """[3, H, W] as the tower gets it -> the picture that it shows."""
    mean, std = (torch.tensor(list(getattr(processor, f"image_{name}")))[:, None, None] for name in ("mean", "std"))
    values = ((pixels.float() * std + mean).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def seen_canvas(walk: Walk, processor) -> Image.Image:
    """The crops put back together, or the only view."""
    if walk.pixels.shape[0] == 1:
        return to_image(walk.pixels[0], processor)
    down, across = walk.crops
    joined = walk.pixels[1:].unflatten(0, (down, across)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return to_image(joined, processor)


def draw_pixels(page: Page, photo: Image.Image, walk: Walk, geometry) -> None:
    """The photo, the canvas with its crops, and the base view."""
    height, width = walk.pixels.shape[-2:]
    section(page, "Pixels", walk.made)
    canvas = seen_canvas(walk, geometry.processor)
    views = [(photo, "photo", wh(walk.size))]
    if walk.best is not None:
        views.append((canvas, "resized, padded, cut", f"{wh(walk.resized)} on {wh(walk.best)}, {rc(walk.crops)} crops"))
        base = to_image(walk.pixels[0], geometry.processor)
        views.append((base, "base view, goes first", f"squeezed to {wh((width, height))}"))
    elif geometry.rules.native:
        views.append((canvas, "resized", f"{wh((width, height))}, multiples of {geometry.native.multiple}"))
    elif walk.canvas is not None:
        views.append((canvas, "squared, resized", f"{wh(walk.canvas)}, then {wh((width, height))}"))
    else:
        how = "middle cut out" if cuts_middle(geometry.processor) else "squeezed"
        views.append((canvas, f"resized, {how}", wh((width, height))))
    room = (WIDTH - 2 * MARGIN - GAP * 2) // 3, PANEL_HEIGHT
    for index, (image, title, note) in enumerate(views):
        left = MARGIN + index * (room[0] + GAP)
        size = fit(image.size, room)
        place = left + (room[0] - size[0]) // 2, page.top + (room[1] - size[1]) // 2
        page.image.paste(enlarged(image, size), place)
        page.frame(*place, size)
        if index == 1 and walk.best is not None:
            crop_lines(page, place, size, walk.crops)
        if index == 0 and walk.canvas is None and cuts_middle(geometry.processor):
            side = min(size)
            page.frame(place[0] + (size[0] - side) // 2, place[1] + (size[1] - side) // 2, (side, side), BLUE, 3)
        centre = left + room[0] // 2
        page.text(centre, page.top + room[1] + 12, title, 16, anchor="ma")
        page.text(centre, page.top + room[1] + 34, note, 14, FAINT, "ma")
    page.top += PANEL_HEIGHT + 78


def crop_lines(page: Page, place, size, crops) -> None:
    """Borders of the crops over a drawn canvas."""
    (left, top), (width, height), (down, across) = place, size, crops
    for i in range(across + 1):
        x = left + round(width * i / across) - (i == across)
        page.pen.line((x, top, x, top + height - 1), fill=BLUE, width=3)
    for i in range(down + 1):
        y = top + round(height * i / down) - (i == down)
        page.pen.line((left, y, left + width - 1, y), fill=BLUE, width=3)


def draw_tokens(page: Page, walk: Walk, geometry) -> None:
    """Every visual token as a cell of the colour that it stands for; newline tokens in orange."""
    if walk.levels is not None:
        draw_patches(page, walk, geometry)
        return
    note = "a cell for each, in the colour of its place"
    section(page, "Visual tokens", note + ("; newline tokens in orange" if walk.newline_tokens else ""))
    if walk.crop_grid is None:
        text = f"{walk.total:,} tokens, a class token of every crop among them: they have no place in a grid"
        page.text(MARGIN, page.top, text)
        page.top += 50
        return
    has_map = walk.cells is not None and walk.map_tokens > 0
    left, room = MARGIN, (WIDTH - 2 * MARGIN, TOKENS_HEIGHT)
    base_room = ((WIDTH - 2 * MARGIN - GAP) // (2 if merges_map(geometry) else 3), TOKENS_HEIGHT)
    rest = left + base_room[0] + GAP, (WIDTH - 2 * MARGIN - GAP - base_room[0], TOKENS_HEIGHT)
    view = to_image(walk.pixels[0], geometry.processor)
    if merges_map(geometry):
        h, w = geometry.patches(walk.pixels)
        note = f"{h} x {w} of {geometry.patch} px = {h * w:,}, 2x2 of which make one token"
        mosaic(page, view.resize((w, h), Image.Resampling.BOX), left, base_room, "patches", note)
        left, room = rest
    if walk.base_tokens:
        h, w = walk.crop_grid
        title = "base tokens" if walk.map_tokens else "tokens"
        note = f"{h} x {w} = {walk.base_tokens:,}"
        extra = walk.newline_tokens if not walk.map_tokens else 0
        if extra:
            note += f", and {extra} newline"
        mosaic(page, view.resize((w, h), Image.Resampling.BOX), left, base_room, title, note, last=extra)
        left, room = rest
    if has_map or walk.map_tokens:
        down, across = walk.crops
        rows, columns = walk.full or (down * walk.crop_grid[0], across * walk.crop_grid[1])
        colours = seen_canvas(walk, geometry.processor).resize((columns, rows), Image.Resampling.BOX)
        if has_map:
            at = walk.cells.round().long()
            values = torch.frombuffer(bytearray(colours.tobytes()), dtype=torch.uint8).view(rows, columns, 3)
            colours = Image.fromarray(values[at[..., 0], at[..., 1]].numpy())
            note = f"{rc(walk.final)} = {walk.map_tokens:,}"
            if walk.final != walk.full:
                note += f", of {rc(walk.full)} before padding was cut off" + (
                    " and the map made smaller" if walk.final != walk.unpadded else ""
                )
            if walk.newline_tokens:
                note += f"; {walk.newline_tokens:,} newlines"
            mosaic(page, colours, left, room, "map of the crops" if walk.best else "map", note, walk.newline_tokens)
        else:
            note = f"{down * across} crops one after the other = {walk.map_tokens:,}"
            mosaic(page, colours, left, room, "crop tokens", note, crops=walk.crops)
    page.top += TOKENS_HEIGHT + 78


def draw_patches(page: Page, walk: Walk, geometry) -> None:
    """The view with an outline around each kept patch."""
    merged = f"; 2x2 of the smallest make one of the {walk.crop_tokens:,} visual tokens" if geometry.merges else ""
    note = "each is a token of the encoder; large ones where the picture holds little" + merged
    section(page, "Kept patches", note)
    view = to_image(walk.pixels[0], geometry.processor)
    counts = kept_sizes(walk, geometry)
    zoom = max(round(TOKENS_HEIGHT / view.height), 1)
    panel = patch_panel(view, walk.levels.numpy(), counts, zoom, f"{sum(counts.values()):,} patches")
    size = fit(panel.size, (WIDTH - 2 * MARGIN, TOKENS_HEIGHT + 40))
    page.image.paste(enlarged(panel, size), (MARGIN + (WIDTH - 2 * MARGIN - size[0]) // 2, page.top))
    page.top += size[1] + 38


def mosaic(page: Page, colours: Image.Image, left: int, room, title: str, note: str, newlines=0, crops=None, last=0):
    """Cells of the colours of an image's pixels, centred in `room` with a caption under it.

    newlines: of the rows, one cell behind each. last: newline cells behind the last row alone.
    """
    columns, rows = colours.width, colours.height
    extra = 1.6 if newlines or last else 0  # columns that the newlines and the gap before them take
    cell = min(room[0] / (columns + extra), room[1] / rows, 60)
    cell = int(cell) if cell >= 4 else cell
    size = max(1, round(columns * cell)), max(1, round(rows * cell))
    x = left + round((room[0] - size[0] - extra * cell) / 2)
    y = page.top + (room[1] - size[1]) // 2
    page.image.paste(colours.resize(size, Image.Resampling.NEAREST), (x, y))
    if cell >= 6:
        for i in range(columns + 1):
            page.pen.line((x + round(i * cell), y, x + round(i * cell), y + size[1]), fill=PAPER)
        for i in range(rows + 1):
            page.pen.line((x, y + round(i * cell), x + size[0], y + round(i * cell)), fill=PAPER)
    if crops is not None:
        crop_lines(page, (x, y), size, crops)
    for row in range(rows) if newlines else range(rows - last, rows):
        top, behind = y + round(row * cell), x + size[0] + round(0.6 * cell) + 1
        bottom = y + round((row + 1) * cell) - (2 if cell >= 4 else 1)
        page.pen.rectangle((behind, top, behind + max(3, round(cell) - 2), max(top, bottom)), fill=ORANGE)
    centre = left + room[0] // 2
    page.text(centre, page.top + room[1] + 12, title, 16, anchor="ma")
    page.text(centre, page.top + room[1] + 34, note, 14, FAINT, "ma", width=room[0])


def draw_total(page: Page, walk: Walk, prompt, marks: int) -> None:
    """The sum, as a bar in proportion and in words."""
    words = f"{walk.total:,} visual tokens" + (f" + {marks} marks" if marks else "")
    if prompt is not None:
        words += f" + {prompt.tokens:,} text tokens = a sequence of {walk.total + marks + prompt.tokens:,}"
        words += f", of {prompt.limit:,}"
    section(page, "Total", words)
    single = walk.pixels.shape[0] == 1
    parts = [
        (walk.base_tokens, "tokens" if single else "base", BLUE),
        (walk.map_tokens, "map" if walk.cells is not None else "crops", GREEN),
        (walk.newline_tokens, "newline", ORANGE),
        (marks, "marks", ORANGE),
        (prompt.tokens if prompt else 0, "text", FAINT),
    ]
    total, left, key = sum(count for count, _, _ in parts), float(MARGIN), MARGIN
    for count, name, colour in parts:
        if not count:
            continue
        right = left + (WIDTH - 2 * MARGIN) * count / total
        page.pen.rectangle((round(left), page.top, max(round(left), round(right) - 1), page.top + 26), fill=colour)
        left = right
        page.pen.rectangle((key, page.top + 42, key + 12, page.top + 54), fill=colour)
        label = f"{count:,} {name}"
        page.text(key + 20, page.top + 38, label)
        key += 20 + round(page.pen.textlength(label, font=font(15))) + 28
    page.top += 66
