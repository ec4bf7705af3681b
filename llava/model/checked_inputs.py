"""What callers hand a model: token ids, masks, pictures and their sizes, looked at before anything is computed.

Shapes: B rows, L tokens.
"""

import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import LlavaError

MODALITIES = ("image", "video", "text")
STOCK_PICTURES = ("pixel_values", "pixel_values_videos")


def described(value) -> str:
    """A value for a message: a tensor by dtype and shape, anything else by its type."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__


def whole_numbers(name: str, value):
    """Token ids or labels [B, L] of 16, 32 or 64 bits as int64; None stays None.

    Raises:
        LlavaError: no tensor, another shape, or numbers of other types: in those of 8 bits IGNORE_INDEX and
            IMAGE_TOKEN_INDEX would be tokens.
    """
    if value is None:
        return None
    if not isinstance(value, torch.Tensor) or value.ndim != 2:
        row = " (one row: ids[None])" if isinstance(value, torch.Tensor) and value.ndim == 1 else ""
        raise LlavaError(f"{name}: found {described(value)}, expected a tensor [B, L]{row}")
    if value.dtype not in (torch.int16, torch.int32, torch.int64):
        raise LlavaError(f"{name}: found {described(value)}, expected whole numbers (int64)")
    return value.long()


def check_vocabulary(model, ids, image_tokens: str | None = None) -> None:
    """Refuse ids that have no embedding, which a GPU would report as an assertion in a kernel.

    Args:
        model: of transformers.
        ids: whole numbers of any shape; on a GPU the host waits for them.
        image_tokens: what is to be said of IMAGE_TOKEN_INDEX among them; None: it is as any other number.
    """
    if not ids.numel():
        return
    lowest, highest = torch.stack(ids.aminmax()).tolist()
    size = getattr(model.get_input_embeddings(), "num_embeddings", None) or model.config.get_text_config().vocab_size
    if lowest >= 0 and highest < size:
        return
    if lowest == IMAGE_TOKEN_INDEX and highest < size and image_tokens is not None:
        raise LlavaError(image_tokens)
    found = lowest if lowest < 0 else highest
    raise LlavaError(f"input_ids: found {found}, expected tokens of the vocabulary, from 0 to {size - 1}")


def check_text(model, input_ids, image_tokens: str | None = None) -> None:
    """`check_vocabulary` of a forward pass; one token a row on a GPU, a step of an answer, is left alone."""
    step = input_ids.device.type != "cpu" and input_ids.shape[1] == 1
    if input_ids.shape[1] == 0:
        raise LlavaError(f"input_ids: found {list(input_ids.shape)}, expected at least one token a row")
    if not step and not input_ids.is_meta and not torch.compiler.is_compiling():
        check_vocabulary(model, input_ids, image_tokens)


def check_rows(input_ids, **others) -> None:
    """Refuse what is not [B, L] as `input_ids` is, by its name; None is left alone."""
    for name, value in others.items():
        if value is not None and value.shape != input_ids.shape:
            raise LlavaError(f"{name}: found {list(value.shape)}, expected {list(input_ids.shape)}, as input_ids")


def check_images(images) -> None:
    """Refuse what is neither a tensor of pictures nor a list of such."""
    expected = "floats [3, H, W] or [K, 3, H, W], one for each <image> (see process_images)"
    if isinstance(images, torch.Tensor):
        if images.ndim not in (4, 5) or not images.is_floating_point():
            raise LlavaError(
                f"images: found {described(images)}, expected floats [N, 3, H, W], [N, K, 3, H, W] or a list"
            )
        return
    if not isinstance(images, (list, tuple)):
        raise LlavaError(f"images: found {described(images)}, expected a list of {expected}")
    for number, image in enumerate(images):
        fits = isinstance(image, torch.Tensor) and image.ndim in (3, 4) and image.is_floating_point()
        if not fits or 0 in image.shape:
            raise LlavaError(f"images: number {number}: found {described(image)}, expected {expected}")


def check_facts(modalities, image_sizes) -> None:
    """Refuse an unknown modality, and sizes that are no list."""
    if image_sizes is not None and not hasattr(image_sizes, "__len__"):
        raise LlavaError(f"image_sizes: found {image_sizes!r}, expected a list of (width, height) in pixels")
    for kind in [modalities] if isinstance(modalities, str) else modalities or []:
        if kind not in MODALITIES:
            raise LlavaError(f"modalities: found {kind!r}, expected {', '.join(MODALITIES)}")


def width_and_height(size) -> tuple:
    """One of image_sizes as two plain numbers, from a tuple, list, array or tensor."""
    pair = size.tolist() if hasattr(size, "tolist") else size
    whole = isinstance(pair, (list, tuple)) and len(pair) == 2
    if not whole or any(isinstance(x, (bool, str)) or not hasattr(x, "__float__") or not x > 0 for x in pair):
        raise LlavaError(f"image_sizes: found {size!r}, expected (width, height) in pixels".replace("\n", " "))
    return tuple(x.item() if hasattr(x, "item") else x for x in pair)


def refuse_stock_names(kwargs: dict) -> None:
    """Refuse the pictures of stock models' batches, which a language model's forward would pass over."""
    for name in STOCK_PICTURES:
        if kwargs.get(name) is not None:
            raise LlavaError(
                f"{name}: found {described(kwargs[name])}, expected images (see process_images): a LLaVA model"
            )
