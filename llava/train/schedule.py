"""The learning rates of a run that goes on: this run's schedule at the checkpoint's step, whatever state there is."""

import glob
import os

from llava.errors import LlavaError

OPTIMIZER_NAMES, SCHEDULER_NAME = ("optimizer.pt", "optimizer.bin"), "scheduler.pt"
# rates that follow from what has been measured, and not from the step
MEASURED = ("reduce_lr_on_plateau", "greedy")


def has_optimizer(checkpoint: str) -> bool:
    """Whether a checkpoint holds an optimizer's state, of any kind of run."""
    kinds = (*OPTIMIZER_NAMES, "optimizer_*", "global_step*")
    return any(glob.glob(os.path.join(glob.escape(checkpoint), kind)) for kind in kinds)


def optimizer_file(checkpoint: str) -> str | None:
    """The optimizer's state of a run without DeepSpeed or FSDP."""
    paths = (os.path.join(checkpoint, name) for name in OPTIMIZER_NAMES)
    return next(filter(os.path.isfile, paths), None)


def has_scheduler(checkpoint: str) -> bool:
    return os.path.isfile(os.path.join(checkpoint, SCHEDULER_NAME))


def check_state(checkpoint: str, training_args) -> None:
    """Refuse to go on from a checkpoint whose state (save_only_model writes none) a run of this kind needs.

    Raises:
        LlavaError: it lacks DeepSpeed's or FSDP's state, or that of a schedule that does not follow from the step.
    """
    args, lacking = training_args, None
    kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if args.deepspeed and not (
        glob.glob(os.path.join(glob.escape(checkpoint), "global_step*")) or optimizer_file(checkpoint)
    ):
        lacking = "DeepSpeed's state (global_stepN), without which a run under DeepSpeed cannot go on"
    elif args.fsdp and not (has_optimizer(checkpoint) and has_scheduler(checkpoint)):
        lacking = "the optimizer's and the schedule's state, without which a run under FSDP cannot go on"
    elif kind in MEASURED and not ((args.deepspeed or optimizer_file(checkpoint)) and has_scheduler(checkpoint)):
        lacking = f"the optimizer's and the schedule's state, from which lr_scheduler_type {kind} goes on"
    if lacking:
        raise LlavaError(
            f"{checkpoint}: holds no {lacking}; expected a checkpoint written without save_only_model, another "
            "output_dir for a run that starts from its weights, or --overwrite_output_dir to train anew"
        )


def unwrapped(scheduler):
    """A schedule without accelerate's wrapper, which it has where DeepSpeed's engine holds it."""
    return getattr(scheduler, "scheduler", scheduler)


def go_on(schedule, rates: list[float] | None, step: int) -> None:
    """Put a schedule, and with it the optimizer's learning rates, to a step.

    A schedule that follows from the step gets this run's rates: a run may go on for more steps than it was made for, or
    with other rates, where those in the checkpoint are of the old schedule, 0 at its end.

    Args:
        schedule: of the run, unwrapped.
        rates: of each of the optimizer's groups, the rate that the schedule's factors are of.
        step: how many the schedule has taken.
    """
    from torch.optim.lr_scheduler import LambdaLR

    if isinstance(schedule, LambdaLR):
        at = {"base_lrs": rates, "last_epoch": step - 1, "_step_count": step + 1}  # of 1, torch warns: nothing trained
        schedule.load_state_dict({**schedule.state_dict(), **at})
        schedule.step()
    elif hasattr(schedule, "last_batch_iteration"):  # DeepSpeed's own
        schedule.step(schedule.last_batch_iteration)
