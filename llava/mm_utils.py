"""LLaVA-NeXT's public helpers for images and prompts. What is done to images is in `llava.images`."""

import base64
from io import BytesIO

import torch
from PIL import Image
from transformers import StoppingCriteria

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.errors import LlavaError
from llava.images.geometry import (
    divide_to_patches,
    expand2square,
    get_anyres_image_grid_shape,
    parse_grid_pinpoints,
    resize_and_pad_image,
    select_best_resolution,
)
from llava.images.processing import process_anyres_image, process_image
from llava.text_encoding import text_encoder

__all__ = [
    "KeywordsStoppingCriteria",
    "divide_to_patches",
    "expand2square",
    "get_anyres_image_grid_shape",
    "get_model_name_from_path",
    "load_image_from_base64",
    "parse_grid_pinpoints",
    "process_anyres_image",
    "process_image",
    "process_images",
    "resize_and_pad_image",
    "select_best_resolution",
    "tokenizer_image_token",
]


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
