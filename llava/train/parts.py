"""Which parameters of the model are trained."""

import torch.nn as nn

from llava.constants import TUNABLE_PARTS
from llava.errors import LlavaError
from llava.families import get_family
from llava.model.lora import is_adapted, trains_under_lora
from llava.model.vision_blocks import block_levels
from llava.utils import rank0_print


def set_trainable(
    model: nn.Module, parts: set[str], lora_bias: str = "none", family=None, tower_blocks: int | None = None
) -> None:
    """Give gradients to the parameters of `parts` and to no others; print how many there are of each.

    Modules that have no part in the features stay frozen: an optimizer would only decay them. In a model with LoRA
    adapters the language model's part is what `trains_under_lora` says. `family` None: LLaVA. Of the vision encoder the
    last `tower_blocks` blocks learn, and what comes between them and the features; None: all of it.
    """
    family = family or get_family("llava")
    adapted, part_of = is_adapted(model), family.part_of
    counts = {part: 0 for part in TUNABLE_PARTS if any(part_of(name) == part for name, _ in model.named_parameters())}
    total = 0
    for name, parameter in model.named_parameters():
        part = part_of(name)
        whole = not adapted or part != "mm_language_model"
        parameter.requires_grad_(part in parts and (whole or trains_under_lora(name, lora_bias)))
    for module in family.unused_modules(model):
        module.requires_grad_(False)
    if tower_blocks is not None and "mm_vision_tower" in parts:
        encoder, blocks = family.vision_blocks(model)
        _freeze_before(len(blocks) - tower_blocks, encoder, blocks)
        rank0_print(f"vision tower: the last {tower_blocks} of {len(blocks)} blocks learn, the rest is frozen")
    for name, parameter in model.named_parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())
        total += size
        counts[part_of(name)] += size * parameter.requires_grad
    if not any(counts.values()):
        raise LlavaError(f"nothing to train: parts {sorted(parts)} hold no parameters of this model")
    shares = ", ".join(f"{part} {count / 1e6:.2f}M" for part, count in counts.items())
    rank0_print(f"parameters: {total / 1e6:.2f}M, trained: {shares}")


def _freeze_before(first: int, encoder: nn.Module, blocks: list[nn.Module]) -> None:
    """Freeze what an encoder has before its block `first`."""
    levels = block_levels(encoder, blocks)
    for parameter in encoder.parameters():
        if levels[id(parameter)] < first:
            parameter.requires_grad_(False)
