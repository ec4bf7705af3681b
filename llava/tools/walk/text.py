"""The walk in words: aligned lines of under 100 columns."""

import textwrap

from llava.tools.walk.steps import Walk

WIDTH, TITLE = 98, 13  # columns of a line, and of the step's name before it
SHOWN = 8  # candidates, unless all are asked for


def wh(size) -> str:
    """(width, height) in pixels."""
    return f"{size[0]:,} x {size[1]:,}"


def rc(size) -> str:
    """(rows, columns), or (down, across)."""
    return f"{size[0]} x {size[1]}"


def lines(name: str, walk: Walk, geometry, prompt=None, stock=None, every_candidate=False) -> list[str]:
    """The whole walk.

    Args:
        name: of the photo.
        prompt: a `Prompt` whose sequence is counted, or None.
        stock: `(class, tokens)` of transformers' processor, or None.
        every_candidate: list all of a large grid.
    """
    found = step("photo", f"{name}: {wh(walk.size)} pixels, width x height")
    found += step("handling", f"{geometry.handling}; {geometry.source}")
    found += step("tower", tower_text(walk, geometry))
    if walk.candidates:
        found += ["", *candidates(walk, every_candidate)]
    found.append("")
    for title, text in [*pixel_steps(walk, geometry), *token_steps(walk, geometry)]:
        found += step(title, text)
    found += step("total", f"{walk.total:,} visual tokens{sum_text(walk)}")
    if walk.among_others not in (None, walk.total):
        text = f"among several images of a sample it is squared and has one crop: {walk.among_others:,} tokens"
        found += step("", text)
    if stock is not None:
        found += ["", *step("transformers", stock_text(stock, walk.total))]
    if prompt is not None:
        found += ["", *prompt_steps(prompt, walk.total, len(geometry.marks))]
    return found


def step(title: str, text: str) -> list[str]:
    """A step's name and its text, wrapped beside it."""
    rows = textwrap.wrap(text, WIDTH - TITLE, break_on_hyphens=False) or [""]
    return [f"{title:<{TITLE}}{rows[0]}", *(" " * TITLE + row for row in rows[1:])]


def tower_text(walk: Walk, geometry) -> str:
    side = f"{wh((walk.pixels.shape[-1], walk.pixels.shape[-2]))} px"
    grid = f" ({rc(walk.crop_grid)})" if walk.crop_grid else " (a class token among them)"
    grid = grid if walk.levels is None else ""
    what = "the photo" if geometry.rules.native else "a crop"
    return f"{geometry.layout}; {what} of {side} gives {walk.crop_tokens:,} tokens{grid}"


def candidates(walk: Walk, every: bool) -> list[str]:
    """The table of resolutions, best first."""
    photo = walk.size[0] * walk.size[1]
    rows = [("resolution", "crops", "effective", "of photo", "wasted", "of canvas", "")]
    shown = walk.candidates if every else walk.candidates[:SHOWN]
    side = walk.best[0] // walk.crops[1]
    for each in shown:
        rows.append(
            (
                wh(each[:2]),
                rc((each.height // side, each.width // side)),
                f"{each.effective:,}",
                f"{each.effective / photo:.1%}",
                f"{each.wasted:,}",
                f"{each.wasted / (each.width * each.height):.1%}",
                "<- chosen" if each[:2] == walk.best else "",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row[:6], widths, strict=False)) for row in rows]
    text = [f"{line}  {row[6]}".rstrip() for line, row in zip(text, rows, strict=True)]
    if len(shown) < len(walk.candidates):
        text.append(f"and {len(walk.candidates) - len(shown)} more that keep less or waste more (--all lists them)")
    head = step("candidates", "chosen is what keeps most pixels of the photo (effective), then what wastes fewest")
    return head + [" " * TITLE + row for row in text]


def pixel_steps(walk: Walk, geometry) -> list[tuple[str, str]]:
    """(step, text) up to the pixels that the tower gets."""
    height, width = walk.pixels.shape[-2:]
    if walk.best is not None:
        left, top, right, bottom = walk.box
        pads = (left, walk.best[0] - right, top, walk.best[1] - bottom)
        names = ("left", "right", "above", "below")
        padded = ", ".join(f"{pad} {name}" for pad, name in zip(pads, names, strict=True) if pad) or "none"
        down, across = walk.crops
        return [
            ("resized", f"{wh(walk.size)} -> {wh(walk.resized)}, its aspect kept"),
            ("padded", f"to {wh(walk.best)} with black: {padded}"),
            ("crops", f"{down} down x {across} across = {down * across} of {wh((width, height))}"),
            ("base view", f"the whole photo squeezed to {wh((width, height))}, not padded; it goes first"),
            ("pixels", walk.made),
        ]
    if walk.canvas is not None and not geometry.rules.native:
        colour = tuple(int(255 * value) for value in geometry.processor.image_mean)
        how = "is square already" if walk.canvas == walk.size else f"to {wh(walk.canvas)}, border of colour {colour}"
        return [("squared", how), ("resized", f"to {wh((width, height))}"), ("pixels", walk.made)]
    if geometry.rules.native:
        sizes = geometry.native
        change = walk.size[0] / walk.size[1] / (width / height) - 1
        rule = f"multiples of {sizes.multiple}, {sizes.min_pixels:,} to {sizes.max_pixels:,} pixels in all"
        text = f"{wh(walk.size)} -> {wh((width, height))}, aspect changed by {abs(change):.1%} ({rule})"
        return [("resized", text), ("pixels", walk.made)]
    return [("resized", square_text(walk, geometry)), ("pixels", walk.made)]


def square_text(walk: Walk, geometry) -> str:
    """What the image processor alone does."""
    target = wh((walk.pixels.shape[-1], walk.pixels.shape[-2]))
    if not cuts_middle(geometry.processor):
        return f"squeezed to {target}, its aspect not kept"
    unseen = 1 - min(walk.size) / max(walk.size)
    lost = f"; {unseen:.1%} of the photo is not seen" if unseen else ""
    return f"by its shorter side, the middle {target} cut out{lost}"


def cuts_middle(processor) -> bool:
    """Whether the image processor resizes by the shorter side and cuts the middle out."""
    return bool(getattr(processor, "do_center_crop", False)) and bool(dict(processor.size).get("shortest_edge"))


def token_steps(walk: Walk, geometry) -> list[tuple[str, str]]:
    """(step, text) from features to visual tokens."""
    steps = []
    if walk.levels is not None or merges_map(geometry):
        h, w = geometry.patches(walk.pixels)
        steps.append(("patches", f"{h} x {w} (rows x columns) of {geometry.patch} px = {h * w:,}"))
    if walk.levels is not None:
        steps.append(("kept", kept_text(walk, geometry)))
    if walk.base_tokens:
        what = "base tokens" if walk.pixels.shape[0] > 1 else "tokens"
        grid = f"{rc(walk.crop_grid)} = " if walk.crop_grid else ""
        how = ": 2x2 patches make one" if geometry.merges else ""
        if how and walk.levels is not None:
            how = f": 2x2 patches of {geometry.patch} px make one, and so does each larger patch"
        steps.append((what, f"{grid}{walk.base_tokens:,}{how}"))
    elif walk.pixels.shape[0] > 1:
        steps.append(("base tokens", "none: nobase leaves the base view out"))
    if walk.final is not None:
        steps.append(("map", map_text(walk, geometry)))
    elif walk.map_tokens:
        steps.append(("crop tokens", f"{walk.map_tokens:,}, one crop after the other"))
    if walk.newline_tokens:
        where = "one ends each row of the map" if walk.final is not None else "one, after the only crop"
        steps.append(("newlines", f"{walk.newline_tokens:,}: {where}"))
    if geometry.marks:
        start, end = geometry.marks
        steps.append(("marks", f"2, of the text: {start} in front of the tokens, {end} behind them"))
    return steps


def merges_map(geometry) -> bool:
    """Whether the patches of the whole photo form one grid, 2x2 of which make a token."""
    return geometry.rules.native and geometry.merges


def kept_sizes(walk: Walk, geometry) -> dict[int, int]:
    """{patch size in pixels: kept patches of it}, of a tower that chooses."""
    levels = range(1, geometry.choice.num_scales + 1)
    return {geometry.patch << i - 1: int((walk.levels == i).sum()) >> 2 * (i - 1) for i in levels}


def kept_text(walk: Walk, geometry) -> str:
    """How many patches are kept of each size."""
    sizes, choice = kept_sizes(walk, geometry), geometry.choice
    middle = f" at alpha {choice.middle}, the middle of its range" if choice.draws else ""
    kept = ", ".join(f"{count:,} of {size} px" for size, count in sizes.items())
    return f"{sum(sizes.values()):,}{middle}: {kept}"


def map_text(walk: Walk, geometry) -> str:
    """From the map of all crops to the one that is kept."""
    stages = [(walk.full, "rows x columns" if geometry.rules.native else "rows x columns of all crops")]
    if walk.unpadded != walk.full:
        stages.append((walk.unpadded, "padding cut off"))
    if walk.final != walk.unpadded:
        most = geometry.rules.max_crops
        how = "the largest of every 2x2" if most is None else f"bilinear: more than {most} crops' worth of tokens"
        stages.append((walk.final, how))
    return " -> ".join(f"{rc(size)} ({how})" for size, how in stages) + f" = {walk.map_tokens:,}"


def sum_text(walk: Walk) -> str:
    """How the total adds up, where it does."""
    parts = [f"{count:,}" for count in (walk.base_tokens, walk.map_tokens, walk.newline_tokens) if count]
    return f" = {' + '.join(parts)}" if len(parts) > 1 else ""


def stock_text(stock: tuple[str, int], total: int) -> str:
    name, count = stock
    if count == total:
        return f"{name} counts {count:,} too"
    return (
        f"{name} counts {count:,} here: where the unpadded side falls short of a whole number by a rounding error, "
        "it rounds, int(round(x, 7)), and LLaVA-NeXT, as here, cuts, int(x)"
    )


def prompt_steps(prompt, visual: int, marks: int) -> list[str]:
    """The text around the image and the length of the whole sequence."""
    shown = prompt.text if len(prompt.text) <= 400 else f"{prompt.text[:200]} ... {prompt.text[-200:]}"
    found = step("prompt", f"{prompt.template}: {shown!r}")
    found += step("text tokens", f"{prompt.tokens:,} around <image>, by the tokenizer of {prompt.source}")
    parts = [part for part in (visual, marks, prompt.tokens) if part]
    length = sum(parts)
    found += step("sequence", f"{' + '.join(f'{part:,}' for part in parts)} = {length:,} tokens")
    room = prompt.limit - length
    text = f"{room:,} are left" if room >= 0 else f"{-room:,} too many: the end would be cut off"
    return found + step("", f"of {prompt.limit:,} ({prompt.limit_name}), {text}")
