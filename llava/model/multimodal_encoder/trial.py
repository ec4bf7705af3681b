"""One image through a tower before anything is trained: what its class returned against what was expected.

Shapes: B images, N tokens of an image, D channels.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn as nn

from llava.errors import LlavaError
from llava.model.multimodal_encoder.own_class import reading


def described(value) -> str:
    """What a class returned, in words."""
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    return f"{list(value.shape)} ({str(value.dtype).removeprefix('torch.')}, {value.device})"


def check_features(found, images: torch.Tensor, shape: tuple, what: str, why: str) -> None:
    """Refuse features that are not what the model will count on.

    Args:
        found: what the class returned for `images` [B, C, H, W].
        shape: expected; None for a side that may be any.
        what: the class, in messages.
        why: what the expected shape is, in words.

    Raises:
        LlavaError: another type, shape, device or dtype, or values that are not finite.
    """
    given = f"{what}: for images {described(images)} it returned {described(found)}"
    if not isinstance(found, torch.Tensor):
        raise LlavaError(f"{given}, expected a tensor: {why}")
    fits = found.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, found.shape, strict=True))
    if not fits:
        expected = ", ".join("any" if side is None else str(side) for side in shape)
        raise LlavaError(f"{given}, expected [{expected}]: {why}")
    if found.device != images.device:
        raise LlavaError(f"{given}, expected the device of the images")
    if found.dtype != images.dtype:
        raise LlavaError(f"{given}, expected the dtype of the images")
    if not found.is_meta and not found.isfinite().all():
        wrong = int((~found.isfinite()).sum())
        raise LlavaError(f"{given}, {wrong} of its {found.numel()} values not finite, expected finite numbers")


def sample_images(size: tuple[int, int], device, dtype) -> torch.Tensor:
    """[1, 3, *size] of normally distributed pixels, the same each time; on the meta device of none."""
    if torch.device(device).type == "meta":
        return torch.empty(1, 3, *size, device=device, dtype=dtype)
    pixels = torch.randn(1, 3, *size, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    return pixels.to(device, dtype)


def try_out(tower, what: str) -> None:
    """One image through a tower; through one that takes any size, another that is not square too.

    Raises:
        LlavaError: its class fails, or returns what the model does not expect.
    """
    if next(tower.vision_tower.parameters(), None) is None:
        raise LlavaError(f"{what}: its vision_tower has no parameters, expected an encoder with weights")
    side, patch = tower.grid_pixels
    compressor = tower.token_compressor
    tokens = tower.token_grid(side, side)[0] if compressor is None else compressor.input_grid_size**2
    why = f"B images, {tokens} tokens of each by its config's image_size {side} and patch_size, feature_size channels"
    _try_size(tower, what, (side, side), tokens, why)
    if tower.any_size and compressor is None:
        size = side + patch, side + 2 * patch
        tokens = tower.token_grid(*size)[0]
        why = f"it says any_size, and {tokens} tokens are those of {size[0] // patch} x {size[1] // patch} patches"
        _try_size(tower, what, size, tokens, why)


def _try_size(tower, what: str, size: tuple[int, int], tokens: int, why: str) -> None:
    images = sample_images(size, tower.device, tower.dtype)
    with evaluating(tower), torch.no_grad():
        found = tower.encode(images)
    check_features(found, images, (1, tokens, tower.feature_size), what, why)


@contextlib.contextmanager
def evaluating(module: nn.Module):
    """Inside, nothing is dropped at random."""
    before = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in before.items():
            part.training = training


@contextlib.contextmanager
def own_code(what: str, file: str | None = None):
    """A fault in a user's class is told in one line, with what it was asked to do."""
    try:
        yield
    except LlavaError:
        raise
    except Exception as error:
        raise LlavaError(f"{what}: {reading(error, file)}") from error


def check_dtype(tower, what: str, dtype: torch.dtype) -> None:
    """Whether a class computes in a dtype, with its weights in that dtype, whatever they are held in.

    Under ZeRO-3 there are no weights to compute with, and float16 is half done on CPUs: there no values are computed,
    and a class that cannot do without is left alone.

    Raises:
        LlavaError: it fails in this dtype, or returns another.
    """
    parameters = list(tower.vision_tower.parameters())
    if any(parameter.is_meta for parameter in parameters):
        return
    no_values = dtype == torch.float16 and tower.device.type == "cpu"
    device = "meta" if no_values or any(hasattr(parameter, "ds_id") for parameter in parameters) else None
    if device is not None and _used(tower, device) is None:
        return
    images, weights, buffers = _standing_in(tower, device, dtype)
    told = str(dtype).removeprefix("torch.")
    with own_code(f"{what}: with weights and images in {told}"), evaluating(tower), torch.no_grad():
        found = torch.func.functional_call(_Encode(tower), {**weights, **buffers}, (images,))
    check_features(found, images, (1, None, None), what, "[B, N, D]")


# --- what gets no gradient ---


class _Encode(nn.Module):
    """`tower.encode` as a forward, so that its weights can be stood in for."""

    def __init__(self, tower):
        super().__init__()
        self.tower = tower

    def forward(self, images):
        return self.tower.encode(images)


def unused_parts(tower) -> Iterator[nn.Module]:
    """Modules, the largest that there are, no weight of which gets a gradient from the features of an image.

    Found by one backward pass: on the meta device, where it costs nothing, or where the class cannot compute there with
    the weights themselves. A single weight comes in a `ParameterList`.
    """
    used = _used(tower, "meta")
    if used is None:
        if any(hasattr(parameter, "ds_id") for parameter in tower.parameters()):
            return  # split over ranks: there is nothing here to compute with
        used = _used(tower, None)
    if used is not None:
        yield from _largest(tower.vision_tower, used)


def _used(tower, device: str | None) -> set[int] | None:
    """Ids of the weights that get a gradient; None where the class cannot compute on that device."""
    named = dict(tower.vision_tower.named_parameters(prefix="tower.vision_tower"))
    images, weights, buffers = _standing_in(tower, device)
    for weight in weights.values():
        weight.requires_grad_()
    try:
        with evaluating(tower), torch.enable_grad():
            features = torch.func.functional_call(_Encode(tower), {**weights, **buffers}, (images,))
            gradients = torch.autograd.grad(features.sum(), list(weights.values()), allow_unused=True)
    except Exception:  # whatever a user's class raises on a device that it was not written for
        return None
    return {id(named[name]) for name, found in zip(weights, gradients, strict=True) if found is not None}


def _standing_in(tower, device: str | None, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, dict, dict]:
    """An image, and for the encoder's weights and the tower's buffers what stands in for them: on the meta device, or
    (`device` None) themselves; floating-point ones in `dtype`, if one is given."""
    images = sample_images((tower.grid_pixels[0],) * 2, device or tower.device, dtype or tower.dtype)
    weights = tower.vision_tower.named_parameters(prefix="tower.vision_tower")
    named = [{name: _stand_in(value, device, dtype) for name, value in part} for part in (weights, _buffers(tower))]
    return images, *named


def _buffers(tower) -> Iterator[tuple[str, torch.Tensor]]:
    return tower.named_buffers(prefix="tower")


def _stand_in(value: torch.Tensor, device: str | None, dtype: torch.dtype | None) -> torch.Tensor:
    dtype = dtype if dtype is not None and value.is_floating_point() else value.dtype
    if device is not None:
        return torch.empty(getattr(value, "ds_shape", value.shape), dtype=dtype, device=device)
    return value.detach().to(dtype)


def _largest(module: nn.Module, used: set[int]) -> Iterator[nn.Module]:
    parameters = [parameter for parameter in module.parameters() if id(parameter) not in used]
    if not parameters:
        return
    if all(id(parameter) not in used for parameter in module.parameters()):
        yield module
        return
    for child in module.children():
        yield from _largest(child, used)
    own = [parameter for parameter in module.parameters(recurse=False) if id(parameter) not in used]
    if own:
        yield nn.ParameterList(own)
