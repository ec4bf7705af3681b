"""Numbers that all ranks need to have alike: under ZeRO-3 each must call every module as often as the others do."""

import torch


def is_partitioned(model) -> bool:
    """Whether ZeRO-3 has split the weights over the ranks, which must all call each module then."""
    return hasattr(next(model.parameters()), "ds_id")


def most_over_ranks(number: int, model, device) -> int:
    """The largest of the ranks' numbers where ZeRO-3 has split the model, else `number` itself.

    A collective then, for which the host waits: every rank must call it.
    """
    if not is_partitioned(model) or not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return number
    most = torch.tensor(number, device=device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)
