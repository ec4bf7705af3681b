"""What a checkpoint's config asks for: parts that do not exist here are refused wherever the checkpoint is used."""

from collections.abc import Mapping
from typing import Any

from llava.config.checks import check_value
from llava.config.keys import REFUSED_IN_CHECKPOINTS
from llava.config.schema import convert_type, own_keys
from llava.errors import LlavaError

_NOTHING = (None, False, 0, "", "none", "null")
_POOLED = ("average", "max")  # as frames of videos are pooled, by two


def check_asked_parts(values: Mapping[str, Any], where: str) -> None:
    """Refuse the config of a checkpoint with vision that asks for a part, or a way, that does not exist here.

    Args:
        values: as config.json has them, or as they were changed for this use.
        where: what the message begins with.

    A leftover of a part that is switched off (`mm_resampler_type: null` beside `mm_perceiver_depth: 3`) is none. Nor is
    LLaVA-NeXT-Video's `spatial_pool` by two: LLaVA-NeXT builds that resampler, which has no weights, and never calls
    it, but pools the frames of videos by `mm_spatial_pool_mode`, as is done here.

    Raises:
        LlavaError: the first such key.
    """
    for name in REFUSED_IN_CHECKPOINTS:
        value = values.get(name)
        if value not in _NOTHING and not (name == "mm_resampler_type" and _only_pools(values)):
            raise _absent(where, name, value, own_keys()[name].only_default, own_keys()[name].default)
    for name, value in values.items():
        named = "resampler" in name and name.startswith(("mm_", "vision_")) and not name.endswith("_lr")
        if named and name not in REFUSED_IN_CHECKPOINTS and value not in _NOTHING and not _only_pools(values):
            raise _absent(where, name, value, "the vision resampler", None)
    for name, key in own_keys().items():
        stored = key.checkpoint if isinstance(key.checkpoint, str) else name
        if key.checkpoint and not key.only_default and values.get(stored) is not None:
            check_value(key, convert_type(key, values[stored], where), where)


def _only_pools(values: Mapping[str, Any]) -> bool:
    pooling = values.get("mm_resampler_type"), values.get("mm_spatial_pool_mode"), values.get("mm_spatial_pool_stride")
    return pooling[0] == "spatial_pool" and pooling[1] in _POOLED and pooling[2] == 2


def _absent(where: str, name: str, value, part: str, default) -> LlavaError:
    return LlavaError(
        f"{where}: {name} is {value!r}, but {part} is not available in this version; expected {default!r} or nothing, "
        f"in config.json or by overwrite_config={{{name!r}: {default!r}}}, which loads it without that part"
    )
