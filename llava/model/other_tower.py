"""A vision tower that is named in place of a checkpoint's where it is loaded: it must give what the projector takes."""

import contextlib
from types import SimpleNamespace

import torch

from llava.errors import LlavaError
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.trust import naming
from llava.model.vision_change import same_tower
from llava.utils import rank0_print


def fit_other_tower(config, values: dict, path: str) -> None:
    """Hold the tower that a changed config names against the checkpoint's own; configs are read, no weights.

    Args:
        config: the model's, as it was changed: `mm_vision_tower` may lie elsewhere now, or be another encoder.
        values: the checkpoint's config.json.
        path: of the checkpoint.

    What the checkpoint says of its own tower is not used for another one. Its weights are, where it holds some.

    Raises:
        LlavaError: the tower is not there, or gives tokens of another width or number than the checkpoint was trained
            with.
    """
    had, given = values.get("mm_vision_tower"), config.mm_vision_tower
    if had is None or same_tower(had, given, path):
        return
    for key in ("mm_vision_config", "mm_image_processor_config"):
        if getattr(config, key, None) == values.get(key):  # not said anew beside the name
            setattr(config, key, None)
    with naming(given, getattr(config, "mm_vision_tower_type", None)):
        tower = _empty(config)
    own = None
    with contextlib.suppress(LlavaError):  # out of reach
        own = _empty(SimpleNamespace(**{**values, "_name_or_path": path}))
    width = values.get("mm_hidden_size") or (own and own.hidden_size)
    said = f"{path}: mm_vision_tower {given}, named in place of {had}, gives"
    expected = "expected a tower of that size, or a training run with the new one"
    if width not in (None, tower.hidden_size):
        raise LlavaError(f"{said} tokens of {tower.hidden_size} channels, the projector takes {width}; {expected}")
    if own is not None and not (own.any_size or tower.any_size) and own.num_patches != tower.num_patches:
        sizes = f"{tower.num_patches} tokens of an image ({tower.image_size} pixels)"
        raise LlavaError(f"{said} {sizes}, the checkpoint's {own.num_patches} ({own.image_size} pixels); {expected}")
    rank0_print(f"note: {path}: vision tower {given} in place of {had}, with the checkpoint's weights if it holds some")


def _empty(config):
    with torch.device("meta"):
        return build_vision_tower(config, delay_load=True)
