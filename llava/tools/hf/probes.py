"""The pictures and questions on which two models are compared."""

from typing import NamedTuple

QUESTION = "What is shown in this picture?"
PLAIN_QUESTION = "Which colour does the sky have?"


class Probe(NamedTuple):
    """One question; `picture` is a PIL image or None."""

    name: str
    picture: object
    question: str


def rounding_agrees(size: tuple[int, int], grid, side: int, patches: int) -> bool:
    """Whether LLaVA-NeXT and transformers unpad an image to the same tokens: they round int(x) and int(round(x, 7)).

    Args:
        size: (width, height) of the image.
        grid: candidate resolutions (width, height).
        side: of a crop in pixels.
        patches: tokens of a crop's side.
    """
    from llava.images.geometry import select_best_resolution

    width, height = size
    best = select_best_resolution(size, grid)
    across, down = (edge // side * patches for edge in best)
    if width / height > across / down:
        new, whole = height * (across / width), down
    else:
        new, whole = width * (down / height), across
    return (whole - int(new)) // 2 == (whole - int(round(new, 7))) // 2


def probes(config, tower) -> list[Probe]:
    """A wide and a tall picture, of sizes that both sides round alike, and a question without one."""
    from llava.images.geometry import parse_grid_pinpoints

    side = tower.config.image_size
    sizes = (round(side * 1.55), round(side * 0.95)), (round(side * 0.7), round(side * 1.7))
    grid = getattr(config, "image_grid_pinpoints", None)
    if grid and "anyres" in (getattr(config, "image_aspect_ratio", None) or ""):
        grid = parse_grid_pinpoints(grid, side)
        patches = side // tower.config.patch_size
        sizes = [_nearest_that_agrees(size, grid, side, patches) for size in sizes]
    pictures = [picture(size, seed) for seed, size in enumerate(sizes)]
    named = [Probe(f"picture of {p.width}x{p.height}", p, QUESTION) for p in pictures]
    return [*named, Probe("question without a picture", None, PLAIN_QUESTION)]


def _nearest_that_agrees(size, grid, side, patches):
    width, height = size
    while not rounding_agrees((width, height), grid, side, patches):
        width += 1
    return width, height


def picture(size: tuple[int, int], seed: int):
    """A picture with slow and fast changes of colour, the same at every call."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    slow = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    fast = rng.integers(-40, 41, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.asarray(slow).astype(int) + fast, 0, 255).astype(np.uint8))


def llava_prompt(template: str, probe: Probe) -> str:
    """What LLaVA's conversation template makes of a probe; captioners (`plain`) get the bare text."""
    from llava.conversation import get_template
    from llava.tools.hf.chat_template import has_chat_template

    text = probe.question if probe.picture is None else f"<image>\n{probe.question}"
    if not has_chat_template(template):
        return text
    conversation = get_template(template)
    conversation.append_message(conversation.roles[0], text)
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


def messages(probe: Probe) -> list[dict]:
    """A probe as chat templates take it."""
    content = [{"type": "text", "text": probe.question}]
    if probe.picture is not None:
        content.insert(0, {"type": "image"})
    return [{"role": "user", "content": content}]
