"""Pictures to pixels: the tower's image processor, with LLaVA-NeXT's padding and crops around it."""

from dataclasses import dataclass

from llava.errors import LlavaError
from llava.images.geometry import (
    NativeResolution,
    divide_to_patches,
    expand2square,
    parse_grid_pinpoints,
    resize_and_pad_image,
    select_best_resolution,
)


def processor_sides(processor) -> tuple[int, int]:
    """(side of a crop, side the whole image is resized to) of an image processor, in pixels."""
    size, crop = processor.size, getattr(processor, "crop_size", None)
    if hasattr(size, "get") or hasattr(size, "shortest_edge"):  # dict, or transformers' SizeDict
        edge = size["shortest_edge"] if size.get("shortest_edge") else min(size["height"], size["width"])
    else:
        edge = min(size)
    return (crop["height"] if crop else edge), edge


def process_anyres_image(image, processor, grid_pinpoints):
    """The whole image resized to one crop, then the crops of its best resolution: Tensor [1 + crops, 3, side, side]."""
    crop_side, base_side = processor_sides(processor)
    best = select_best_resolution(image.size, parse_grid_pinpoints(grid_pinpoints, base_side))
    crops = divide_to_patches(resize_and_pad_image(image, best), crop_side)
    # one call for all crops: a processor call costs more than the work on a crop
    return processor.preprocess([image.resize((base_side, base_side)), *crops], return_tensors="pt")["pixel_values"]


def process_native_image(image, processor, size):
    """Resize `image` to (width, height), rescale and normalise it: Tensor [3, height, width]."""
    size = {"height": size[1], "width": size[0]}
    return processor.preprocess(image, size=size, do_resize=True, do_center_crop=False, return_tensors="pt")[
        "pixel_values"
    ][0]


def process_image(image, processor, image_aspect_ratio, image_grid_pinpoints=None, native=None):
    """Preprocess one image as `image_aspect_ratio` says.

    Args:
        image: PIL image of any mode and size.
        processor: the tower's image processor.
        image_aspect_ratio: "anyres" or "anyres_max_N" (crops), "pad" (squared with the mean colour), "native" (its own
            size), anything else (None, "square", ...): the processor alone.
        image_grid_pinpoints: candidate resolutions, needed for anyres.
        native: the model's `NativeResolution`, needed for native.

    Returns:
        Tensor [3, H, W], or [n, 3, H, W] for anyres.
    """
    image = image if image.mode == "RGB" else image.convert("RGB")
    if image_aspect_ratio is not None and "anyres" in image_aspect_ratio:
        return process_anyres_image(image, processor, image_grid_pinpoints)
    if image_aspect_ratio in ("highres", "crop_split"):
        raise LlavaError(
            f"image_aspect_ratio: found {image_aspect_ratio!r}, which is not offered here; expected square, pad, "
            "anyres or anyres_max_N"
        )
    if image_aspect_ratio == "native":
        return process_native_image(image, processor, native(*image.size))
    if image_aspect_ratio == "pad":
        image = expand2square(image, tuple(int(x * 255) for x in processor.image_mean))
    return processor.preprocess(image, return_tensors="pt")["pixel_values"][0]


@dataclass(frozen=True)
class PixelOptions:
    """How the pictures of a sample become pixels; `image_aspect_ratio` and the rest as `process_image` takes them."""

    image_aspect_ratio: str | None = None
    image_grid_pinpoints: object = None
    native: NativeResolution | None = None

    def aspect_ratio(self, pictures: int) -> str | None:
        """For a sample of so many pictures: several are squared and get one crop each, unless they keep their size."""
        return "pad" if pictures > 1 and self.native is None else self.image_aspect_ratio


def process_pictures(pictures, processor, options: PixelOptions, names=None) -> list:
    """The pixels of all pictures of one sample, for training and inference alike.

    Args:
        pictures: PIL images; a clip is the list of its frames, all of one size.
        processor: the tower's image processor.
        names: what the messages call the pictures.

    Returns:
        A tensor for each: [3, H, W], [n, 3, H, W] of an image with crops, [T, 3, H, W] of a clip.

    Raises:
        LlavaError: a shape that the processor cannot take, such as 2000 x 1 pixels.
    """
    aspect_ratio, grid, native = options.aspect_ratio(len(pictures)), options.image_grid_pinpoints, options.native
    found = []
    for number, picture in enumerate(pictures):
        try:
            if isinstance(picture, list):
                found.append(process_clip(picture, processor, native))
            else:
                found.append(process_image(picture, processor, aspect_ratio, grid, native))
        except LlavaError:
            raise
        except (ValueError, ZeroDivisionError) as error:
            which, (width, height) = "" if names is None else f" {names[number]}", picture_size(picture)
            raise LlavaError(
                f"image{which}: found {width}x{height} pixels that cannot be processed ({error})"
            ) from None
    return found


def process_clip(frames: list, processor, native=None):
    """Tensor [T, 3, H, W] of a clip's frames, which have no crops."""
    if native is None:
        return processor.preprocess(frames, return_tensors="pt")["pixel_values"]
    import torch

    size = native(*frames[0].size)
    return torch.stack([process_native_image(frame, processor, size) for frame in frames])


def picture_size(picture) -> tuple[int, int]:
    """(width, height) of a PIL image, or of a clip's frames."""
    return picture[0].size if isinstance(picture, list) else picture.size


def pixel_shape(size, processor, options: PixelOptions, pictures: int = 1) -> tuple[int, ...]:
    """The shape of `process_pictures`'s result for one of so many pictures, of (width, height); none is processed."""
    crop, base = processor_sides(processor)
    if "anyres" in (options.aspect_ratio(pictures) or ""):
        width, height = select_best_resolution(size, parse_grid_pinpoints(options.image_grid_pinpoints, base))
        return 1 + -(-width // crop) * -(-height // crop), 3, crop, crop
    if options.native is not None:
        width, height = options.native(*size)
        return 3, height, width
    return 3, crop, crop
