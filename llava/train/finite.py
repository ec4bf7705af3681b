"""Whether numbers are finite: those of a batch, and a model's weights wherever a rank holds them."""

from collections.abc import Iterator
from typing import Any

import torch

from llava.train.ranks import gather


def largest(tensors: list[torch.Tensor]) -> torch.Tensor | None:
    """The largest absolute value in some tensors: NaN or infinite where one of them is; None where there is no value.

    One pass over them in a few kernels, which no host waits for.
    """
    tensors = [tensor.detach() for tensor in tensors if tensor.numel()]
    return torch.nn.utils.get_total_norm(tensors, float("inf")) if tensors else None


def floats_in(value: Any) -> list[torch.Tensor]:
    """The tensors of floating-point numbers in what a batch holds."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in floats_in(item)]


def nonfinite_weights(model: torch.nn.Module) -> list[str]:
    """Names of the weights with a value that is not finite, trained or frozen, on any rank; every rank must call it.

    Under ZeRO-3 each rank looks at its own part. Of buffers that are saved, only NaN counts: minus infinity may stand
    in a mask.
    """
    weights = [(name, part) for name, weight in model.named_parameters() for part in _held(weight)]
    value = largest([part for _, part in weights])
    found = set()
    if value is not None and not value.isfinite():
        found = {name for name, part in weights if not part.isfinite().all()}
    found |= {name for name, buffer in _saved_buffers(model) if buffer.isnan().any()}
    return sorted(set().union(*gather(found)))


def _held(weight: torch.nn.Parameter) -> list[torch.Tensor]:
    """What this rank holds of a weight; nothing of one in 8 or 4 bits, or of one that ZeRO keeps on a disk."""
    parts = [getattr(weight, "to_local", weight.detach)()]  # of FSDP's, its part; what ZeRO-3 has parted is empty
    if (own := getattr(weight, "ds_tensor", None)) is not None:
        rank = torch.distributed.get_rank(weight.ds_process_group)
        # the last parts are filled up with anything
        real = min(own.ds_numel, max(weight.ds_numel - rank * own.ds_numel, 0))
        parts.append(own.detach().flatten()[:real] if own.numel() == own.ds_numel else own.new_empty(0))
    return [part.detach() for part in parts if part.is_floating_point() and part.element_size() > 1 and part.numel()]


def _saved_buffers(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(path, recurse=False):
            saved = name.removeprefix(f"{path}.") not in module._non_persistent_buffers_set
            if saved and buffer.is_floating_point() and buffer.element_size() > 1:
                yield name, buffer
