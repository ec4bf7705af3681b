"""transformers' `Trainer`, which says what it does at the moment (see `llava.train.phases`)."""

from transformers import Trainer, TrainerCallback

from llava.train.phases import during, enter
from llava.train.process_groups import limit_groups


class PhasedTrainer(Trainer):
    """Trainer whose phases are known; its process groups wait as long as `ddp_timeout` says."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(_Phases)

    def get_batch_samples(self, *args, **kwargs):
        enter("reading of data", self.state.global_step + 1)
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        enter("forward pass", self.state.global_step + 1)
        return super().training_step(*args, **kwargs)

    def compute_loss(self, model, *args, **kwargs):
        result = super().compute_loss(model, *args, **kwargs)
        if model.training:
            # DeepSpeed takes its step within
            enter("backward pass and optimizer step" if self.is_deepspeed_enabled else "backward pass")
        return result

    def _evaluate(self, *args, **kwargs):
        with during("evaluation"):
            return super()._evaluate(*args, **kwargs)


class _Phases(TrainerCallback):
    """The phases between the trainer's methods."""

    def on_train_begin(self, args, state, control, **kwargs):
        limit_groups(args.ddp_timeout)  # DeepSpeed's and accelerate's are there by now
        enter("reading of data", state.global_step + 1)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        enter("optimizer step")

    def on_step_end(self, args, state, control, **kwargs):
        enter("logging", state.global_step)
