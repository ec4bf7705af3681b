"""The process groups of a run: how long they wait, and how they are left."""

import threading
import time
from datetime import timedelta

_LEAVING = 10.0  # seconds that a rank which has failed takes to leave its group


def limit_new_groups(seconds: int) -> None:
    """Let every process group that is made from now on, by whomever, give up after so long.

    transformers passes `ddp_timeout` on for GPUs alone, DeepSpeed and accelerate make groups without a time.
    """
    import torch

    if torch.distributed.is_available():
        from torch.distributed import distributed_c10d as c10d

        c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timedelta(seconds=seconds)


def limit_groups(seconds: int) -> None:
    """Let every process group of this process give up after so long, those that there are and new ones."""
    import torch

    limit_new_groups(seconds)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed import distributed_c10d as c10d

        for group in list(c10d._world.pg_map):
            c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def leave_process_group(error: BaseException | None = None) -> None:
    """End this process's part in a distributed run; without it the process may abort at its exit.

    error: what has failed. A rank that leaves others behind does not wait for them for long: it is told, and the
    process ends.
    """
    import torch

    from llava.errors import told
    from llava.train.launcher import end_process, tell_launcher

    # a process that ends inside its group aborts under ZeRO-2
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    gloo = torch.distributed.get_backend() == "gloo"
    if isinstance(error, Exception) and torch.distributed.get_world_size() > 1:
        leaving = threading.Thread(target=torch.distributed.destroy_process_group, daemon=True)
        leaving.start()
        leaving.join(_LEAVING)
        if leaving.is_alive():
            tell_launcher(error)
            text, status = told(error)
            end_process(status, text)
    else:
        torch.distributed.destroy_process_group()
    if gloo:  # its threads let go of the last tensors a moment late, and abort if Python is shutting down by then
        time.sleep(0.5)
