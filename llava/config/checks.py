"""Faults that types do not show: parts that do not exist here, and values that contradict each other."""

import ast
import re
from typing import Any

from llava.config.keys import PATCH_KEYS
from llava.config.own_tower import check_image
from llava.config.patch_choice import MEMBERS, THRESHOLDS, PatchChoice
from llava.config.reporting import report_names
from llava.config.schema import Key
from llava.constants import TUNABLE_PARTS
from llava.errors import LlavaError


def check_value(key: Key, value: Any, where: str) -> None:
    """Raise `LlavaError` if `value` asks for a part that does not exist here, or is malformed."""
    if key.only_default and value != key.default:
        raise LlavaError(
            f"{where}: {key.name} is {value!r}, but {key.only_default} is not available in this version;"
            f" expected {key.default!r} or nothing"
        )
    if isinstance(value, str) and value in key.refuse:
        raise LlavaError(f"{where}: {key.name} is {value!r}, but {key.refuse[value]} is not available in this version")
    if key.name == "mm_tunable_parts" and value is not None:
        _check_parts(value, where)
    if key.name == "adaptive_patches":
        PatchChoice.from_mapping(value, f"{where}: adaptive_patches")
    if key.name == "vision_tower_image":
        check_image(value, f"{where}: vision_tower_image")
    if key.name == "image_grid_pinpoints" and value is not None:
        _check_pinpoints(value, where)


def _check_parts(value: str, where: str) -> None:
    for part in filter(None, (part.strip() for part in value.split(","))):
        if part == "mm_vision_resampler":
            raise LlavaError(f"{where}: mm_tunable_parts names {part}, which is not available in this version")
        if part not in TUNABLE_PARTS:
            raise LlavaError(f"{where}: mm_tunable_parts names {part!r}, expected some of {', '.join(TUNABLE_PARTS)}")


def _check_pinpoints(value: str | list, where: str) -> None:
    """Either "(1x1),...,(6x6)" or pairs of whole numbers, as a list or as LLaVA-NeXT writes it in text."""
    if isinstance(value, str):
        if re.search(r"\(\d+x\d+\)", value):
            return
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            value = None
    pairs = isinstance(value, (list, tuple)) and len(value) > 0
    if not pairs or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(side) is int and side > 0 for side in pair)
        for pair in value
    ):
        raise LlavaError(
            f'{where}: image_grid_pinpoints is no grid, expected [[width, height], ...] or "(1x1),...,(6x6)"'
        )


def check_run(run) -> None:
    """Raise `LlavaError` for settings that contradict each other."""
    if "freeze_mm_vision_resampler" in run.settings and run["freeze_mm_vision_resampler"]:
        run.notices.append("freeze_mm_vision_resampler has nothing to freeze: there is no resampler")
    if run["fp16"] and run["bf16"]:
        raise LlavaError(
            f"fp16 ({run.source('fp16')}) and bf16 ({run.source('bf16')}) are both on, expected one of them"
        )
    factor, kind = run["rope_scaling_factor"], run["rope_scaling_type"]
    if (factor is None) != (kind is None):
        raise LlavaError("rope_scaling_factor and rope_scaling_type are only used together, expected both or neither")
    _check_patches(run)
    _check_numbers(run)
    if run["label_smoothing_factor"]:
        raise LlavaError(
            f"{run.source('label_smoothing_factor')}: label_smoothing_factor is {run['label_smoothing_factor']}, "
            "expected 0: the loss of supervised tokens has no smoothing"
        )


def _check_numbers(run) -> None:
    """Numbers that are right by themselves, and not together."""
    if run["num_train_epochs"] == 0 and run["max_steps"] == -1:
        raise LlavaError(together(run, "num_train_epochs", "max_steps", "one of them positive"))
    if run["bits"] != 16 and not run["lora_enable"]:
        raise LlavaError(
            together(run, "bits", "lora_enable", "lora_enable too: adapters are trained over a quantised model")
        )
    if run["use_token_compression"] and run["compression_output_size"] > run["compression_input_size"]:
        raise LlavaError(
            together(run, "compression_output_size", "compression_input_size", "the output not above the input")
        )
    both_given = all(run.source(name) != "default" for name in ("min_pixels", "max_pixels"))
    if run["min_pixels"] > run["max_pixels"] and (both_given or run["image_aspect_ratio"] == "native"):
        raise LlavaError(together(run, "min_pixels", "max_pixels", "min_pixels not above max_pixels"))
    if run["dataloader_num_workers"] == 0:
        for name in (
            "dataloader_prefetch_factor",
            "dataloader_persistent_workers",
            "dataloader_multiprocessing_context",
        ):
            if run[name]:
                raise LlavaError(together(run, name, "dataloader_num_workers", "workers, or none of what is for them"))
    reports = run["report_to"]
    if isinstance(reports, list) and len(reports) > 1 and len(report_names(reports)) < len(reports):
        raise LlavaError(f"{run.source('report_to')}: report_to is {reports}, expected none or all alone")


def together(run, name: str, other: str, expected: str) -> str:
    """A message about two keys, led by one that was given."""
    if run.source(name) == "default":
        name, other = other, name
    said = f"{run.source(name)}: {name} is {run[name]} with {other} {run[other]}"
    return f"{said} ({run.source(other)}), expected {expected}"


def _check_patches(run) -> None:
    """The choice of patches from all layers together, and what it does not go together with."""
    members = run["adaptive_patches"]
    if any(run[name] is not None for name in PATCH_KEYS):  # the model's own image processor has the others
        own = {"method": "v1" if "thresholds" in members else "v2", "importance": "entropy"}
        PatchChoice.completed(members, own | {"alpha": 1.0, "thresholds": THRESHOLDS}, patch_names(run))
        return
    PatchChoice.from_mapping(members, f"{run.source('adaptive_patches')}: adaptive_patches")


def patch_names(run) -> dict[str, str]:
    """What messages call the members of `adaptive_patches`: as the run gives them, with where it does."""
    if all(run[name] is None for name in PATCH_KEYS):
        return {member: f"{run.source('adaptive_patches')}: adaptive_patches: {member}" for member in MEMBERS}
    return {m: name if run[name] is None else f"{run.source(name)}: {name}" for name, m in PATCH_KEYS.items()}
