"""Where in its data a run is, counted in samples: it goes on at the right one with other processes or other batches."""

import json
import math
import os
from dataclasses import asdict, dataclass, replace

from llava.data.sampler import EpochSampler
from llava.errors import LlavaError
from llava.train.kinds import kind_of_checkpoint, kind_of_run
from llava.train.resume import RUN_NAME, STATE_NAME, batches_per_rank, read_json
from llava.utils import rank0_print

FILE_NAME = "data_position.json"


@dataclass(frozen=True)
class Position:
    """What a run has seen.

    Attributes:
        step: optimizer steps taken.
        epoch, samples: whole passes over the data, and samples of the next one.
        records: of a whole pass.
        batch_size, world_size: that the order of the samples was made for: those of the run's first start. Groupings by
            length or modality depend on them, so a run keeps them.
        global_batch: samples of one step.
    """

    step: int
    epoch: int
    samples: int
    records: int
    batch_size: int
    world_size: int
    global_batch: int


class DataPosition:
    """The position of a run, from its start or a checkpoint on.

    transformers goes on at a step of its own counting, which is right while a step has the samples it had. Where it has
    not, the first epoch begins at the sample that comes next, and is as much shorter.

    Args:
        args: the run's `TrainingArguments`.
        records: how many it has.
        by_rows: whether a step is a number of packed rows rather than of samples.
    """

    def __init__(self, args, records: int, by_rows: bool = False):
        self.args, self.by_rows = args, by_rows
        own = {"batch_size": args.train_batch_size, "world_size": args.world_size}
        global_batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.start = Position(0, 0, 0, records, **own, global_batch=global_batch)
        self.shifted = False  # transformers' own counting would be wrong
        self._global_batch = global_batch
        self._first = self._per_epoch = 1  # steps in what is left of the first epoch, and in a whole one

    @property
    def order(self) -> tuple[int, int]:
        """(batch size, world size) for a sampler that groups."""
        return self.start.batch_size, self.start.world_size

    def load(self, checkpoint: str) -> None:
        """Begin where a checkpoint ends; one of other data is left to transformers' counting of steps."""
        found = recorded(checkpoint, self.args)
        if found is not None and found.records == self.start.records and not self.args.ignore_data_skip:
            self.start = found

    def plan(self, dataloader, values: tuple) -> tuple:
        """What `Trainer.set_initial_training_values` gives, for a run that begins here, as does then the data loader.

        Args:
            dataloader: of the run, prepared by accelerate.
            values: (epochs, steps of an epoch, records, samples of the run, samples of a step, a rank's batches of an
                epoch, steps in all).
        """
        epochs, self._per_epoch, examples, samples, self._global_batch, batches, steps = values
        start = self.start
        epoch, done = divmod(start.step, self._per_epoch)
        self.shifted = start.step > 0 and (epoch, done * self._global_batch) != (start.epoch, start.samples)
        self._first = self._per_epoch - done
        if not self.shifted:
            return values
        if self.by_rows:
            raise LlavaError(
                f"pack_scope: found buffer, and {self._global_batch} rows or samples a step where the checkpoint had "
                f"{start.global_batch}: which samples have been seen cannot be told of rows filled from a buffer; "
                "expected the same number of processes, batch size and accumulation, or pack_scope step"
            )
        if not self.batches_left():  # dataloader_drop_last leaves out what there is
            start = self.start = replace(start, epoch=start.epoch + 1, samples=0)
        self._first = math.ceil(self.batches_left() / self.args.gradient_accumulation_steps)
        if self.args.max_steps <= 0:
            later = math.ceil(self.args.num_train_epochs * self._per_epoch) - (start.epoch + 1) * self._per_epoch
            steps = max(start.step + self._first + later, start.step)
        left = steps - start.step
        epochs = start.epoch + (1 + math.ceil(max(left - self._first, 0) / self._per_epoch) if left > 0 else 0)
        dataloader.set_sampler(_FromSample(dataloader.get_sampler(), start.epoch, start.samples))
        rank0_print(
            f"a step has {self._global_batch} samples, it had {start.global_batch}: the run goes on at sample "
            f"{start.samples} of epoch {start.epoch}, for {steps} steps in all"
        )
        return epochs, self._per_epoch, examples, samples, self._global_batch, batches, steps

    def batches_left(self) -> int:
        """Micro-batches that a rank gets in the rest of the first epoch."""
        return batches_per_rank(self.args, self.start.records - self.start.samples)

    def of_epoch(self, values: dict) -> dict:
        """Arguments of `Trainer._run_epoch`, for the epoch that begins in its midst with its own numbers of steps."""
        if not self.shifted or values["epoch"] != self.start.epoch:
            return values
        return {**values, "steps_in_epoch": self.batches_left(), "num_update_steps_per_epoch": self._first}

    def at(self, step: int) -> Position:
        """The position after a step of this run."""
        taken = step - self.start.step
        epoch, samples = self.start.epoch, self.start.samples + taken * self._global_batch
        if taken >= self._first:
            epochs, steps = divmod(taken - self._first, self._per_epoch)
            epoch, samples = epoch + 1 + epochs, steps * self._global_batch
        order = {"batch_size": self.start.batch_size, "world_size": self.start.world_size}
        return Position(step, epoch, samples, self.start.records, **order, global_batch=self._global_batch)

    def epoch_at(self, step: int) -> float:
        """Passes over the data after a step."""
        position = self.at(step)
        return position.epoch + position.samples / position.records

    def save(self, folder: str, step: int) -> None:
        with open(os.path.join(folder, FILE_NAME), "w") as file:
            json.dump(asdict(self.at(step)), file, indent=1)


class _FromSample(EpochSampler):
    """A sampler that leaves out the first samples of one epoch."""

    def __init__(self, sampler, epoch: int, samples: int):
        super().__init__(sampler)
        self.begins, self.samples = epoch, samples

    def __iter__(self):
        skipped = self.samples if self.epoch == self.begins else 0
        return (index for number, index in enumerate(self.sampler) if number >= skipped)


def recorded(checkpoint: str, args) -> Position | None:
    """What a checkpoint tells of its position; of earlier versions' from the settings of the run that wrote it.

    Raises:
        LlavaError: its files are damaged.
    """
    content = read_json(checkpoint, FILE_NAME)
    if content is not None:
        try:
            return Position(**content)
        except TypeError:
            raise LlavaError(
                f"{os.path.join(checkpoint, FILE_NAME)}: found {', '.join(sorted(content)) or 'nothing'}, expected "
                f"{', '.join(Position.__dataclass_fields__)}"
            ) from None
    processes = kind_of_checkpoint(checkpoint, kind_of_run(args)).processes
    run, state = read_json(checkpoint, RUN_NAME) or {}, read_json(checkpoint, STATE_NAME) or {}
    records, size, step = run.get("records"), state.get("train_batch_size"), state.get("global_step")
    keys = run.get("keys") or {}
    accumulated = (keys.get("gradient_accumulation_steps") or {}).get("value")
    if not (processes and records and size and accumulated and isinstance(step, int)):
        return None
    batches = batches_per_rank(args, records, size, processes)
    global_batch = size * processes * accumulated
    epoch, steps = divmod(step, max(math.ceil(batches / accumulated), 1))
    return Position(step, epoch, steps * global_batch, records, size, processes, global_batch)
