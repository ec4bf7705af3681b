"""LLaVA-NeXT's public helpers for images and prompts.

Sizes are (width, height) throughout this module, as in LLaVA-NeXT; tensors are channel first.
"""

import ast
import base64
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO

import torch
from PIL import Image
from transformers import StoppingCriteria

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.errors import LlavaError
from llava.text_encoding import text_encoder

# --- image geometry ---------------------------------------------------------------------------------------------------


def resolution_fit(original_size, resolution):
    """(effective, wasted) pixels of an image fitted into a candidate resolution, both sizes (width, height).

    Effective: what the image holds after scaling, but no more than it had. Wasted: the rest of the candidate.
    """
    width, height = original_size
    scale = min(resolution[0] / width, resolution[1] / height)
    effective = min(int(width * scale) * int(height * scale), width * height)
    return effective, resolution[0] * resolution[1] - effective


def select_best_resolution(original_size, possible_resolutions):
    """The candidate that keeps most of the image, then wastes least (LLaVA-NeXT "anyres").

    Args:
        original_size: (width, height) of the image.
        possible_resolutions: list of (width, height) candidates.

    Returns:
        (width, height) of the best candidate; the earliest one on a tie.
    """

    def score(candidate):
        effective, wasted = resolution_fit(original_size, candidate)
        return effective, -wasted

    return tuple(max(possible_resolutions, key=score))


@lru_cache(maxsize=64)
def _parse_grid(spec: str, crop_size: int) -> tuple[tuple[int, int], ...]:
    if "x" in spec:
        # "(1x1),...,(6x6)": every multiple of the crop size between the first and the last pair
        pairs = [(int(a), int(b)) for a, b in re.findall(r"\((\d+)x(\d+)\)", spec)]
        if not pairs:
            raise LlavaError(f'image_grid_pinpoints: found {spec!r}, expected a range like "(1x1),...,(6x6)"')
        (w0, h0), (w1, h1) = pairs[0], pairs[-1]
        grid = [(w * crop_size, h * crop_size) for w in range(w0, w1 + 1) for h in range(h0, h1 + 1)]
    else:
        try:
            grid = [(int(w), int(h)) for w, h in ast.literal_eval(spec)]
        except (ValueError, SyntaxError, TypeError):
            raise LlavaError(
                f"image_grid_pinpoints: found {spec!r}, expected a list of [width, height] pairs"
            ) from None
    if not grid:
        raise LlavaError(f"image_grid_pinpoints: {spec!r} holds no resolution")
    return tuple(grid)


def parse_grid_pinpoints(grid_pinpoints, crop_size: int) -> tuple[tuple[int, int], ...]:
    """Candidate resolutions as (width, height) in pixels.

    Args:
        grid_pinpoints: a list of [width, height], the same as a string, or a range such as "(1x1),...,(6x6)" counted
            in crops.
        crop_size: side of a crop in pixels; only ranges need it.
    """
    if grid_pinpoints is None:
        raise LlavaError("image_grid_pinpoints: missing; image_aspect_ratio anyres needs a list of resolutions")
    if not isinstance(grid_pinpoints, str):
        grid_pinpoints = str([list(pair) for pair in grid_pinpoints])
    return _parse_grid(grid_pinpoints, crop_size)


def get_anyres_image_grid_shape(image_size, grid_pinpoints, patch_size):
    """How many crops (across, down) an image of (width, height) is cut into; `patch_size` is the crop's side."""
    width, height = select_best_resolution(image_size, parse_grid_pinpoints(grid_pinpoints, patch_size))
    return width // patch_size, height // patch_size


def resize_and_pad_image(image, target_resolution):
    """Resize `image` to fit (width, height) keeping its aspect ratio, the free side rounded up; centre it on black."""
    target_width, target_height = target_resolution
    scale_w, scale_h = target_width / image.width, target_height / image.height
    if scale_w < scale_h:
        size = target_width, min(math.ceil(image.height * scale_w), target_height)
    else:
        size = min(math.ceil(image.width * scale_h), target_width), target_height
    canvas = Image.new("RGB", (target_width, target_height), (0, 0, 0))
    canvas.paste(image.resize(size), ((target_width - size[0]) // 2, (target_height - size[1]) // 2))
    return canvas


def divide_to_patches(image, patch_size):
    """Cut `image` into squares of side `patch_size`, row by row."""
    return [
        image.crop((x, y, x + patch_size, y + patch_size))
        for y in range(0, image.height, patch_size)
        for x in range(0, image.width, patch_size)
    ]


def expand2square(pil_img, background_color):
    """Centre the image on a square canvas of the given colour; a square image is returned as it is."""
    width, height = pil_img.size
    if width == height:
        return pil_img
    side = max(width, height)
    canvas = Image.new(pil_img.mode, (side, side), background_color)
    canvas.paste(pil_img, ((side - width) // 2, (side - height) // 2))
    return canvas


# --- image preprocessing ----------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class NativeResolution:
    """Sizes for `image_aspect_ratio: native`: the image's own, to the nearest that the model can take.

    multiple: pixels that both sides must be multiples of: the patch, times 2 where the projector merges 2x2 tokens.
    min_pixels, max_pixels: bounds on width * height; an image beyond them is scaled, keeping its aspect.
    """

    multiple: int
    min_pixels: int
    max_pixels: int

    def __post_init__(self):
        square = self.multiple**2
        if not 0 < self.min_pixels <= self.max_pixels or self.max_pixels < square:
            raise LlavaError(
                f"min_pixels, max_pixels: found {self.min_pixels}, {self.max_pixels}, expected the first not above the "
                f"second, and that at least {square}, the smallest image this model takes"
            )

    @classmethod
    def from_config(cls, config) -> "NativeResolution | None":
        """For a model's config; None where `image_aspect_ratio` is not native."""
        if getattr(config, "image_aspect_ratio", None) != "native":
            return None
        from llava.model.multimodal_projector.builder import MERGERS

        merge = 2 if getattr(config, "mm_projector_type", None) in MERGERS else 1
        return cls(config.mm_vision_config["patch_size"] * merge, config.min_pixels, config.max_pixels)

    def __call__(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) to resize an image to."""
        unit, area = self.multiple, width * height
        across, down = max(round(width / unit), 1), max(round(height / unit), 1)
        if across * down * unit**2 < self.min_pixels:
            scale = math.sqrt(self.min_pixels / area) / unit
            across, down = math.ceil(width * scale), math.ceil(height * scale)
        if across * down * unit**2 > self.max_pixels:
            scale = math.sqrt(self.max_pixels / area) / unit
            limit = self.max_pixels // unit**2  # where a side cannot go below one unit, the other gives way
            across, down = (min(max(math.floor(side * scale), 1), limit) for side in (width, height))
        return across * unit, down * unit


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


def process_images(images, image_processor, model_cfg):
    """Preprocess a list of PIL images for `model_cfg.image_aspect_ratio`.

    Returns:
        One stacked tensor if all results have the same shape ([B, 3, H, W]; anyres: [B, n, 3, H, W]), else a list; for
        native always a list, so that every image's tokens are laid out by its own size.
    """
    aspect_ratio = getattr(model_cfg, "image_aspect_ratio", None)
    grid = getattr(model_cfg, "image_grid_pinpoints", None)
    native = NativeResolution.from_config(model_cfg)
    tensors = [process_image(image, image_processor, aspect_ratio, grid, native) for image in images]
    if native is None and all(x.shape == tensors[0].shape for x in tensors):
        return torch.stack(tensors)
    return tensors


def load_image_from_base64(image):
    """PIL image from base64 text."""
    return Image.open(BytesIO(base64.b64decode(image)))


# --- prompts ----------------------------------------------------------------------------------------------------------


def _with_special_tokens(tokenizer, text):
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return tokenizer(text).input_ids
    return text_encoder(tokenizer).encode(text, add_special_tokens=True).ids


def tokenizer_image_token(prompt, tokenizer, image_token_index=IMAGE_TOKEN_INDEX, return_tensors=None):
    """Token ids of `prompt` with every `<image>` replaced by `image_token_index`.

    The text between images is tokenised piece by piece; a BOS token that the tokenizer puts before every piece is kept
    once, at the front.

    Returns:
        list of int, or LongTensor [L] with `return_tensors="pt"`.
    """
    chunks = [_with_special_tokens(tokenizer, chunk) for chunk in prompt.split(DEFAULT_IMAGE_TOKEN)]
    input_ids = list(chunks[0])
    for chunk in chunks[1:]:
        input_ids.append(image_token_index)
        # llama3's template writes the BOS itself: then only a tokenizer that adds one put it before this piece, too
        bos = bool(chunk) and chunk[0] == tokenizer.bos_token_id
        input_ids.extend(chunk[1:] if bos else chunk)
    if return_tensors is None:
        return input_ids
    if return_tensors == "pt":
        return torch.tensor(input_ids, dtype=torch.long)
    raise LlavaError(f'tokenizer_image_token: return_tensors is {return_tensors!r}, expected None or "pt"')


def get_model_name_from_path(model_path):
    """Last part of a path; `run_checkpoint-N` for a checkpoint folder inside a run."""
    parts = model_path.strip("/").split("/")
    return f"{parts[-2]}_{parts[-1]}" if parts[-1].startswith("checkpoint-") and len(parts) > 1 else parts[-1]


class KeywordsStoppingCriteria(StoppingCriteria):
    """Stop generation when every row's new text contains one of `keywords`.

    Args:
        keywords: list of str.
        tokenizer: decodes the new tokens.
        input_ids: [B, L] prompt ids given to `generate`. Whether the ids to judge begin with them is told at the first
            call: a LLaVA model generates from embeddings, so that only new tokens come.
    """

    def __init__(self, keywords, tokenizer, input_ids):
        self.keywords = keywords
        self.tokenizer = tokenizer
        self.start_len = input_ids.shape[1]
        # a keyword can be spread over as many tokens as it is long, plus one that it shares with earlier text
        self.tail = max((len(keyword.encode()) for keyword in keywords), default=0) + 1

    def __call__(self, output_ids, scores, **kwargs):
        if output_ids.shape[1] <= self.start_len:  # the prompt is not among them
            self.start_len = 0
        new = output_ids[:, max(self.start_len, output_ids.shape[1] - self.tail) :]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=False)
        found = [any(keyword in text for keyword in self.keywords) for text in texts]
        return torch.tensor(found, dtype=torch.bool, device=output_ids.device)
