"""`LLaVATrainer` for Qwen2-VL."""

from torch.utils.data import RandomSampler, SequentialSampler

from llava.data.qwen2_vl import EpochSampler
from llava.data.sampler import LengthGroupedSampler
from llava.model.builder import load_weights
from llava.model.lora import is_adapted
from llava.train.llava_trainer import LLaVATrainer


class Qwen2VLTrainer(LLaVATrainer):
    """Trainer for Qwen2-VL: always keeps whole models (or adapters), and tells the data set which epoch it is."""

    @property
    def keeps_projector_alone(self) -> bool:
        return False

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        sampler = super()._get_train_sampler(dataset)
        if isinstance(sampler, RandomSampler):  # accelerate seeds that one, and does not find it inside another
            args = self.args
            sampler = LengthGroupedSampler(
                range(len(dataset)), args.train_batch_size, args.world_size, group_by=None, seed=args.seed
            )
        # transformers' own groupings are more than samplers; with them every epoch draws as the first
        return EpochSampler(sampler) if isinstance(sampler, (LengthGroupedSampler, SequentialSampler)) else sampler

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """As `LLaVATrainer`'s. Qwen2-VL's files have older names, which transformers' `Trainer` does not translate: it
        would go on with the weights that the run began with."""
        if is_adapted(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        kind = type(self.accelerator.unwrap_model(self.model))
        saved, _ = load_weights(kind, resume_from_checkpoint, with_projector=True, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())

    def save_description(self, folder: str) -> None:
        """Config and processor: what a folder of a LoRA adapter needs to be loaded."""
        self.accelerator.unwrap_model(self.model).config.save_pretrained(folder)
        self.processing_class.save_pretrained(folder)
