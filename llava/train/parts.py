"""Which parameters of the model are trained."""

import torch.nn as nn

from llava.constants import TUNABLE_PARTS
from llava.errors import LlavaError
from llava.families import get_family
from llava.model.lora import is_adapted, trains_under_lora
from llava.utils import rank0_print


def set_trainable(model: nn.Module, parts: set[str], lora_bias: str = "none", family=None) -> None:
    """Give gradients to the parameters of `parts` and to no others; print how many there are of each.

    Modules that have no part in the features stay frozen: an optimizer would only decay them. In a model with LoRA
    adapters the language model's part is what `trains_under_lora` says. `family` None: LLaVA.
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
    for name, parameter in model.named_parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())
        total += size
        counts[part_of(name)] += size * parameter.requires_grad
    if not any(counts.values()):
        raise LlavaError(f"nothing to train: parts {sorted(parts)} hold no parameters of this model")
    shares = ", ".join(f"{part} {count / 1e6:.2f}M" for part, count in counts.items())
    rank0_print(f"parameters: {total / 1e6:.2f}M, trained: {shares}")
