"""What an encoder of timm takes and gives, found by one image through it, without weights.

Shapes: B images, h x w tokens, D channels.
"""

import inspect

import torch
import torch.nn as nn

from llava.errors import LlavaError

from .plain_config import PlainConfig
from .timm_source import TimmSource, without_weights
from .trial import evaluating, sample_images


def measure(source: TimmSource, args: dict, side: int | None, stage: int | None) -> PlainConfig:
    """All that rebuilds an encoder where its source is out of reach.

    Args:
        args: of `timm.create_model`.
        side: pixels of a picture; None: those that the weights were made for.
        stage: of a hierarchical encoder, from 1; None: the last.

    Returns:
        architecture, args, pretrained_cfg: for `timm.create_model`. data: timm's data config. image_size, patch_size
        (pixels of a token), hidden_size, stage (None where all maps are of one size), num_hidden_layers (blocks or
        stages), prefix_tokens ([class tokens, registers]), any_size (its positions follow the picture), has_weights.

    Raises:
        LlavaError: a size or stage that it cannot take, or an encoder that gives no maps.
    """
    from timm.data import resolve_model_data_config
    from timm.models import filter_pretrained_cfg, get_model_args

    model = without_weights(lambda: source.create(args))
    cfg, own = model.pretrained_cfg, _own_side(model, source)
    side = side or own
    fixed = cfg.get("fixed_input_size") and not getattr(model, "dynamic_img_size", False)
    model, maps = _look(source, {**args, "img_size": side} if side != own and fixed else args, side, own)
    stage, (channels, h, w) = _pick(maps, stage, source)
    patch = _patch(model, -1 if stage is None else stage - 1, side, h)
    if h != w or h * patch != side:
        raise LlavaError(
            f"image_size: found {side}, expected a multiple of {patch} (the pixels of a token of {source.tower})"
        )
    cls, registers = _prefix(model)
    return PlainConfig(
        model_type="timm",
        architecture=cfg["architecture"],
        args=_plain({key: value for key, value in get_model_args(model).items() if key != "num_classes"}),
        pretrained_cfg=_plain(filter_pretrained_cfg(dict(cfg, state_dict=None), remove_source=True)),
        data=_plain(resolve_model_data_config(model)),
        image_size=side,
        patch_size=patch,
        hidden_size=channels,
        stage=stage,
        num_hidden_layers=len(maps),
        prefix_tokens=[cls, registers],
        any_size=bool(getattr(model, "dynamic_img_size", False)),
        has_weights=any(cfg.get(key) for key in ("url", "file", "hf_hub_id")),
    )


def _own_side(model: nn.Module, source: TimmSource) -> int:
    """Pixels of a side that the weights were made for."""
    from timm.models import get_model_input_config

    channels, height, width = get_model_input_config(model)["input_size"]
    if channels != 3 or height != width:
        raise LlavaError(
            f"vision tower {source.tower!r}: takes {channels} channels of {width}x{height} pixels, expected 3 channels "
            "of a square"
        )
    return height


def _look(source: TimmSource, args: dict, side: int, own: int) -> tuple[nn.Module, list[tuple[int, int, int]]]:
    """(model, (D, h, w) of all maps that it gives of an image).

    Raises:
        LlavaError: it gives none, or takes no image of this size.
    """

    def look():
        model = source.create(args)
        if not hasattr(model, "forward_intermediates"):
            raise LlavaError(
                f"vision tower {source.tower!r}: timm gives no features of {type(model).__name__} (it lacks "
                "forward_intermediates), expected an encoder that gives tokens or feature maps"
            )
        first = next(model.parameters())
        images = sample_images((side, side), first.device, first.dtype)
        with evaluating(model), torch.no_grad():
            return model, [tuple(features.shape[1:]) for features, _ in intermediates(model, images, None)]

    try:
        return without_weights(look)
    except LlavaError as error:
        if "img_size" not in args or "img_size" not in str(error):
            raise
        raise LlavaError(
            f"image_size: found {side}, expected {own}: {source.tower} has no rule for another size"
        ) from None
    except Exception as error:  # whatever timm's code says of it
        said = " ".join(str(error).split())[:160]
        raise LlavaError(
            f"image_size: {source.tower} does not take images of {side}x{side} pixels ({type(error).__name__}: {said})"
        ) from None


def intermediates(model, images, indices, prefix: bool = False) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """([B, D, h, w], prefix tokens or None) of blocks or stages; `indices` None: of all."""
    asked = {"return_prefix_tokens": True} if prefix else {}
    found = model.forward_intermediates(
        images, indices=indices, stop_early=indices is not None, output_fmt="NCHW", intermediates_only=True, **asked
    )
    return [each if isinstance(each, (list, tuple)) else (each, None) for each in found]


def _pick(maps: list[tuple], stage: int | None, source: TimmSource) -> tuple[int | None, tuple[int, int, int]]:
    """(stage from 1, or None where all maps are of one size; (D, h, w) of what is used).

    Raises:
        LlavaError: a stage that there is not.
    """
    if len({(h, w) for _, h, w in maps}) == 1 and len(maps) > 1:
        if stage is not None:
            raise LlavaError(f"vision_tower_stage: found {stage}, but {source.tower} has no stages; expected none")
        return None, maps[-1]
    stage = len(maps) if stage is None else stage
    if not 1 <= stage <= len(maps):
        raise LlavaError(f"vision_tower_stage: found {stage}, expected 1 to {len(maps)}")
    return stage, maps[stage - 1]


def _patch(model: nn.Module, index: int, side: int, grid: int) -> int:
    """Pixels of a token, as timm's feature_info has them."""
    info = getattr(model, "feature_info", None)
    if isinstance(info, list) and info and "reduction" in info[index]:
        reduction = info[index]["reduction"]
        return int(reduction[0] if isinstance(reduction, (list, tuple)) else reduction)
    return side // grid


def _prefix(model: nn.Module) -> tuple[int, int]:
    """(class tokens, registers) before the patches; none where the class token joins behind the blocks (CaiT, XCiT)."""
    if "return_prefix_tokens" not in inspect.signature(model.forward_intermediates).parameters:
        return 0, 0
    registers = getattr(model, "reg_token", None)  # [1, registers, D]
    registers = 0 if registers is None else registers.shape[1]
    return getattr(model, "num_prefix_tokens", 0) - registers, registers


def _plain(values: dict) -> dict:
    """For JSON: lists in place of tuples."""
    return {key: list(value) if isinstance(value, (list, tuple)) else value for key, value in values.items()}
