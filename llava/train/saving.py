"""How a trainer writes its checkpoints and its model: apart, and in their places when all of it is on the disk."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from llava.train import checkpoints
from llava.train.ranks import gather


def save_checkpoint(trainer, write: Callable[[Path], None]) -> Path:
    """Save the trainer's state as OUT/checkpoint-N, N its step. Every rank must call it.

    Args:
        trainer: a `transformers.Trainer`.
        write: writes the files into a folder; it is called on every rank.

    Raises:
        LlavaError: it could not be written, as with a full disk; earlier checkpoints are as they were.
    """
    args, step = trainer.args, trainer.state.global_step
    with _apart(trainer, checkpoints.temporary(args.output_dir, step)) as folder:
        write(folder)
        trainer.accelerator.wait_for_everyone()
        files = _entries(folder, args)
        final = Path(args.output_dir) / folder.name
        if args.should_save:
            stage = trainer.accelerator.state.deepspeed_plugin.zero_stage if trainer.is_deepspeed_enabled else None
            about = {"step": step, "world_size": args.world_size, "deepspeed": stage, "finite": True}
            checkpoints.publish(folder, args.output_dir, about, files)
            _rotate(trainer, final)
    trainer.accelerator.wait_for_everyone()
    return final


@contextlib.contextmanager
def final_model(trainer) -> Iterator[Path]:
    """The folder into which the trained model is written; its files then come to OUT. Every rank must enter it."""
    args = trainer.args
    with _apart(trainer, Path(args.output_dir) / checkpoints.FINAL) as folder:
        yield folder
        trainer.accelerator.wait_for_everyone()
        if args.should_save:
            checkpoints.move_into(folder, Path(args.output_dir))
            step = trainer.state.global_step
            last = Path(args.output_dir) / f"checkpoint-{step}"
            # a run that was killed behind its last save takes no step, and that checkpoint has just been verified
            if step == trainer.position.start.step and last.is_dir():
                _rotate(trainer, last)
    trainer.accelerator.wait_for_everyone()


def _rotate(trainer, newest: Path) -> None:
    """Keep to `save_total_limit`: what stays is the newest checkpoint and the best."""
    best = trainer.state.best_model_checkpoint
    checkpoints.rotate(trainer.args.output_dir, trainer.args.save_total_limit, {str(newest), *([best] if best else [])})


@contextlib.contextmanager
def _apart(trainer, folder: Path) -> Iterator[Path]:
    out = Path(trainer.args.output_dir)
    if trainer.args.should_save:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    trainer.accelerator.wait_for_everyone()
    try:
        yield folder
    except Exception as error:
        shutil.rmtree(out / folder.relative_to(out).parts[0], ignore_errors=True)
        said = checkpoints.write_error(error, out, _expected_bytes(trainer))
        raise said or error from None


def _entries(folder: Path, args) -> dict[str, dict]:
    """The manifest's files; where all ranks see the folder, each takes its share of the work."""
    if args.save_on_each_node:
        return checkpoints.entries(folder, checkpoints.files_in(folder)) if args.should_save else {}
    sizes: dict[str, int] = {}
    for part in gather({name: (folder / name).stat().st_size for name in checkpoints.files_in(folder)}):
        sizes |= part  # another machine's files may come into sight late
    names = sorted(sizes, key=lambda name: (-sizes[name], name))
    found = gather(checkpoints.entries(folder, names[args.process_index :: args.world_size]))
    return {name: entry for part in found for name, entry in part.items()}


def _expected_bytes(trainer) -> int:
    """Roughly what a checkpoint takes: what the last one does, or the weights with an optimizer's two moments."""
    for folder in reversed(checkpoints.checkpoints_of(trainer.args.output_dir)):
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    parameters = list(trainer.accelerator.unwrap_model(trainer.model).parameters())
    counts = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters]
    trained = sum(count for count, parameter in zip(counts, parameters, strict=True) if parameter.requires_grad)
    state = 12 if trainer.is_deepspeed_enabled else 8
    sizes = (count * parameter.element_size() for count, parameter in zip(counts, parameters, strict=True))
    return sum(sizes) + (0 if trainer.args.save_only_model else state * trained)
