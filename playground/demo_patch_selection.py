"""What each selection of adaptive patches keeps of a picture, in numbers and as a drawing.

    python playground/demo_patch_selection.py [--image photo.jpg] [--output patch_selection.png]

Without --image a picture is drawn: a clear sky, a house with a door, a meadow. Nothing is downloaded, and no
model is needed.
"""

import argparse
import os
import random

from llava.errors import LlavaError, report_errors

METHODS = (  # as `PatchTokenizer.construct_masks` takes them
    {"patch_selection_method": "all"},
    {"patch_selection_method": "v1"},
    {"patch_selection_method": "v2", "alpha": 1.0},
    {"patch_selection_method": "v2", "alpha": 0.7},
    {"patch_selection_method": "budget", "alpha": 0.5},
    {"patch_selection_method": "budget", "alpha": 0.3},
)
SIDE = 448  # pixels of the drawn picture: 32 x 32 patches of 14


def draw_picture():
    """An RGB picture with places of every kind: empty, with edges, and busy all over."""
    from PIL import Image, ImageDraw

    rng, horizon = random.Random(0), 5 * SIDE // 8
    picture = Image.new("RGB", (SIDE, SIDE), (150, 190, 235))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((340, 40, 400, 100), fill=(255, 240, 170))
    draw.rectangle((0, horizon, SIDE, SIDE), fill=(96, 150, 70))
    draw.rectangle((90, 150, 250, horizon + 30), fill=(200, 170, 140), outline=(90, 60, 40), width=3)
    draw.polygon([(70, 150), (170, 70), (270, 150)], fill=(150, 60, 50))
    draw.rectangle((150, 230, 190, horizon + 30), fill=(90, 60, 40))
    for _ in range(9000):  # blades of grass, and a flower among every dozen
        x, y, shade = rng.randrange(SIDE), rng.randrange(horizon + 40, SIDE), rng.randrange(60)
        draw.line((x, y, x + rng.randrange(-2, 3), y - 6), fill=(60 + shade, 110 + shade, 40 + shade // 2))
        if rng.randrange(12) == 0:
            draw.ellipse((x - 1, y - 1, x + 1, y + 1), fill=tuple(rng.randrange(60, 256) for _ in range(3)))
    return picture


def compare(picture) -> list:
    """A line for each selection on the terminal, and the drawing of each."""
    import numpy as np
    import torch

    from llava.drawing.panels import patch_panel
    from llava.model.adaptive_patches import PatchTokenizer

    tokenizer = PatchTokenizer(num_scales=3, base_patch_size=14, thresholds=[3.0, 2.0], mean=[0] * 3, std=[1] * 3)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]  # uint8 [1, 3, H, W]
    maps = tokenizer.compute_importance_maps(pixels)
    print(
        f"{picture.width}x{picture.height} pixels\n{'selection':<20}{'14 px':>8}{'28 px':>8}{'56 px':>8}{'tokens':>8}"
    )
    panels = []
    for call in METHODS:
        masks, levels, tokens = tokenizer.construct_masks(maps, **call)
        name = ", ".join(f"{value}" for value in call.values())
        counts = {size: int(mask.sum()) for size, mask in masks.items()}
        share = tokens[0] / levels.numel()
        print(f"{name:<20}" + "".join(f"{count:>8}" for count in counts.values()) + f"{tokens[0]:>8}  {share:.1%}")
        panels.append(patch_panel(picture, levels[0].numpy(), counts, 1, f"{name}: {tokens[0]} tokens"))
    return panels


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(description="Show what each selection of adaptive patches keeps of a picture.")
    parser.add_argument("--image", help="a picture (default: one is drawn)")
    parser.add_argument("--output", default="patch_selection.png", help="where the drawing goes (default: %(default)s)")
    args = parser.parse_args()
    from PIL import Image

    from llava.images.reading import load_image
    from llava.tools.visualize_patches import resized

    if args.image and os.path.realpath(args.image) == os.path.realpath(args.output):
        raise LlavaError(f"--output {args.output}: is the picture itself, expected another file")
    picture = load_image(args.image) if args.image else draw_picture()
    panels = compare(resized(picture, 14, min_pixels=56 * 56, max_pixels=SIDE * SIDE))
    width, height = (max(getattr(panel, side) for panel in panels) for side in ("width", "height"))
    sheet = Image.new("RGB", (3 * width, 2 * height))
    for place, panel in enumerate(panels):
        sheet.paste(panel, (place % 3 * width, place // 3 * height))
    try:
        sheet.save(args.output)
    except (OSError, ValueError) as error:  # no such folder; no kind of picture that Pillow writes
        raise LlavaError(f"--output {args.output}: cannot be written ({error})") from None
    print(f"drawn in {args.output}")


if __name__ == "__main__":
    main()
