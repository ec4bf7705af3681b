"""Small helpers used everywhere; imports nothing heavy."""

import os


def is_rank0() -> bool:
    """True in the process that prints and writes: global rank 0, or a run without `torchrun`/`deepspeed`."""
    return int(os.environ.get("RANK", "0")) == 0


def rank0_print(*args, **kwargs) -> None:
    """`print` on global rank 0 only."""
    if is_rank0():
        print(*args, flush=True, **kwargs)


def get_model_name_from_path(model_path):
    """Last part of a path; `run_checkpoint-N` for a checkpoint folder inside a run."""
    parts = model_path.strip("/").split("/")
    return f"{parts[-2]}_{parts[-1]}" if parts[-1].startswith("checkpoint-") and len(parts) > 1 else parts[-1]
