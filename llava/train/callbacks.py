"""What `LLaVATrainer` does at the end of a step."""

from transformers import TrainerCallback

from llava.train.position import DataPosition


class StopAtStep(TrainerCallback):
    """Saves a checkpoint where the run is to end; see `LLaVATrainer._save_checkpoint`."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        stopping = self.trainer.stopping
        if args.world_size == 1:
            stopping.agree(stopping.asked())
        else:
            self.trainer.tell_last_step()  # exchanged when the step began
        if stopping.agreed:
            control.should_save, control.should_evaluate = True, False


class CountEpochs(TrainerCallback):
    """Passes over the data, as the position counts them."""

    def __init__(self, position: DataPosition):
        self.position = position

    def on_step_end(self, args, state, control, **kwargs):
        if self.position.shifted:
            state.epoch = self.position.epoch_at(state.global_step)
