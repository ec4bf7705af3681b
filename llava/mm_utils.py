"""LLaVA-NeXT's public helpers for images and prompts. What is done to images is in `llava.images`."""

import base64
from io import BytesIO

import torch
from PIL import Image

from llava.absent import absent
from llava.images.geometry import (
    divide_to_patches,
    expand2square,
    get_anyres_image_grid_shape,
    parse_grid_pinpoints,
    resize_and_pad_image,
    select_best_resolution,
)
from llava.images.highres import (
    auto_pad_images,
    extract_patches,
    process_highres_image,
    process_highres_image_crop_split,
    resize_and_center_crop,
)
from llava.images.processing import process_anyres_image, process_image
from llava.inference.stopping import KeywordsStoppingCriteria
from llava.text_encoding import tokenizer_image_token
from llava.utils import get_model_name_from_path

__all__ = [
    "KeywordsStoppingCriteria",
    "auto_pad_images",
    "divide_to_patches",
    "expand2square",
    "extract_patches",
    "get_anyres_image_grid_shape",
    "get_model_name_from_path",
    "load_image_from_base64",
    "parse_grid_pinpoints",
    "process_anyres_image",
    "process_highres_image",
    "process_highres_image_crop_split",
    "process_image",
    "process_images",
    "process_native_image",
    "resize_and_center_crop",
    "resize_and_pad_image",
    "select_best_resolution",
    "tokenizer_image_token",
]

process_native_image = absent(
    "llava.mm_utils.process_native_image", "use process_images with a config of image_aspect_ratio native"
)


def process_images(images, image_processor, model_cfg):
    """Preprocess a list of PIL images for `model_cfg.image_aspect_ratio`.

    Returns:
        One stacked tensor if all results have the same shape ([B, 3, H, W]; anyres: [B, n, 3, H, W]), else a list; for
        native always a list, so that every image's tokens are laid out by its own size.
    """
    from llava.model.visual_merge import pixel_options

    how = pixel_options(model_cfg)
    tensors = [
        process_image(image, image_processor, how.image_aspect_ratio, how.image_grid_pinpoints, how.native)
        for image in images
    ]
    if how.native is None and all(x.shape == tensors[0].shape for x in tensors):
        return torch.stack(tensors)
    return tensors


def load_image_from_base64(image):
    """PIL image from base64 text."""
    return Image.open(BytesIO(base64.b64decode(image)))
