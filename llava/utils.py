"""Small helpers used everywhere; imports nothing heavy."""

import os


def is_rank0() -> bool:
    """True in the process that prints and writes: global rank 0, or a run without `torchrun`/`deepspeed`."""
    return int(os.environ.get("RANK", "0")) == 0


def rank0_print(*args, **kwargs) -> None:
    """`print` on global rank 0 only."""
    if is_rank0():
        print(*args, flush=True, **kwargs)
