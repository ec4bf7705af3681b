"""For every family of `llava.families` a tiny checkpoint, records to train on, and runs in this process that are
watched."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from llava.families import get_family
from tests import tiny

ALL_PARTS = "mm_vision_tower,mm_mlp_adapter,mm_language_model"
KINDS = "imttit"  # records of three steps: one of them has no image, one a row with two


def _llava(folder: Path):
    from tests.eval import common

    checkpoint = common.checkpoint(folder)
    shape = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": "(1x1),...,(2x2)"}
    merge = {"mm_projector_type": "mlp2x_gelu", "mm_patch_merge_type": "spatial_unpad", "mm_use_im_patch_token": False}
    tower = {"vision_tower": folder / "clip", "mm_vision_select_layer": -2}
    return checkpoint, {"version": "qwen_1_5", **tower, **shape, **merge}


def _qwen_vl(kind: str):
    return lambda folder: (tiny.qwen2_vl(folder / kind, kind), {})


# a family's name -> what makes, in a folder, its checkpoint and the keys that a run on it must be given
CHECKPOINTS = {"llava": _llava, **{kind: _qwen_vl(kind) for kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")}}


class Stopped(Exception):
    """Stands for a run that is killed."""


@dataclass
class Run:
    """What happened in a run.

    Attributes:
        out: its folder.
        losses: of its steps.
        full_losses: of the same batches and weights by the model's own forward in eval mode, of logits everywhere.
        trainer: as of its end; None where it was stopped.
    """

    out: Path
    losses: list[float] = field(default_factory=list)
    full_losses: list[float] = field(default_factory=list)
    trainer: object = None


class FamilyKit:
    """One family's checkpoint and records in a folder; `run` trains in this process."""

    def __init__(self, name: str, folder: Path):
        self.family, self.folder = get_family(name), folder
        folder.mkdir(parents=True, exist_ok=True)
        self.checkpoint, self.keys = CHECKPOINTS[name](folder)
        self.records = tiny.records(folder / "records", KINDS)

    def flags(self, **changes) -> list[str]:
        """The command line of a run; `changes` are keys."""
        given = {"model_name_or_path": self.checkpoint, "data_path": self.records, "max_steps": 3, **self.keys}
        given |= {"image_folder": self.folder / "records/images", "mm_tunable_parts": ALL_PARTS}
        given |= {"per_device_train_batch_size": 2, "train_sampling_strategy": "sequential", "learning_rate": 1e-3}
        given |= {"gradient_checkpointing": False, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}
        return [part for key, value in (given | changes).items() for part in (f"--{key}", str(value))]

    def run(self, out: Path, stop_after: int | None = None, full_loss=None, **changes) -> Run:
        """Three steps of two records each.

        Args:
            out: folder of the run.
            stop_after: kill it after this many steps.
            full_loss: (model, batch) -> the loss to note beside each step's own; None: by the model in eval mode.
            **changes: keys of the run.
        """
        from llava.train import train
        from llava.train.llava_trainer import LLaVATrainer

        flags = self.flags(output_dir=out, **changes)
        seen, take, save = Run(out), LLaVATrainer.training_step, train.save

        def step(trainer, model, inputs, *rest):
            if trainer.state.global_step == stop_after:
                raise Stopped
            batch = trainer._prepare_inputs(inputs)
            with torch.no_grad():
                seen.full_losses.append(float((full_loss or _full_loss)(model, batch)))
            loss = take(trainer, model, inputs, *rest)
            seen.losses.append(float(loss))
            return loss

        def keep(trainer, folder):
            seen.trainer = trainer
            save(trainer, folder)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LLaVATrainer, "training_step", step)
            patch.setattr(train, "save", keep)
            if stop_after is None:
                train.train(flags)
            else:
                with pytest.raises(Stopped):
                    train.train(flags)
        return seen


def _full_loss(model, batch: dict):
    was = model.training
    made = model.eval()(**batch)
    model.train(was)
    assert made.logits is not None  # of every position
    return made.loss
