"""Numbers that are not finite, and losses that leap: seen on their step, by every rank alike.

A step's losses and inputs are looked at on the device, before its last backward pass, and exchanged between the ranks.
Where one is not finite, that pass is multiplied by NaN: so the gradient tells all ranks, in whatever way they share it,
and the one decision is that a gradient which is not finite is left out (see `llava.train.skipping`).

What is left out is the optimizer's step: weights and moments stay as they are. The step counts: `global_step`, the
order of the data and the learning rate go on as if it had been taken, so that a run ends where its schedule does, and
one that is resumed reads its rate off the step. fp16's overflows, which its loss scale answers by falling, are no
faults; with them the schedule waits, as DeepSpeed and accelerate have it.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass

import torch
from transformers import TrainerCallback

from llava.errors import LlavaError
from llava.model.host import ReadLater
from llava.train.bad_batches import BadBatches, written
from llava.train.finite import floats_in, largest, nonfinite_weights
from llava.train.ranks import gather
from llava.train.schedule import MEASURED, unwrapped
from llava.train.skipping import skipping
from llava.utils import rank0_print

RECENT, FEWEST = 50, 3  # losses that a leap is seen against, and how many of them it takes
_LISTED = 10  # ids in a line


@dataclass
class _Batch:
    """A micro-batch of this rank: its records, and the largest of its inputs and its loss, on the device."""

    ids: list[str]
    inputs: torch.Tensor | None
    loss: torch.Tensor | None = None


class NumberWatch(TrainerCallback):
    """Watches a trainer's numbers, from its own hooks and as its callback.

    Args:
        trainer: an `LLaVATrainer`, whose `accelerator.backward` goes through here from now on.

    Attributes:
        skipped: steps that were left out, in the run and the one it goes on from; on rank 0.
    """

    def __init__(self, trainer):
        self.trainer, args = trainer, trainer.args
        self.file, self.skipped = BadBatches(args.output_dir, args.should_save), 0
        self._backward, trainer.accelerator.backward = trainer.accelerator.backward, self.backward
        self._skipping = None
        self._batches: list[_Batch] = []  # of the step that is under way
        self._of_ranks: ReadLater | None = None  # each rank's loss and largest input
        self._loss_before: torch.Tensor | None = None  # what Trainer had summed up before the step
        self._bad = self._overflows = False  # the step is left out: for a fault, or as fp16's scale was too large
        self._norm = 0.0
        self._in_a_row, self._recent = 0, deque(maxlen=RECENT)
        self._logged = [0, 0]  # steps since the last line of the log, and how many of them were skipped
        self._taken = [0, 0]  # the same of the whole call of `train`

    # --- the trainer's hooks ---

    def batch(self, inputs: dict) -> None:
        """A micro-batch goes into the model."""
        ids = getattr(inputs.get("host"), "record_ids", None) or []
        self._batches.append(_Batch(ids, largest(floats_in(inputs))))

    def backward(self, loss, **kwargs):
        """In place of `Accelerator.backward`."""
        if self._batches:
            self._batches[-1].loss = loss.detach()
            if self.trainer.accelerator.sync_gradients:
                loss = loss * self._exchange().to(loss.dtype)
        return self._backward(loss, **kwargs)

    def _exchange(self) -> torch.Tensor:
        """Tell all ranks of this one's step. Returns 1, or NaN where a loss or an input of any rank is not finite."""
        loss = torch.stack([batch.loss.float() for batch in self._batches]).sum()
        inputs = [batch.inputs.float().to(loss.device) for batch in self._batches if batch.inputs is not None]
        numbers = torch.stack([loss, torch.stack(inputs).sum() if inputs else torch.zeros_like(loss)])
        if self.trainer.args.world_size > 1:
            numbers = self.trainer.accelerator.gather(numbers)
        self._of_ranks = ReadLater(numbers)
        return torch.where(numbers.isfinite().all(), 1.0, math.nan)

    def gradient(self, norm) -> None:
        """The gradient is there, and not used yet (DeepSpeed has used it, or left it out).

        Args:
            norm: of the gradient over all ranks, as `Trainer` has it; None where DeepSpeed is told to compute none.
        """
        finite = self._of_ranks is None or all(map(math.isfinite, self._of_ranks.tolist()))
        left_out = self._skipping.step(norm, finite)
        self._overflows = left_out and finite and self._skipping.scale_falls()
        self._norm = math.nan if norm is None else float(norm)
        self._bad = (left_out or not finite) and not self._overflows
        if self._bad:
            self.trainer._tr_loss.copy_(self._loss_before)

    def corrected(self, logs: dict) -> dict:
        """A line of the log whose losses are those of steps that were taken; without any there is none."""
        for name, counted in (("loss", self._logged), ("train_loss", self._taken)):
            if name not in logs:
                continue
            steps, skipped = counted
            if skipped:
                logs["skipped_steps"] = skipped
                logs[name] = logs[name] * steps / (steps - skipped) if steps > skipped else math.nan
            counted[:] = [0, 0]
        for name in ("loss", "train_loss", "grad_norm"):
            if name in logs and not math.isfinite(logs[name]):
                del logs[name]
        return logs

    def check_weights(self, step: int | None = None) -> None:
        """Refuse weights that are not finite; every rank must call it.

        Args:
            step: the last one that was taken; None: that of the trainer's state.

        Raises:
            LlavaError: their names.
        """
        names = nonfinite_weights(self.trainer.accelerator.unwrap_model(self.trainer.model))
        if not names:
            return
        step = self.trainer.state.global_step if step is None else step
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        self.file.add([self._row(step, "weight", names[0] + more)])
        raise LlavaError(
            f"{f'after step {step}' if step else 'before the first step'}: found weights that are not finite: "
            f"{names[0]}{more}; expected finite ones: the run cannot go on, and no checkpoint is written of these"
        )

    # --- as a callback ---

    def on_train_begin(self, args, state, control, **kwargs):
        self._skipping, self._taken, self._logged = skipping(self.trainer), [0, 0], [0, 0]
        self.skipped = self.file.begin(state.global_step)
        self.check_weights()

    def on_step_begin(self, args, state, control, **kwargs):
        self._batches, self._of_ranks = [], None
        self._loss_before = self.trainer._tr_loss.clone()
        self._skipping.begin()

    def on_step_end(self, args, state, control, **kwargs):
        for counted in (self._logged, self._taken):
            counted[0] += 1
            counted[1] += self._bad
        if self._bad:
            self._tell_bad(state.global_step)
            if self.trainer.accelerator.optimizer_step_was_skipped and args.lr_scheduler_type not in MEASURED:
                unwrapped(self.trainer.lr_scheduler).step()  # as Trainer does where it is not told of what was skipped
        elif not self._overflows:
            self._in_a_row = 0
            self._look_for_spike(state.global_step)

    # --- a step that was left out, and one whose loss leaps ---

    def _tell_bad(self, step: int) -> None:
        """Note the step and say so.

        Raises:
            LlavaError: it was the last one of too many in a row, or it is the weights that are not finite.
        """
        self.check_weights(step - 1)
        numbers = self._of_ranks.tolist() if self._of_ranks is not None else []
        loss, inputs = numbers[2 * self._rank :][:2] or (0.0, 0.0)
        rows = []
        if all(map(math.isfinite, numbers)):
            rows = [self._row(step, "gradient", self._norm, self._ids())]
        elif not math.isfinite(inputs):
            rows = [self._row(step, "input", inputs, self._ids("inputs"))]
        elif not math.isfinite(loss):
            rows = [self._row(step, "loss", loss, self._ids("loss"))]
        rows = _of_all(rows)
        self.file.add(rows)
        self.skipped += 1
        self._in_a_row += 1
        said = _in_words(rows, self.trainer.args.world_size)
        rank0_print(f"step {step}: skipped, {said}")
        if self._in_a_row >= self.trainer.args.max_bad_steps:
            raise LlavaError(
                f"step {step}: found {self._in_a_row} steps in a row whose numbers are not finite, expected fewer than "
                f"max_bad_steps; of the last, {said}; all are in {self.file.path}, and earlier checkpoints as they were"
            )

    def _look_for_spike(self, step: int) -> None:
        """Say so where the loss, over all ranks, is many times what it was lately."""
        losses, factor = self._of_ranks.tolist()[::2] if self._of_ranks is not None else [], self._spike_factor
        loss = statistics.fmean(losses) if losses else 0.0
        usual = statistics.median(self._recent) if len(self._recent) >= FEWEST else math.inf
        if loss:  # of a step without a label it says nothing
            self._recent.append(loss)
        if not factor or loss <= factor * usual:
            return
        own = losses[self._rank]
        rows = _of_all([self._row(step, "spike", own, self._ids())] if own > factor * usual else [])
        self.file.add(rows)
        rank0_print(
            f"step {step}: loss spike, {loss:.4g} where the median of the last {len(self._recent) - 1} steps is "
            f"{usual:.4g} ({_listed('records', [record for row in rows for record in row['ids']])})"
        )

    @property
    def _rank(self) -> int:
        return self.trainer.args.process_index

    @property
    def _spike_factor(self) -> float:
        return self.trainer.args.loss_spike_factor

    def _ids(self, what: str | None = None) -> list[str]:
        """Of this rank's records in the step; if asked, of the micro-batches whose `inputs` or `loss` is not finite."""

        def counts(batch: _Batch) -> bool:
            value = getattr(batch, what) if what else None
            return what is None or (value is not None and not value.isfinite())

        return [record for batch in self._batches if counts(batch) for record in batch.ids]

    def _row(self, step: int, kind: str, value: float | str, ids: list[str] = ()) -> dict:
        value = value if isinstance(value, str) else written(value)
        epoch = self.trainer.state.epoch or 0.0
        return {"step": step, "epoch": epoch, "rank": self._rank, "kind": kind, "value": value, "ids": list(ids)}


def _of_all(rows: list[dict]) -> list[dict]:
    """The rows of all ranks, in their order."""
    return [row for part in gather(rows) for row in part]


_WHAT = {"loss": "its loss is", "input": "its inputs are", "gradient": "its gradient is"}


def _in_words(rows: list[dict], world: int) -> str:
    """What is not finite in a step, where and of which records."""
    said = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        here = [row for row in rows if row["kind"] == kind]
        parts = [", ".join(dict.fromkeys(str(row["value"]) for row in here))]
        if world > 1 and kind != "gradient":  # which is that of all
            parts.append(_listed("rank", [str(row["rank"]) for row in here]))
        parts.append(_listed("records", [record for row in here for record in row["ids"]]))
        said.append(f"{_WHAT[kind]} not finite ({'; '.join(parts)})")
    return ", ".join(said)


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{what} {', '.join(names[:_LISTED])}{more}"
