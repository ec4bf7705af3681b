"""What a run's settings and the configs of its models show to be wrong, whatever the family; no weight is read."""

import os
from functools import partial
from types import SimpleNamespace

from llava.config.schema import own_keys
from llava.constants import TUNABLE_PARTS
from llava.errors import LlavaError
from llava.families.training import check_attention, check_no_adapter, check_segments, tunable_parts

TOWER_PART = ("mm_vision_tower_trainable_blocks", "mm_vision_tower_layer_decay")


def check_common(run) -> None:
    """What every family asks of a resolved run.

    Raises:
        LlavaError: as it says.
    """
    check_attention(run["attn_implementation"])
    if run["pack_sequences"]:
        check_segments(run["attn_implementation"])
    check_no_adapter(run["model_name_or_path"])
    check_lora(run["lora_enable"], trained_parts(run))
    check_tower_part(run)
    path = run["lora_weight_path"]
    if run["lora_enable"] and path and not os.path.isfile(os.path.join(path, "adapter_config.json")):
        said = f"{run.source('lora_weight_path')}: lora_weight_path {path}: found no adapter_config.json"
        raise LlavaError(said if os.path.isdir(path) else f"{said}: no such folder")


def check_packs(run, config: dict) -> None:
    """Refuse to pack rows for a language model that would carry something over from one sample of a row to the next.

    Args:
        config: the model's, as its file has it.
    """
    text = config.get("text_config") or config
    others = set(text.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    if run["pack_sequences"] and others:
        raise LlavaError(
            f"{run.source('pack_sequences')}: pack_sequences is on, but {run['model_name_or_path']} has layers of "
            f"{', '.join(sorted(others))}, which do not tell a packed row's samples apart; expected it off"
        )


def trained_parts(run) -> set[str]:
    """The parts that a resolved run trains."""
    args = arguments(run)
    return tunable_parts(args, args)


def arguments(run) -> SimpleNamespace:
    """A resolved run's own keys as attributes."""
    return SimpleNamespace(**{name: run[name] for name in run.settings})


def check_tower_part(run, blocks: int | None = None) -> None:
    """Whether the part of the vision tower that is to learn, and its layer-wise decay, fit the run.

    Args:
        blocks: of the encoder, those that the features come through; None: not known yet.
    """
    for name in filter(partial(_given, run), TOWER_PART):
        where, parts = f"{run.source(name)}: {name} is {run[name]}", trained_parts(run)
        if "mm_vision_tower" not in parts:
            listed = ", ".join(part for part in TUNABLE_PARTS if part in parts)
            raise LlavaError(f"{where}, but the vision tower is frozen (trained: {listed}); expected it trained too")
        if blocks == 0:
            raise LlavaError(f"{where}, but the vision tower has no blocks that can be told apart; expected no {name}")
    most = run["mm_vision_tower_trainable_blocks"]
    if blocks and most is not None and most > blocks:
        raise LlavaError(
            f"{run.source('mm_vision_tower_trainable_blocks')}: mm_vision_tower_trainable_blocks is {most}, expected "
            f"at most {blocks}, the blocks of the vision tower that the features come through"
        )


def tells_tower_part(run) -> bool:
    """Whether the run says what part of its vision tower learns, or decays its learning rate."""
    return any(_given(run, name) for name in TOWER_PART)


def _given(run, name: str) -> bool:
    return run[name] != own_keys()[name].default


def check_lora(enabled: bool, parts: set[str]) -> None:
    """Refuse LoRA in a run that leaves the language model as it is."""
    if enabled and "mm_language_model" not in parts:
        raise LlavaError(
            f"lora_enable: adapters go into the language model, but {', '.join(sorted(parts))} alone is to be trained; "
            "expected mm_language_model among mm_tunable_parts, or no lora_enable"
        )


def check_parts(parts: set[str], there: set[str]) -> None:
    """Refuse a run that trains nothing of the parts that its model has."""
    if not parts & there:
        listed = ", ".join(part for part in TUNABLE_PARTS if part in there)
        raise LlavaError(f"nothing to train: found {', '.join(sorted(parts)) or 'no part'}, expected some of {listed}")
