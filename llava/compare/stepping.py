"""The training stage of one model of a comparison, a few optimizer steps at a time."""

import gc
import time

from llava.errors import LlavaError

PEAKS = 3  # turns in which a CPU's memory is measured: those steps are not timed, and take as long
RECORDS = 4096  # of the stage's data, the first ones: enough for a few steps, and packed by buffers
TIMED = {"cuda": 3, "cpu": 2}  # steps of a turn
# what a run does besides its steps; `deepspeed` shares out a model over devices, of which there is one here
OFF = {
    **{"deepspeed": "none", "gradient_accumulation_steps": 1, "eval_strategy": "no", "eval_on_start": False},
    **{"save_strategy": "no", "load_best_model_at_end": False, "push_to_hub": False, "report_to": "none"},
    **{"logging_strategy": "no", "logging_first_step": False, "disable_tqdm": True, "dataloader_num_workers": 0},
    **{"dataloader_persistent_workers": False, "dataloader_prefetch_factor": "none"},
}


class Stepping:
    """Steps of a run as its settings say: parts that learn, precision, optimizer, packing, samples of a device's
    micro-batch, of which each step has one here.

    Each turn begins with the same records, and with an optimizer that has seen nothing.

    Args:
        argv: of the run, as `llava.config.resolve` takes it.
        folder: an empty one for what the run would write.
        device: "cuda" or "cpu".

    Attributes:
        rates: samples a second of each timed step: forward, backward and optimizer; not the reading of the data.
        peaks: bytes, of a turn. On a CPU: the model's own, and what the process grew by.
        rows: per_device_train_batch_size; None: the run's. Smaller than that where it does not fit.
    """

    def __init__(self, argv: list[str], folder: str, device: str):
        self.argv, self.folder, self.device = argv, folder, device
        self.trainer, self.rows, self.rates, self.peaks = None, None, [], []

    def load(self) -> None:
        """Make the model and its trainer, on the device.

        Raises:
            LlavaError: as the run would.
        """
        if self.trainer is None:
            self.trainer = self._make()
        self.trainer.model.to(self.trainer.args.device)

    def _make(self):
        from llava.train.arguments import parse_args
        from llava.train.train import make_trainer

        changes = OFF | {"output_dir": self.folder, "max_steps": 1 + TIMED[self.device]}
        if self.device == "cpu":
            changes["use_cpu"] = True
        if self.rows is not None:
            changes["per_device_train_batch_size"] = self.rows
        flags = [part for key, value in changes.items() for part in (f"--{key}", str(value))]
        trainer = make_trainer(*parse_args([*self.argv, *flags]), first=RECORDS)
        self.rows = trainer.args.per_device_train_batch_size
        self._clock = _clock(self.device)
        trainer.add_callback(self._clock)
        trainer.data_collator = self._counting(trainer.data_collator)
        return trainer

    def _counting(self, collate):
        """Notes how many samples each batch has; of packed ones it may be another number each time."""
        from llava.data.dataset import BadRecord

        def counted(samples):
            self._samples.append(sum(not isinstance(sample, BadRecord) for sample in samples))
            return collate(samples)

        return counted

    def rest(self) -> None:
        """Leave the device, keep the model in the host's memory."""
        if self.trainer is not None:
            self._forget()
            self.trainer.model.to("cpu")

    def drop(self) -> None:
        if self.trainer is not None:
            self._forget()
        self.trainer = None

    def _forget(self) -> None:
        """Let go of the optimizer, and of what accelerate has wrapped around the model."""
        trainer = self.trainer
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.accelerator.free_memory()
        trainer.model_wrapped = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)

    @property
    def trained_params(self) -> int:
        return sum(parameter.numel() for parameter in self.trainer.model.parameters() if parameter.requires_grad)

    def measure(self) -> None:
        """One turn: a step to warm up, then the timed ones.

        Raises:
            LlavaError: not even one sample fits.
        """
        import torch

        while True:
            try:
                return self._turn()
            except torch.OutOfMemoryError:
                if self.rows == 1:
                    raise LlavaError("a step of one sample does not fit in the device's memory") from None
            rows = self.rows // 2  # here: the failed step's frames, and all they held, are gone
            self.drop()
            gc.collect()  # a trainer and its callbacks hold each other
            torch.cuda.empty_cache()
            self.rows, self.rates, self.peaks = rows, [], []
            self.load()

    def _turn(self) -> None:
        from llava.train.peak_memory import PeakMemory, given_back

        if self.device == "cuda":
            with PeakMemory("cuda") as peak:
                self._steps()
            self.peaks.append(peak.bytes)
            return
        self._steps()
        if len(self.peaks) == PEAKS:
            return
        timed = len(self.rates)
        self._forget()
        with given_back(), PeakMemory("cpu") as peak:
            self._steps()
        del self.rates[timed:]
        self.peaks.append(None if peak.grown is None else _own_bytes(self.trainer.model) + peak.grown)

    def _steps(self) -> None:
        self._samples, self._clock.seconds = [], []
        self.trainer.train()
        taken = list(zip(self._samples, self._clock.seconds, strict=False))[1:]
        self.rates += [samples / seconds for samples, seconds in taken]
        self._forget()

    @property
    def figures(self) -> dict:
        memory = [None if peak is None else peak / 2**20 for peak in self.peaks]
        return {"train_samples_per_s": self.rates, "peak_memory_mb": memory}


def _own_bytes(model) -> int:
    """Of a model's weights and buffers; what is shared counts once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _clock(device: str):
    """A trainer's callback with the `seconds` of each step."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds, self._begun = [], 0.0

        def on_step_begin(self, args, state, control, **kwargs):
            self._begun = self._now()

        def on_step_end(self, args, state, control, **kwargs):
            self.seconds.append(self._now() - self._begun)

        def _now(self) -> float:
            if device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter()

    return Clock()
