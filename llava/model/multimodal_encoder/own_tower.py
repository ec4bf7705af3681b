"""Building the tower of a class that a user brings along, and trying it with one image; docs/your_encoder.md says what
such a class owes.
"""

import functools
import os
import sys

import torch
import torch.nn as nn

from llava.config.own_tower import ClassPath
from llava.errors import LlavaError

from .base import VisionTower
from .module_tower import ModuleTower
from .multi_scale import multi_scale
from .own_class import load_class
from .trial import own_code, try_out
from .trust import permitted

PAGE = "docs/your_encoder.md"
_ASKED = {
    "config": ("image_size", "patch_size", "hidden_size"),
    "image_processor": ("preprocess", "size", "image_mean", "to_dict", "save_pretrained"),
}


def build_own_tower(tower: str, cfg, name: str, delay_load: bool = False) -> VisionTower:
    """The tower of a class: a `VisionTower`, or a plain `nn.Module`, which `ModuleTower` goes around.

    Where no checkpoint has told its sizes, one image goes through it: on the meta device if it is built there and can
    compute there, else on the CPU.

    Args:
        tower: `vision_tower` of the run, the class too or a folder.
        cfg: as `build_vision_tower`.
        name: of the class, as `cfg` says it.

    Raises:
        LlavaError: no such class, one that may not be run, that lacks something, or that returns what is not expected.
    """
    checkpoint = getattr(cfg, "_name_or_path", None) or None
    path = permitted(name, checkpoint, "vision_tower" if name == tower else "mm_vision_tower_type")
    found = load_class(path, checkpoint)
    built = _built(found, path, tower, cfg, delay_load)
    built.own_class = str(path)
    return built


def _built(found: type, path: ClassPath, tower: str, cfg, delay_load: bool) -> VisionTower:
    make = _maker(found, path, tower, cfg, delay_load)
    if getattr(cfg, "mm_vision_config", None) is not None and delay_load:
        built = _restore(make, found, path)  # it was tried when it was trained
        _check_parts(built, path)
        return built
    if torch.empty(0).is_meta:
        try:
            return _build_and_try(make, found, path)
        except LlavaError as error:
            if error.__cause__ is None:  # it computed: what it returned is wrong
                raise
        with torch.device("cpu"):
            return _build_and_try(make, found, path)
    return _build_and_try(make, found, path)


def _maker(found: type, path: ClassPath, tower: str, cfg, delay_load: bool):
    arguments, scales = getattr(cfg, "tower_args", None) or {}, getattr(cfg, "s2", False)
    if not issubclass(found, nn.Module):
        raise LlavaError(
            f"vision tower {path}: {found.__name__} is no nn.Module, expected one, or a VisionTower ({PAGE})"
        )
    if not issubclass(found, VisionTower):
        if found.forward is nn.Module.forward:
            raise LlavaError(f"vision tower {path}: {found.__name__} lacks forward, expected [B, C, H, W] -> [B, N, D]")
        taken = {"module_class", "what"} & arguments.keys()
        if taken:
            raise LlavaError(f"tower_args: found {', '.join(taken)}, expected other names")
        around = multi_scale(ModuleTower, str(path)) if scales else ModuleTower
        return functools.partial(around, tower, cfg, delay_load, module_class=found, what=str(path), **arguments)
    lacking = sorted(found.__abstractmethods__)
    if lacking:
        raise LlavaError(
            f"vision tower {path}: {found.__name__} lacks {', '.join(lacking)}, which a VisionTower has ({PAGE})"
        )
    for key in ("vision_tower_image", "vision_tower_weights"):
        if getattr(cfg, key, None):
            raise LlavaError(f"{key}: {path} is a VisionTower, which sees to that itself; expected it in tower_args")
    around = multi_scale(found, str(path)) if scales else found
    return functools.partial(around, tower, cfg, delay_load=delay_load, **arguments)


def _build(make, found: type, path: ClassPath) -> VisionTower:
    file = getattr(sys.modules.get(found.__module__), "__file__", None)
    with own_code(f"vision tower {path}", file and os.path.realpath(file)):
        return make()


def _restore(make, found: type, path: ClassPath) -> VisionTower:
    """From what a checkpoint holds; its encoder's folder need not be there."""
    try:
        return _build(make, found, path)
    except LlavaError as error:
        if error.__cause__ is None or not issubclass(found, VisionTower):
            raise
        raise LlavaError(
            f"{error}; in a checkpoint, read_config is to take config and image processor from mm_vision_config and "
            f"mm_image_processor_config of args ({PAGE})"
        ) from error.__cause__


def _build_and_try(make, found: type, path: ClassPath) -> VisionTower:
    file = getattr(sys.modules.get(found.__module__), "__file__", None)
    built = _build(make, found, path)
    _check_parts(built, path)
    with own_code(f"vision tower {path}", file and os.path.realpath(file)):
        try_out(built, f"vision tower {path}")
    return built


def _check_parts(tower: VisionTower, path: ClassPath) -> None:
    """What `read_config`, `build_empty` and `load_model` must have left."""
    for part, asked in _ASKED.items():
        held = getattr(tower, part, None)
        lacking = [name for name in asked if not hasattr(held, name)]
        if held is None or lacking:
            told = f"no {part}" if held is None else f"a {part} without {', '.join(lacking)}"
            raise LlavaError(
                f"vision tower {path}: its read_config set {told}, expected {', '.join(asked)} in it ({PAGE})"
            )
    if not isinstance(getattr(tower, "vision_tower", None), nn.Module):
        raise LlavaError(
            f"vision tower {path}: found no vision_tower, expected build_empty and load_model to set it to the encoder "
            f"({PAGE})"
        )
