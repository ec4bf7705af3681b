"""Two older ways of LLaVA-NeXT to cut a picture into crops. No model here is trained with them.

Sizes are (width, height) in pixels.
"""

from PIL import Image

from llava.errors import LlavaError
from llava.images.geometry import expand2square
from llava.images.processing import processor_sides


def resize_and_center_crop(image, shortest_edge_length: int):
    """Resize to a shorter side of `shortest_edge_length` (Lanczos), then cut a square of that side from the middle."""
    side, aspect = shortest_edge_length, image.width / image.height
    width, height = (int(side * aspect), side) if aspect > 1 else (side, int(side / aspect))
    left, top = (width - side) / 2, (height - side) / 2
    return image.resize((width, height), Image.Resampling.LANCZOS).crop((left, top, left + side, top + side))


def auto_pad_images(image, grid_params):
    """Resize (Lanczos) and pad with black to one of the sizes whose sides are among `grid_params`.

    Of all pairs of sides those of the nearest aspect are looked at, and of these the one whose longer side is nearest
    to the image's in proportion; the earliest on a tie.
    """
    if not grid_params:
        raise LlavaError("auto_pad_images: found no sides in grid_params, expected at least one")
    aspect = image.width / image.height
    sizes = [(width, height) for width in grid_params for height in grid_params]
    nearest = min((width / height for width, height in sizes), key=lambda value: abs(aspect - value))
    alike = [size for size in sizes if abs(size[0] / size[1] - nearest) < 1e-3]
    target = min(alike, key=lambda size: abs(max(image.size) / max(size) - 1))
    width, height = target
    if image.width > image.height:
        height = int(width / aspect)
    else:
        width = int(height * aspect)
    canvas = Image.new("RGB", target, color=(0, 0, 0))
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    canvas.paste(resized, ((target[0] - width) // 2, (target[1] - height) // 2))
    return canvas


def extract_patches(image, patch_size: int, overlap_ratio: float) -> list:
    """Squares of side `patch_size`, row by row, each overlapping the next by a share of its side; what does not fill
    one is left out, equally much at both ends.

    Raises:
        LlavaError: no side, or a share outside [0, 1).
    """
    stride = int(patch_size * (1 - overlap_ratio)) if 0 <= overlap_ratio < 1 and patch_size > 0 else 0
    if stride < 1:
        found = f"patch_size {patch_size} and overlap_ratio {overlap_ratio}"
        raise LlavaError(f"extract_patches: found {found}, expected a side above 0 and a share from 0 to below 1")
    starts = []
    for length in image.size:
        count = (length - patch_size) // stride + 1
        first = (length - (count - 1) * stride - patch_size) // 2
        starts.append(range(first, first + count * stride, stride))
    return [image.crop((x, y, x + patch_size, y + patch_size)) for y in starts[1] for x in starts[0]]


def process_highres_image_crop_split(image, data_args, processor=None):
    """The middle square of an image, cut into tiles.

    Args:
        image: PIL image.
        data_args: has `image_crop_resolution`, `image_split_resolution` and, unless `processor` is given,
            `image_processor`.

    Returns:
        Tensor [tiles, 3, side, side].
    """
    processor = data_args.image_processor if processor is None else processor
    middle = resize_and_center_crop(image, data_args.image_crop_resolution)
    return _pixels(extract_patches(middle, data_args.image_split_resolution, 0), processor)


def process_highres_image(image, processor, grid_pinpoints: str):
    """The image resized to the processor's side, then the tiles of the image squared with the mean colour and resized
    to the largest side in `grid_pinpoints` ("336,672,1008").

    Returns:
        Tensor [1 + tiles, 3, side, side].

    Raises:
        LlavaError: `grid_pinpoints` is no list of whole numbers.
    """
    try:
        largest = max(int(side) for side in str(grid_pinpoints).split(","))
    except ValueError:
        raise LlavaError(f"image_grid_pinpoints: found {grid_pinpoints!r}, expected sides like 336,672") from None
    side = processor_sides(processor)[1]
    squared = expand2square(image, tuple(int(value * 255) for value in processor.image_mean))
    tiles = extract_patches(squared.resize((largest, largest)), side, 0)
    return _pixels([image.resize((side, side)), *tiles], processor)


def _pixels(pieces: list, processor):
    return processor.preprocess(pieces, return_tensors="pt")["pixel_values"]
