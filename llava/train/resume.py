"""Where a run begins: anew, at a checkpoint, or nowhere, as it has ended before. Reads what lies in `output_dir`."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from llava.errors import LlavaError
from llava.train.checkpoints import STATE_NAME, checkpoints_of, fault, newest_whole, steps_of
from llava.train.run_state import read_state
from llava.utils import rank0_print

RUN_NAME = "run_config.json"


def open_output(training_args, count_records: Callable[[], int]) -> bool:
    """Whether there is something to train in the run's folder: False where as many steps have been trained before.

    Args:
        training_args: the run's `TrainingArguments`.
        count_records: how many records the run has; asked of runs that are counted in epochs.

    Raises:
        LlavaError: more steps are asked for, and there is no checkpoint to go on from.
    """
    out = training_args.output_dir
    if training_args.overwrite_output_dir:
        return True
    done = finished_steps(out)
    if done is None:
        return True
    asked = steps_asked_of_finished(training_args, count_records)
    if asked is None:
        rank0_print(f"{out}: already trained ({done} steps); --overwrite_output_dir trains again")
        return False
    if checkpoint_to_resume(training_args.resume_from_checkpoint, out) is None:
        raise LlavaError(
            f"output_dir: {out} was trained for {done} steps, {asked} are asked for, and there is no checkpoint to go "
            f"on from; expected --overwrite_output_dir to train all of them anew, or {out} as "
            f"{_start_key(out)} of a run with another output_dir"
        )
    rank0_print(f"{out}: was trained for {done} steps, {asked} are asked for: the run goes on")
    return True


def remove_run(out: str) -> None:
    """Remove an earlier run's state and checkpoints from its folder, and nothing else."""
    folder = Path(out)
    for name in (STATE_NAME, "bad_batches.jsonl"):
        (folder / name).unlink(missing_ok=True)
    for checkpoint in checkpoints_of(out):
        if (checkpoint / STATE_NAME).is_file():
            shutil.rmtree(checkpoint)


def reopen(training_args, run_state, checkpoint: str | None) -> None:
    """Make the run's folder ready for its first step: without an earlier run that it overwrites, or, where one goes on,
    finished no more. Every rank must have passed `open_output`; what is refused until then costs no earlier run."""
    step = 0 if checkpoint is None else (steps_of(Path(checkpoint)) or 0)
    if training_args.should_save:
        if training_args.overwrite_output_dir:
            remove_run(training_args.output_dir)
        else:
            (Path(training_args.output_dir) / STATE_NAME).unlink(missing_ok=True)
    run_state.tell("running", step)


def checkpoint_to_begin_at(training_args) -> str | None:
    """`checkpoint_to_resume` of a run, which takes none of an earlier run that it overwrites.

    Raises:
        LlavaError: there is no such checkpoint, or it would be removed.
    """
    asked, out = training_args.resume_from_checkpoint, training_args.output_dir
    if not training_args.overwrite_output_dir:
        return checkpoint_to_resume(asked, out, training_args.verify_checkpoints)
    if asked is None or asked.lower() in ("true", "false"):
        return None
    if Path(out).resolve() in Path(asked).resolve().parents:
        raise LlavaError(
            f"resume_from_checkpoint: {asked} is in {out}, which overwrite_output_dir empties; expected one of them"
        )
    return checkpoint_to_resume(asked, out, training_args.verify_checkpoints)


def checkpoint_to_resume(asked: str | None, out: str, how: str = "full") -> str | None:
    """The checkpoint a run goes on from: the one `asked` for, else the last in `out` that is whole.

    Args:
        asked: a folder, "true" (the last one, as None) or "false" (none).
        out: the run's folder.
        how: how thoroughly it is looked at, "full" or "sizes" (see `llava.train.checkpoints`).

    Raises:
        LlavaError: the one asked for is none, or is not whole.
    """
    if asked is not None and asked.lower() not in ("true", "false"):
        if not os.path.isfile(os.path.join(asked, STATE_NAME)):
            raise LlavaError(
                f"resume_from_checkpoint: {asked}: found no trainer_state.json, expected a run's checkpoint-N folder"
            )
        if wrong := fault(asked, how):
            raise LlavaError(f"resume_from_checkpoint: {asked}: {wrong}; expected a checkpoint that is whole")
        return asked
    if asked is not None and asked.lower() == "false":
        return None
    return newest_whole(out, how)


def check_own(checkpoint: str, out: str) -> None:
    """DeepSpeed's state is a pickle, which runs code when it is read: only this run's own folder is trusted."""
    if Path(out).resolve() not in Path(checkpoint).resolve().parents:
        raise LlavaError(
            f"resume_from_checkpoint: {checkpoint} is not in output_dir {out}, expected one of the run's own "
            "checkpoints: DeepSpeed's state is unpickled; to go on from a model use model_name_or_path"
        )


# --- how much is trained, and how much is asked for -------------------------------------------------------------------


def finished_steps(out: str) -> int | None:
    """Steps of a run that has ended in this folder, else None.

    Its `run_state.json` says so, beside which its `trainer_state.json` must be there; in folders of earlier versions
    that one alone says it. A finished run whose file was damaged since is made whole from its last checkpoint, if it
    has one.

    Raises:
        LlavaError: an earlier version's folder of which it cannot be told, and that has a model to lose.
    """
    told, path = read_state(out), os.path.join(out, STATE_NAME)
    if (told is not None and told["state"] != "finished") or not os.path.isfile(path):
        return None
    try:
        if isinstance(steps := read_json(out, STATE_NAME).get("global_step"), int):
            return steps
        wrong = f"{path}: found no global_step"
    except LlavaError as error:
        wrong = str(error)
    folders = checkpoints_of(out)
    if told is not None and isinstance(told.get("step"), int) and not folders:
        return told["step"]
    if not folders and any(Path(out).glob("*.safetensors")):
        raise LlavaError(
            f"{wrong}; whether the run has ended cannot be told, and there is no checkpoint; expected "
            f"--overwrite_output_dir to train anew, or {out} as {_start_key(out)} of a run with another output_dir"
        )
    rank0_print(f"{wrong}; the run is taken as one that has not ended")
    return None


def steps_asked(training_args, records: int, batch_size: int | None = None) -> int:
    """Optimizer steps of a whole run, as transformers' `Trainer` counts them.

    Args:
        training_args: the run's `TrainingArguments`.
        records: how many the run has.
        batch_size: of one rank, in place of the arguments'.
    """
    args = training_args
    if args.max_steps > 0:
        return args.max_steps
    batches = batches_per_rank(args, records, batch_size)
    return math.ceil(args.num_train_epochs * max(math.ceil(batches / args.gradient_accumulation_steps), 1))


def batches_per_rank(training_args, records: int, batch_size: int | None = None, world_size: int | None = None) -> int:
    """Micro-batches that each rank gets of so many records, as accelerate deals them out; a size in place of the
    arguments' where it is given."""
    args = training_args
    part = math.floor if args.dataloader_drop_last else math.ceil
    run = getattr(args, "run_config", None)
    if run is not None and run["pack_sequences"]:  # a step's rows, whatever the last one holds
        accumulated = args.gradient_accumulation_steps
        samples = (batch_size or args.train_batch_size) * accumulated * (world_size or args.world_size)
        return part(records / samples) * accumulated
    batches = part(records / (batch_size or args.train_batch_size))
    if not args.accelerator_config.split_batches:  # each rank gets batches of its own
        batches = part(batches / (world_size or args.world_size))
    return batches


def steps_asked_of_finished(training_args, count_records: Callable[[], int]) -> int | None:
    """`steps_asked`, where that is more than the run that has ended in `output_dir` has trained; else None."""
    args, out = training_args, training_args.output_dir
    done = finished_steps(out)
    if args.max_steps > 0:
        return args.max_steps if args.max_steps > done else None
    state = _final_state(out)
    epochs = state.get("epoch") or 0.0
    again = args.num_train_epochs <= epochs + 1e-6  # of the data as they were
    try:
        records = count_records()
    except LlavaError:
        if again:  # the data have gone, and are not needed
            return None
        raise
    asked = steps_asked(args, records, state.get("train_batch_size") if args.auto_find_batch_size else None)
    before = (read_json(out, RUN_NAME) or {}).get("records")
    if asked <= done or (again and before is not None and records <= before):  # other batches make other steps
        return None
    return asked


def _final_state(out: str) -> dict:
    """What a finished run's trainer has written; nothing, where that was damaged since."""
    try:
        return read_json(out, STATE_NAME) or {}
    except LlavaError:
        return {}


def read_json(folder: str, name: str) -> dict | None:
    """A JSON file of a run's folder; None where there is none.

    Raises:
        LlavaError: it does not hold a JSON object.
    """
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except ValueError as error:
        raise LlavaError(f"{path}: not valid JSON ({error}), expected what a run has written") from None
    if not isinstance(content, dict):
        raise LlavaError(f"{path}: found a {type(content).__name__}, expected a JSON object")
    return content


def _start_key(out: str) -> str:
    """The key that starts another run from what lies in a finished run's folder."""
    if os.path.isfile(os.path.join(out, "adapter_config.json")):
        return "lora_weight_path"
    alone = os.path.isfile(os.path.join(out, "mm_projector.safetensors"))
    return "pretrain_mm_mlp_adapter" if alone else "model_name_or_path"


# --- a run that is interrupted ----------------------------------------------------------------------------------------


def how_to_go_on(training_args, step: int | None) -> str:
    """What to say of a run that was interrupted after `step` steps; None: before it began to train."""
    args = training_args
    last = newest_whole(args.output_dir, "sizes", tell=lambda line: None)
    reached = "before training began" if step is None else f"at step {step}"
    asked = (args.resume_from_checkpoint or "true").lower()
    anew = args.overwrite_output_dir or asked == "false"
    if step is None and anew:
        return f"{reached}; the same command begins anew"
    if last is None and (anew or asked == "true"):
        return f"{reached}; no checkpoint yet: the same command begins anew"
    if args.overwrite_output_dir:
        return f"{reached}; the command without --overwrite_output_dir goes on from {last}"
    if asked == "true":
        return f"{reached}; the same command goes on from {last}"
    if step is None or last is None:
        return f"{reached}; the same command goes on from {args.resume_from_checkpoint}"
    return f"{reached}; the command without --resume_from_checkpoint goes on from {last}"
