"""What loading weights left open: said in one line, where transformers would list what a model fills in by itself."""

import contextlib
import logging

from llava.errors import LlavaError
from llava.model.checkpoint import PROJECTOR_KEYS
from llava.utils import rank0_print

_TOWER = "model.vision_tower."
# tensors that checkpoints hold and models compute
_COMPUTED = ("rotary_emb.inv_freq", ".position_ids", ".mask_kernel", ".masked_bias", ".attn.bias")


class _Report(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()


@contextlib.contextmanager
def without_report():
    """Inside, `from_pretrained` does not list what it found missing or left over: who calls it says what is true.

    The list calls weights newly initialised that are about to be loaded: a projector's over its language model, a
    frozen vision tower's from the tower's own source.
    """
    logger, report = logging.getLogger("transformers.modeling_utils"), _Report()
    logger.addFilter(report)
    try:
        yield
    finally:
        logger.removeFilter(report)


def check_loaded(model, info: dict, source: str, with_projector: bool = False) -> list[str]:
    """Judge what transformers found when it loaded a model, whose vision tower has been seen to.

    Args:
        info: as `from_pretrained(output_loading_info=True)` gives it.
        with_projector: whether the weights must be the whole model's.

    Returns:
        Names of weights of projector, newline and token compressor that the checkpoint does not hold, sorted.

    Raises:
        LlavaError: other weights are missing.
    """
    outer = {key for key in info["missing_keys"] if any(f".{part}" in key for part in PROJECTOR_KEYS)}
    lacking = {key for key in info["missing_keys"] if not key.startswith(_TOWER)}
    check_missing(lacking if with_projector else lacking - outer, source, type(model).__name__)
    tell_unused(info["unexpected_keys"], source, model)
    return sorted(outer)


def check_shapes(mismatched, source: str) -> None:
    """Refuse weights of other shapes than the model's.

    Args:
        mismatched: (name, shape in the checkpoint, shape in the model) each, as transformers tells them.
        source: where they come from.

    Raises:
        LlavaError: names the first, with both shapes.
    """
    if mismatched:
        name, found, expected = min(mismatched)
        more = f" ({len(mismatched)} such weights)" if len(mismatched) > 1 else ""
        raise LlavaError(
            f"{source}: {name} is {tuple(found)}, expected {tuple(expected)} by its config{more}: the config is not of "
            "these weights"
        )


def check_missing(missing, source: str, model: str) -> None:
    """Refuse a model of which weights would be random.

    Raises:
        LlavaError: names some.
    """
    if missing := sorted(missing):
        raise LlavaError(
            f"{source}: the checkpoint lacks {len(missing)} weights of {model}, "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )


def tell_unused(unexpected, source: str, model) -> None:
    """Say in one line what a checkpoint holds that the model has no place for.

    What a model computes by itself is not told, nor are parts of a vision encoder behind the features that are used.

    Raises:
        LlavaError: the rest of a projector, of which the model has the first part alone.
    """
    names = sorted(name for name in unexpected if not name.startswith(_TOWER) and not name.endswith(_COMPUTED))
    projector = [name for name in names if ".mm_projector." in name]
    if projector and any(".mm_projector." in name for name, _ in model.named_parameters()):
        raise LlavaError(
            f"{source}: {projector[0]} has no place in the projector that the config asks for, expected an "
            "mm_projector_type of these weights"
        )
    if names:
        rank0_print(
            f"note: {source}: {len(names)} of its weights are not used, the model has no place for them: "
            f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        )
