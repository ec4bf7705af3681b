"""How fast a run is, what of it is real work, and what was left out: the perf/ and data/ figures of its log.

    perf/tokens_per_s       tokens of the language model, padding left out, over all ranks
    perf/samples_per_s      samples, over all ranks
    perf/pack_efficiency    tokens / places that the language model computes, padding included
    perf/visual_token_share of the tokens, those that come from pictures
    perf/data_wait_share    of the time, what the rank that waits longest waits for its batches
    perf/step_s_min, _max   the quickest and the slowest step of any rank, in seconds
    perf/peak_memory_gb     most memory of any rank since the run began, in 1e9 bytes: of its device what PyTorch has
                            allocated; without one the process's resident set
    perf/mfu                operations that the steps must do (see `llava.train.flops`) over what the devices could
    data/truncated          samples that were cut to model_max_length so far; workers are a few batches ahead
    data/bad_records        records that could not be read so far

Each is of the steps since the line before it; evaluations and checkpoints, which come between steps, have no part in
the times. The numbers are known on the host: nothing waits for the device, and the ranks exchange once for each line.
"""

import time

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from llava.errors import LlavaError
from llava.families.batch_sizes import BatchSizes
from llava.model.shapes import shape_of
from llava.train.flops import peak_tflops, step_flops
from llava.utils import rank0_print

SHOWN = ("perf/tokens_per_s", "perf/pack_efficiency", "perf/mfu")  # in the terminal, where all would take three lines


class _Brief:
    """In front of a callback of transformers that prints a line of the log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        left_out = [name for name in logs if name.startswith("perf/") and name not in SHOWN]
        left_out += [name for name in logs if name.startswith("data/") and not logs[name]]
        brief = {name: value for name, value in logs.items() if name not in left_out}
        return super().on_log(args, state, control, logs=brief, **kwargs)


class BriefProgress(_Brief, ProgressCallback):
    """Beside a bar."""


class BriefPrinter(_Brief, PrinterCallback):
    """With `disable_tqdm`."""


def print_briefly(trainer) -> None:
    """Let the trainer's terminal have a few of the figures; its log has all."""
    for theirs, brief in ((ProgressCallback, BriefProgress), (PrinterCallback, BriefPrinter)):
        if trainer.pop_callback(theirs) is not None:
            trainer.add_callback(brief)


def _can_count(trainer) -> bool:
    """Whether the model's config tells its operations; that of an encoder of the user's own need not."""
    try:
        shape_of(trainer.accelerator.unwrap_model(trainer.model).config)
    except LlavaError as error:
        rank0_print(f"perf/mfu is left out: {error}")
        return False
    return True


class StepLog(TrainerCallback):
    """Measures a trainer's steps, from its hooks and as its callback.

    Args:
        trainer: an `LLaVATrainer`.
    """

    def __init__(self, trainer):
        self.trainer, self.peak = trainer, trainer.args.peak_tflops
        if self.peak is None and trainer.args.device.type == "cuda":
            self.peak = peak_tflops(torch.cuda.get_device_name(trainer.args.device))
        if self.peak is not None and not _can_count(trainer):
            self.peak = None
        self._truncated_before = 0  # in the run that this one goes on from
        self._began = self._waited = 0.0  # of the step under way
        self._clear()

    def _clear(self) -> None:
        self._sizes, self._steps, self._waits = BatchSizes(), [], []  # seconds of each step, and of its wait

    # --- the trainer's hooks ---

    def begin(self) -> None:
        """A step begins: its batches are asked for."""
        self._began = time.perf_counter()

    def read(self, batches: list[dict]) -> None:
        """They are there."""
        self._waited = time.perf_counter() - self._began
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        for batch in batches:
            if batch.get("host") is not None:
                self._sizes += self.trainer.family.batch_sizes(batch, model)

    def on_train_begin(self, args, state, control, **kwargs):
        logged = [entry["data/truncated"] for entry in state.log_history if "data/truncated" in entry]
        self._truncated_before = logged[-1] if logged else 0
        self._clear()

    def on_step_end(self, args, state, control, **kwargs):
        self._steps.append(time.perf_counter() - self._began)
        self._waits.append(self._waited)

    def added_to(self, logs: dict) -> dict:
        """A line of the log, with these figures if it is one of steps; every rank must call it."""
        if "loss" in logs and self._steps:
            logs |= self._figures()
            self._clear()
        return logs

    # --- the figures ---

    def _figures(self) -> dict:
        sizes, seconds = self._sizes, sum(self._steps)
        sums = [sum(sizes.tokens), len(sizes.tokens), sizes.slots, sizes.visual, self._flops(), self._truncated()]
        most = [seconds, sum(self._waits) / seconds, max(self._steps), -min(self._steps), self._peak_memory()]
        ranks = torch.tensor([sums + most], dtype=torch.float64, device=self.trainer.args.device)
        if self.trainer.args.world_size > 1:
            ranks = self.trainer.accelerator.gather(ranks)
        world, ranks = len(ranks), ranks.cpu()
        tokens, samples, slots, visual, flops, truncated = ranks[:, : len(sums)].sum(0).tolist()
        seconds, wait, slowest, quickest, memory = ranks[:, len(sums) :].amax(0).tolist()
        found = {
            "tokens_per_s": tokens / seconds,
            "samples_per_s": samples / seconds,
            "pack_efficiency": tokens / max(slots, 1),
            "visual_token_share": visual / max(tokens, 1),
            "data_wait_share": wait,
            "step_s_min": -quickest,
            "step_s_max": slowest,
            "peak_memory_gb": memory,
        }
        if self.peak is not None:
            found["mfu"] = flops / (seconds * world * self.peak * 1e12)
        return {
            **{f"perf/{name}": float(f"{value:.6g}") for name, value in found.items()},
            "data/truncated": self._truncated_before + int(truncated),
            "data/bad_records": len(self.trainer.left_out.bad),
        }

    def _flops(self) -> float:
        """Operations of this rank's steps; 0 where nothing says what its device could do."""
        if self.peak is None:
            return 0.0
        args, sizes = self.trainer.args, self._sizes
        return step_flops(
            self.trainer.accelerator.unwrap_model(self.trainer.model).config,
            sizes.tokens,
            sizes.patches,
            self.trainer.parts,
            supervised=sizes.supervised,
            projected=sizes.projected,
            lora_rank=args.lora_r if args.lora_enable else 0,
            tower_blocks=args.mm_vision_tower_trainable_blocks,
        )

    def _truncated(self) -> int:
        return getattr(self.trainer.train_dataset, "stats", {}).get("truncated", 0)

    def _peak_memory(self) -> float:
        """In 1e9 bytes."""
        device = self.trainer.args.device
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device) / 1e9
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
