"""Which parts of the model are trained, and at which learning rate."""

import torch.nn as nn

from llava.constants import TUNABLE_PARTS
from llava.errors import LlavaError
from llava.model.lora import is_adapted, trains_under_lora
from llava.model.multimodal_encoder.builder import uses_compression
from llava.utils import rank0_print


def part_of(name: str) -> str:
    """The part that a parameter belongs to, of a LLaVA model or of Qwen2-VL, whose projector is `visual.merger`.

    The newline token goes with the language model, as in LLaVA-NeXT.
    """
    if "token_compressor." in name:
        return "mm_token_compressor"
    if "vision_tower." in name:
        return "mm_vision_tower"
    if "visual." in name:
        return "mm_mlp_adapter" if "visual.merger." in name else "mm_vision_tower"
    return "mm_mlp_adapter" if "mm_projector." in name else "mm_language_model"


def tunable_parts(model_args, training_args) -> set[str]:
    """Parts to train: `mm_tunable_parts`, else LLaVA's older flags.

    Without `mm_tunable_parts` everything but the vision tower is trained; `tune_mm_mlp_adapter` leaves only the
    projector; `freeze_mm_mlp_adapter`, `freeze_backbone`, `unfreeze_language_model` and `unfreeze_mm_vision_tower` say
    what their names say. A token compressor is trained wherever the projector is, unless `freeze_mm_token_compressor`.
    """
    parts = _tunable_parts(model_args, training_args)
    if "mm_mlp_adapter" in parts and uses_compression(model_args):
        parts.add("mm_token_compressor")
    if model_args.freeze_mm_token_compressor:
        parts.discard("mm_token_compressor")
    return parts


def _tunable_parts(model_args, training_args) -> set[str]:
    if model_args.mm_tunable_parts is not None:
        parts = {part.strip() for part in model_args.mm_tunable_parts.split(",") if part.strip()}
        unknown = parts - set(TUNABLE_PARTS)
        if unknown or not parts:
            raise LlavaError(
                f"mm_tunable_parts: found {model_args.mm_tunable_parts!r}, expected some of {', '.join(TUNABLE_PARTS)}"
            )
        return parts
    parts = {"mm_mlp_adapter"}
    frozen = model_args.tune_mm_mlp_adapter or model_args.freeze_backbone
    if model_args.unfreeze_language_model or not frozen:
        parts.add("mm_language_model")
    if model_args.unfreeze_mm_vision_tower:
        parts.add("mm_vision_tower")
    if training_args.freeze_mm_mlp_adapter:
        parts.discard("mm_mlp_adapter")
    return parts


def set_trainable(model: nn.Module, parts: set[str], lora_bias: str = "none") -> None:
    """Give gradients to the parameters of `parts` and to no others; print how many there are of each.

    The tower's modules that have no part in its features stay frozen: an optimizer would only decay them. In a model
    with LoRA adapters the language model's part is what `trains_under_lora` says.
    """
    adapted = is_adapted(model)
    counts = {part: 0 for part in TUNABLE_PARTS if any(part_of(name) == part for name, _ in model.named_parameters())}
    total = 0
    for name, parameter in model.named_parameters():
        part = part_of(name)
        whole = not adapted or part != "mm_language_model"
        parameter.requires_grad_(part in parts and (whole or trains_under_lora(name, lora_bias)))
    tower = model.get_vision_tower() if hasattr(model, "get_vision_tower") else None
    for module in tower.unused_modules() if tower is not None else ():
        module.requires_grad_(False)
    for name, parameter in model.named_parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())
        total += size
        counts[part_of(name)] += size * parameter.requires_grad
    if not any(counts.values()):
        raise LlavaError(f"nothing to train: parts {sorted(parts)} hold no parameters of this model")
    shares = ", ".join(f"{part} {count / 1e6:.2f}M" for part, count in counts.items())
    rank0_print(f"parameters: {total / 1e6:.2f}M, trained: {shares}")


def split_by_learning_rate(optimizer, model: nn.Module, rates: dict[str, float | None]) -> None:
    """Split an optimizer's groups so that parts with a rate of their own have it.

    Args:
        optimizer: freshly made, groups still have the run's learning rate.
        model: owner of the parameters.
        rates: part -> learning rate, or None for the run's.
    """
    part = {id(parameter): part_of(name) for name, parameter in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        by_rate: dict[float, list] = {}
        for parameter in group["params"]:
            rate = rates.get(part[id(parameter)])
            by_rate.setdefault(group["lr"] if rate is None else rate, []).append(parameter)
        groups += [{**group, "params": params, "lr": rate} for rate, params in by_rate.items()]
    optimizer.param_groups = groups


def is_adapter_only(parts: set[str]) -> bool:
    """True for LLaVA's stage 1, which trains and keeps the projector alone, and a token compressor with it."""
    return bool(parts) and parts <= {"mm_mlp_adapter", "mm_token_compressor"}
