"""What the processes of one run agree on; a run of one process agrees with itself."""

import os
import socket
from collections.abc import Callable
from typing import Any

from llava.errors import LlavaError
from llava.utils import is_rank0


def world_size() -> int:
    """How many processes have met; 1 before they have, too."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(value: Any) -> list[Any]:
    """The `value` of each rank, on every rank. All must call it."""
    import torch.distributed as dist

    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def of_rank0(value: Any) -> Any:
    """Rank 0's `value`, on every rank. All must call it."""
    import torch.distributed as dist

    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def together(do: Callable[[], None]) -> None:
    """Do something on every rank.

    Raises:
        LlavaError: of the first rank that has one, on every rank.
    """
    said = None
    try:
        do()
    except LlavaError as error:
        said = str(error)
    if wrong := next(filter(None, gather(said)), None):
        raise LlavaError(wrong)


def from_rank0(decide: Callable[[], Any]) -> Any:
    """What rank 0 decides, on every rank. All must call it; the others do not look themselves.

    Raises:
        LlavaError: rank 0's, on every rank.
    """
    answer = None

    def ask() -> None:
        nonlocal answer
        answer = decide() if is_rank0() or world_size() == 1 else None

    together(ask)
    return gather(answer)[0]


def check_seen_by_all(path: str, expected: str) -> None:
    """Refuse what this machine has not, but rank 0's has.

    Raises:
        LlavaError: on every rank, with the names of the machines that do not see the file.
    """
    if world_size() == 1:
        return
    lacking = gather(None if os.path.exists(path) else f"{socket.gethostname()} (rank {os.environ.get('RANK', '0')})")
    if blind := [name for name in lacking if name]:
        raise LlavaError(f"{path}: rank 0 sees it, {', '.join(blind)} not; expected {expected}")
