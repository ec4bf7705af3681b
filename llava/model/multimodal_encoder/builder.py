"""Which class encodes the images: the registry of vision towers and the rules that pick from it.

To add a tower: write one file with a `VisionTower` and add one line to `TOWERS`. An encoder of one's own needs neither:
a run names its class (see `own_tower.py`).
"""

import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace

from llava.config.own_tower import TIMM_PREFIX, class_path
from llava.errors import LlavaError, OutOfReach
from llava.model.places import is_hub_id, not_there
from llava.model.vision_settings import COMPRESSED, uses_compression

from .hf_facts import FACTS, PACKED, REMOTE

__all__ = ["COMPRESSED", "TOWERS", "TowerEntry", "build_vision_tower", "tower_type", "uses_compression"]


@dataclass(frozen=True)
class TowerEntry:
    """`path` is module:class; a tower is picked by `model_types` of the encoder's config.json, or else by name.

    also_reads: model types of which the tower takes a checkpoint whose name has one of `name_parts`.
    """

    path: str
    model_types: tuple[str, ...] = ()
    name_parts: tuple[str, ...] = ()
    also_reads: tuple[str, ...] = ()

    def load(self):
        module, name = self.path.split(":")
        return getattr(importlib.import_module(f"llava.model.multimodal_encoder.{module}"), name)


# Looked through in this order; by name the first match wins.
TOWERS = {
    "hevc_vit_packing": TowerEntry(
        "hevc_vit_packing_tower:HEVCViTPackingVisionTower",
        ("llava_vit_packing",),
        ("packing",),
        also_reads=("llava_vit", "onevision_encoder"),
    ),
    "hevc_vit": TowerEntry(
        "hevc_vit_tower:HEVCViTVisionTower",
        ("llava_vit", "onevision_encoder"),
        ("hevc_vit", "llava_vit", "onevision"),
    ),
    "siglip": TowerEntry("siglip_encoder:SigLipVisionTower", ("siglip", "siglip_vision_model"), ("siglip",)),
    "clip": TowerEntry(
        "clip_encoder:CLIPVisionTower", ("clip", "clip_vision_model"), ("clip", "openai", "laion", "ShareGPT4V")
    ),
    "clip_s2": TowerEntry("clip_encoder:CLIPVisionTowerS2"),
    "packed_vision": TowerEntry("packed_vision:PackedVisionTower", tuple(PACKED)),
    "hf_vision": TowerEntry(
        "hf_vision:HFVisionBackboneTower", (*REMOTE, *(kind for kind in FACTS if kind not in PACKED))
    ),
    "timm": TowerEntry("timm_tower:TimmTower", ("timm",)),
}


ENCODER = "the folder or hub id of a vision encoder"
OWN_KEYS = ("tower_args", "vision_tower_image", "vision_tower_weights")  # for classes of the user's own
TIMM_KEYS = ("tower_args", "vision_tower_weights")  # of them, what an encoder of timm takes too
SIZE_KEYS = ("image_size", "vision_tower_stage")  # for towers that have a choice
# whose class sees to S2 by itself; beside a SigLIP the key does nothing, as in LLaVA-NeXT, whose checkpoints rely on it
OWN_S2 = ("clip_s2", "siglip")


def _source_values(tower: str) -> dict | None:
    """config.json of a local folder or a hub repository; None where there is none to read."""
    if os.path.isdir(tower):
        path = os.path.join(tower, "config.json")
        if not os.path.isfile(path):
            raise not_there(tower, f"vision tower {tower!r}: the folder holds no config.json", ENCODER)
    elif not is_hub_id(tower):
        return None
    else:
        from transformers.utils import cached_file

        try:
            path = cached_file(tower, "config.json", _raise_exceptions_for_missing_entries=False)
        except OSError:
            return None  # offline, or no such repository: the name decides; loading will say what is missing
        if path is None:
            return None
    with open(path) as file:
        try:
            values = json.load(file)
        except ValueError as error:
            raise LlavaError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise LlavaError(f"{path}: found {type(values).__name__}, expected the config of a vision encoder")
    return values


def _by_name(name: str, keys) -> str | None:
    """The first of these registry ids that the name speaks for."""
    return next((key for key in keys if any(part.lower() in name.lower() for part in TOWERS[key].name_parts)), None)


def tower_type(cfg, tower: str) -> str:
    """Registry id for a config: `mm_vision_tower_type`, else the encoder's `model_type`, else its name; of an encoder
    of the user's own its class: a path, or the name of an installed entry point.

    Raises:
        LlavaError: nothing matches; the message lists the known ids.
    """
    kind = _plain_type(cfg, tower)
    return "clip_s2" if kind == "clip" and getattr(cfg, "s2", False) else kind


def recorded_type(cfg, tower: str) -> str:
    """What a checkpoint keeps as `mm_vision_tower_type`, so that it loads where nothing else tells: the id or class,
    with what `use_token_compression` would say where the config has it there; S2 stays with its own key."""
    explicit = getattr(cfg, "mm_vision_tower_type", None) or ""
    return _plain_type(cfg, tower) + (COMPRESSED if explicit.endswith(COMPRESSED) else "")


def _plain_type(cfg, tower: str) -> str:
    explicit = (getattr(cfg, "mm_vision_tower_type", None) or "").removesuffix(COMPRESSED)
    if tower.startswith(TIMM_PREFIX):
        if explicit not in ("", "timm"):
            raise LlavaError(f"mm_vision_tower_type: found {explicit!r} beside the vision tower {tower}, expected timm")
        return "timm"
    own = None if tower in TOWERS else class_path(tower)
    if own is not None:
        if explicit in TOWERS:
            raise LlavaError(
                f"mm_vision_tower_type: found {explicit!r} beside the vision tower {tower}, a class of its own; "
                "expected one of the two"
            )
        return tower
    if tower.endswith(".py"):
        raise LlavaError(f"vision tower {tower!r}: names a file, expected the class in it too: {tower}:CLASS")
    if explicit:
        if explicit not in TOWERS and class_path(explicit) is None:
            known = ", ".join(TOWERS)
            raise LlavaError(
                f"mm_vision_tower_type: found {explicit!r}, expected one of {known} (or with {COMPRESSED}), or a class "
                "of your own: FILE.py:Class, pkg.module:Class, an entry point of llava.towers"
            )
        kind = explicit
    else:
        stored = getattr(cfg, "mm_vision_config", None) or {}
        values = stored if stored.get("model_type") else _source_values(tower)
        model_type = None if values is None else values.get("model_type")
        if model_type is None:
            kind = _by_name(tower, TOWERS)
        else:
            by_type = (key for key, entry in TOWERS.items() if model_type in entry.model_types)
            # the last part of the name alone: what folders above it are called says nothing about the encoder
            readers = [key for key, entry in TOWERS.items() if model_type in entry.also_reads and not stored]
            kind = _by_name(os.path.basename(tower.rstrip("/")), readers) or next(by_type, None)
        if kind is None:
            if values is not None:
                from .hf_refusals import no_tower

                raise no_tower(tower, values)
            fault = not_there(tower, f"vision tower {tower!r}: no usable config.json", ENCODER)
            if not is_hub_id(tower) or os.path.isfile(tower):
                raise fault
            raise OutOfReach(
                f"{fault}; or a name that says nothing: set mm_vision_tower_type to one of {', '.join(TOWERS)}"
            )
    return kind


def build_vision_tower(vision_tower_cfg, **kwargs):
    """The vision tower that a config names.

    Args:
        vision_tower_cfg: namespace, transformers config or mapping with `mm_vision_tower` (or `vision_tower`) and the
            keys that `VisionTower` reads.
        **kwargs: `delay_load`, as `VisionTower`.
    """
    cfg = SimpleNamespace(**vision_tower_cfg) if isinstance(vision_tower_cfg, Mapping) else vision_tower_cfg
    tower = getattr(cfg, "mm_vision_tower", None) or getattr(cfg, "vision_tower", None)
    if not tower:
        raise LlavaError("mm_vision_tower: missing; expected a hub id or the folder of a vision encoder")
    inside = os.path.join(getattr(cfg, "_name_or_path", "") or "", tower)  # a folder inside the checkpoint
    tower = inside if os.path.isdir(inside) else tower
    kind = tower_type(cfg, tower)
    if kind not in TOWERS:
        from .own_tower import build_own_tower

        built = build_own_tower(tower, cfg, kind, **kwargs)
    else:
        _check_keys(cfg, tower, kind)
        tower_class = TOWERS[kind].load()
        if getattr(cfg, "s2", False) and kind not in OWN_S2:
            from .multi_scale import multi_scale

            tower_class = multi_scale(tower_class, f"{tower}, of the type {kind},")
        built = tower_class(tower, cfg, **kwargs)
    built.recorded_type = recorded_type(cfg, tower)
    return built


def _check_keys(cfg, tower: str, kind: str) -> None:
    """Refuse what is said of another kind of tower, which would go unheard."""
    for key in OWN_KEYS:
        if getattr(cfg, key, None) and not (kind == "timm" and key in TIMM_KEYS):
            raise LlavaError(
                f"{key}: found {getattr(cfg, key)!r}, which is for a class of your own in vision_tower, but {tower} is "
                f"of the type {kind}"
            )
    for key in SIZE_KEYS:
        if getattr(cfg, key, None) and not TOWERS[kind].load().sets_sizes:
            raise LlavaError(
                f"{key}: found {getattr(cfg, key)}, but {tower} is of the type {kind}, which has one size and no "
                "stages; expected none"
            )
