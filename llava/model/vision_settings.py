"""What a config says about the vision side as a whole, without weights; imports neither torch nor towers."""

import re

from llava.config.asked_parts import check_asked_parts
from llava.config.patch_choice import PatchChoice
from llava.errors import LlavaError

COMPRESSED = "+toconv"  # behind a tower's registry id: the same as use_token_compression


def uses_compression(cfg) -> bool:
    """Whether a config or a run's arguments ask for a token compressor."""
    named = (getattr(cfg, "mm_vision_tower_type", None) or "").endswith(COMPRESSED)
    return named or bool(getattr(cfg, "use_token_compression", False))


def check_parts(cfg) -> None:
    """Refuse what the config of a model with vision asks for and does not exist here, or does not go together.

    Args:
        cfg: the model's config of transformers.

    Raises:
        LlavaError: names the key, what it is and what is expected.
    """
    # what is no attribute of the class is what config.json says
    folder = getattr(cfg, "_name_or_path", None) or type(cfg).__name__
    check_asked_parts(vars(cfg), f"{folder}: config.json")
    check_merge_options(
        getattr(cfg, "mm_patch_merge_type", None) or "flat", getattr(cfg, "image_aspect_ratio", None) or "square"
    )
    check_combination(cfg)


def check_combination(cfg) -> None:
    """Refuse what adaptive patches do not go together with in a model's config or a run's arguments."""
    if PatchChoice.from_mapping(getattr(cfg, "adaptive_patches", None)) is None:
        return
    aspect_ratio = getattr(cfg, "image_aspect_ratio", None) or "square"
    if "anyres" in aspect_ratio:
        raise LlavaError(
            f"adaptive_patches: found image_aspect_ratio {aspect_ratio!r}, expected square, pad or native: crops that "
            "keep unlike numbers of tokens cannot be put together into one map"
        )
    projector = getattr(cfg, "mm_projector_type", None) or "linear"
    if projector in ("pooler", "patch_merger"):
        raise LlavaError(
            f"adaptive_patches: found mm_projector_type {projector!r}, expected spatial_merge or one that takes each "
            "token by itself: kept patches form no grid"
        )
    if uses_compression(cfg):
        raise LlavaError("adaptive_patches: found use_token_compression, expected one of the two")


def check_merge_options(merge_type: str, aspect_ratio: str):
    """Refuse what LLaVA-NeXT would silently take for something else: its code looks for parts of these words."""
    first, *more = merge_type.split("_")
    known = first == "spatial" and set(more) <= {"unpad", "nobase", "maxpool2x2"}
    if merge_type != "flat" and not known:
        raise LlavaError(
            f"mm_patch_merge_type: found {merge_type!r}, expected flat or spatial with _unpad, _nobase, _maxpool2x2"
        )
    if not re.fullmatch(r"square|pad|native|anyres(_max_[1-9]\d*)?", aspect_ratio):
        raise LlavaError(
            f"image_aspect_ratio: found {aspect_ratio!r}, expected square, pad, native, anyres or anyres_max_N"
        )
