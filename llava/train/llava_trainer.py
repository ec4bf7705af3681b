"""`transformers.Trainer` with LLaVA's sampling, learning rates, loss normalisation, checkpoints and bad records."""

import json
import os

import torch
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llava.constants import IGNORE_INDEX
from llava.data.sampler import LengthGroupedSampler
from llava.errors import LlavaError
from llava.model.checkpoint import adapter_state, save_adapter
from llava.model.lora import is_adapted, restore_lora, save_lora
from llava.train.parts import is_adapter_only, split_by_learning_rate
from llava.utils import rank0_print

BAD_RECORDS_NAME = "bad_records.json"  # in a checkpoint: what was left out so far


class LLaVATrainer(Trainer):
    """Trainer for LLaVA models.

    Args:
        parts: the parts that are trained (see `parts.tunable_parts`).
        *args, **kwargs: as `transformers.Trainer`; the collator's batches may carry "bad_records".
    """

    def __init__(self, *args, parts: set[str], **kwargs):
        super().__init__(*args, **kwargs)
        self.parts = parts
        self.model_accepts_loss_kwargs = True  # the model divides the summed loss by num_items_in_batch itself
        self.bad_records: set[str] = set()  # "id: reason"

    @property
    def keeps_projector_alone(self) -> bool:
        """The run leaves the projector in place of a whole model."""
        return is_adapter_only(self.parts)

    # --- data ---

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        if args.group_by_modality_length or args.group_by_modality_length_auto:
            lengths = dataset.modality_lengths
            group_by = "modality_length" if args.group_by_modality_length else "modality_length_auto"
        elif args.group_by_varlen:
            lengths, group_by = dataset.lengths, "varlen"
        elif getattr(args, "train_sampling_strategy", None) == "group_by_length":
            lengths, group_by = dataset.lengths, "length"
        else:
            return super()._get_train_sampler(dataset)
        return LengthGroupedSampler(lengths, args.train_batch_size, args.world_size, group_by, args.seed)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step; what the collator says of bad records is taken out and counted."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._count_bad_records([record for batch in batches for record in batch.pop("bad_records", ())])
        return batches, items

    def _get_num_items_in_batch(self, batch_samples, device):
        """Supervised tokens of the global batch: over micro-batches and ranks. A first token is never predicted."""
        counts = [(batch["labels"][:, 1:] != IGNORE_INDEX).sum() for batch in batch_samples]
        total = torch.stack(counts).sum().to(device) if counts else torch.zeros((), dtype=torch.long, device=device)
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            total = self.accelerator.gather(total).sum()
        return total

    def _count_bad_records(self, new: list[str]):
        """Stop, on every rank at the same step, when too many distinct records could not be used."""
        if self.args.world_size > 1:
            any_bad = torch.tensor(len(new), device=self.args.device)
            if int(self.accelerator.reduce(any_bad)) == 0:
                return
            gathered = [None] * self.args.world_size
            torch.distributed.all_gather_object(gathered, new)
            new = [record for part in gathered for record in part]
        for record in sorted(set(new) - self.bad_records):
            rank0_print(f"left out: {record}")
        self.bad_records.update(new)
        limit = max(10, len(self.train_dataset) // 100)
        if len(self.bad_records) > limit:
            listed = "; ".join(sorted(self.bad_records))
            raise LlavaError(f"{len(self.bad_records)} bad records, more than the {limit} that are tolerated: {listed}")

    def _prepare_inputs(self, inputs):
        """As `Trainer`'s; images stay in float32 where patches are chosen by them, not in DeepSpeed's bfloat16."""
        if "images" not in inputs:
            return super()._prepare_inputs(inputs)
        tower = self.accelerator.unwrap_model(self.model).get_vision_tower()
        if tower is None or tower.patch_chooser is None:
            return super()._prepare_inputs(inputs)
        rest = super()._prepare_inputs({key: value for key, value in inputs.items() if key != "images"})
        return {**rest, "images": [image.to(self.args.device) for image in inputs["images"]]}

    # --- step ---

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As `Trainer`'s; a batch that reaches no trained weight gets gradients of zero instead of an error.

        That is a batch without images where the language model is frozen. Several processes do not come here: their
        models run tower and projector on every batch.
        """
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, *outputs = result if return_outputs else (result,)
        if model.training and not loss.requires_grad:
            loss = loss + sum(p.sum() for p in model.parameters() if p.requires_grad) * 0.0
        return (loss, *outputs) if return_outputs else loss

    # --- optimizer ---

    def create_optimizer(self, model=None):
        made = self.optimizer is None
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        rates = {
            "mm_vision_tower": self.args.mm_vision_tower_lr,
            "mm_token_compressor": self.args.mm_token_compressor_lr,
            "mm_mlp_adapter": self.args.mm_projector_lr,
        }
        if made and any(rate is not None for rate in rates.values()):
            split_by_learning_rate(optimizer, self.model, rates)
        return optimizer

    # --- checkpoints ---

    def save_model(self, output_dir=None, _internal_call=False):
        """As `Trainer`'s; of a model with LoRA adapters, what was trained. Every rank must call it."""
        model = self.accelerator.unwrap_model(self.model)
        if not is_adapted(model):
            super().save_model(output_dir, _internal_call)
            return
        folder = output_dir or self.args.output_dir
        save_lora(model, folder, write=self.args.should_save)
        if self.args.should_save:
            self.save_description(folder)

    def save_description(self, folder: str) -> None:
        """Config, tokenizer and image processor: what a folder without a whole model needs to be loaded."""
        model = self.accelerator.unwrap_model(self.model)
        model.config.save_pretrained(folder)
        self.processing_class.save_pretrained(folder)
        if model.get_vision_tower() is not None:
            model.get_vision_tower().image_processor.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if is_adapted(self.model):
            restore_lora(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        folder = os.path.join(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.bad_records and self.args.should_save:
            with open(os.path.join(folder, BAD_RECORDS_NAME), "w") as file:
                json.dump(sorted(self.bad_records), file, indent=1)
        if self.keeps_projector_alone:
            self.save_adapter(folder)

    def read_bad_records(self, checkpoint: str) -> None:
        """Go on counting from what the run that wrote `checkpoint` had left out."""
        path = os.path.join(checkpoint, BAD_RECORDS_NAME)
        if os.path.isfile(path):
            with open(path) as file:
                self.bad_records = set(json.load(file))

    def save_adapter(self, folder: str) -> None:
        """Write the projector (newline, token compressor) alone; every rank must call it."""
        state = adapter_state(self.accelerator.unwrap_model(self.model).named_parameters())
        if self.args.should_save:
            save_adapter(state, folder)
