"""transformers' `Trainer` with LLaVA-NeXT's sampling, learning rates, loss normalisation, checkpoints, bad records."""

import json
import os
from pathlib import Path

import torch
from accelerate.utils import DummyOptim
from torch.utils.data import RandomSampler, SequentialSampler

from llava.absent import absent
from llava.constants import IGNORE_INDEX
from llava.data.packed_loading import Packing
from llava.data.sampler import EpochSampler, LengthGroupedSampler
from llava.errors import LlavaError
from llava.families import get_family
from llava.families.training import trains_projector_alone
from llava.model.checkpoint import projector_state, save_projector
from llava.model.host import ReadLater
from llava.model.lora import is_adapted, restore_lora, save_lora
from llava.train.callbacks import CountEpochs, StopAtStep
from llava.train.carrying import draw_missing_numbers, readable_state
from llava.train.checkpoints import STATE_NAME
from llava.train.left_out import LeftOut
from llava.train.number_watch import NumberWatch
from llava.train.phased_trainer import PhasedTrainer
from llava.train.phases import during, enter
from llava.train.position import DataPosition
from llava.train.ranks import gather, of_rank0
from llava.train.resume import RUN_NAME
from llava.train.run_state import RunState
from llava.train.saving import save_checkpoint
from llava.train.schedule import go_on, has_scheduler, optimizer_file, unwrapped
from llava.train.step_log import StepLog, print_briefly
from llava.train.stopping import Preempted, Stopping, in_worker, worker_context
from llava.utils import rank0_print

LLaVADPOTrainer = absent("llava.train.llava_trainer.LLaVADPOTrainer", "preferences (DPO) are not trained on")


class LLaVATrainer(PhasedTrainer):
    """Trainer of every family's models.

    Args:
        family: the model's; None: LLaVA.
        parts: the parts that are trained (see `families.training.tunable_parts`).
        evaluation: what the run is evaluated on while it trains (see `llava.train.evaluation`); None: nothing.
        run_state: the run's; None: none is written.
        stopping: what asks for the run's end; None: nothing.
        packing: how samples share rows; None: one to a row.
        *args, **kwargs: as `transformers.Trainer`; the collator's batches may carry "bad_records" and "no_label".
    """

    def __init__(
        self,
        *args,
        parts: set[str],
        family=None,
        evaluation=None,
        run_state: RunState | None = None,
        stopping: Stopping | None = None,
        packing: Packing | None = None,
        **kwargs,
    ):
        settings, self.evaluation, self.packing = kwargs["args"], evaluation, packing
        if packing is not None:  # as many for each rank as they come; batches of unlike sizes are all right
            settings.accelerator_config.even_batches = False
        if evaluation is not None:
            kwargs["eval_dataset"] = evaluation.dataset
        # batches lie in pinned memory: their copies need not be waited for, one by one
        settings.accelerator_config.non_blocking |= settings.dataloader_pin_memory
        super().__init__(*args, **kwargs)
        self.parts, self.family = parts, family or get_family("llava")
        self.float32_inputs = self.family.float32_inputs(self.accelerator.unwrap_model(self.model))
        self.model_accepts_loss_kwargs = True  # the model divides the summed loss by num_items_in_batch itself
        self.numbers = NumberWatch(self)
        self.add_callback(self.numbers)
        self.add_callback(StopAtStep(self))
        self.step_log = StepLog(self)
        self.add_callback(self.step_log)
        print_briefly(self)
        self.left_out = LeftOut(len(self.train_dataset))
        self.position = DataPosition(
            settings, len(self.train_dataset), packing is not None and packing.scope == "buffer"
        )
        self.add_callback(CountEpochs(self.position))
        self.run_state, self.stopping = run_state or RunState(settings.output_dir, writes=False), stopping or Stopping()
        self._saved_in: Path | None = None  # while a checkpoint is written
        # of this rank's last step, with what all ranks counted in it: supervised tokens, records left out
        self._last_step: tuple[tuple[list[str], list[str]], ReadLater] | None = None

    @property
    def keeps_projector_alone(self) -> bool:
        """The run leaves the projector in place of a whole model."""
        return self.family.keeps_projector_alone and trains_projector_alone(self.parts)

    # --- data ---

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        sampler, args = self._order(dataset), self.args
        # accelerate seeds a RandomSampler itself, and does not find it inside another
        planned = self.packing is not None and self.packing.scope == "buffer"  # once, by every rank alike
        if isinstance(sampler, RandomSampler) and (dataset.draws or self.family.order_by_seed or planned):
            sampler = LengthGroupedSampler(range(len(dataset)), *self.position.order, None, args.seed)
        # transformers' own groupings are more than samplers; with them every epoch draws as the first
        knows_epochs = isinstance(sampler, (LengthGroupedSampler, SequentialSampler))
        return EpochSampler(sampler) if dataset.draws and knows_epochs else sampler

    def _order(self, dataset):
        """The sampler that the run's settings name."""
        args = self.args
        by_modality = args.group_by_modality_length or args.group_by_modality_length_auto
        if by_modality:
            group_by = "modality_length" if args.group_by_modality_length else "modality_length_auto"
        elif args.group_by_varlen:
            group_by = "varlen"
        elif getattr(args, "train_sampling_strategy", None) == "group_by_length":
            group_by = "length"
        else:
            return super()._get_train_sampler(dataset)
        lengths = self._lengths(dataset, by_modality)
        return LengthGroupedSampler(lengths, *self.position.order, group_by, args.seed)

    def _lengths(self, dataset, by_modality: bool) -> list[int]:
        """What records are grouped by, with the sign of their modality if that counts."""
        if self.args.group_lengths == "words":
            return dataset.modality_lengths if by_modality else dataset.lengths
        enter("reading of lengths")
        lengths = of_rank0(dataset.token_lengths(worker_init_fn=in_worker()))
        enter("preparation of the training")
        signs = dataset.modalities if by_modality else [1] * len(lengths)
        return [sign * length for sign, length in zip(signs, lengths, strict=True)]

    # transformers goes on at a step as it counts them; with other batches the position says where

    def set_initial_training_values(self, args, dataloader):
        """As `Trainer`'s."""
        return self.position.plan(dataloader, super().set_initial_training_values(args, dataloader))

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *args):
        """As `Trainer`'s: (epoch, batches of it that are passed over)."""
        begun = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *args)
        if self.state.global_step >= max_steps:  # nothing is left to train
            return num_train_epochs, 0
        return (self.position.start.epoch, 0) if self.position.shifted else begun

    def _run_epoch(self, **kwargs):
        super()._run_epoch(**self.position.of_epoch(kwargs))

    def get_batch_samples(self, *args, **kwargs):
        self.step_log.begin()
        return super().get_batch_samples(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples, device):
        """Supervised tokens of the global batch: over micro-batches and ranks. A first token is never predicted.

        What the collator says of records that were left out is taken out of the batches and counted. Of several ranks,
        the numbers of both are gathered together; they are read in the next step, when the host need not wait for them.
        """
        self.step_log.read(batch_samples)
        counts = [(batch["labels"][:, 1:] != IGNORE_INDEX).sum() for batch in batch_samples]
        left_out = tuple(
            [record for batch in batch_samples for record in batch.pop(kind, ())]
            for kind in ("bad_records", "no_label")
        )
        total = torch.stack(counts).sum().to(device) if counts else torch.zeros((), dtype=torch.long, device=device)
        self.tell_last_step()
        if self.args.world_size == 1:
            self.left_out.add(*left_out)
            self._last_step = ((), ()), ReadLater(total[None])
            return total
        enter("counting of labels over all ranks")
        counted = (sum(map(len, left_out)), self.stopping.asked())
        numbers = torch.stack([total, *(torch.full_like(total, number) for number in counted)])
        numbers = self.accelerator.gather(numbers).view(-1, len(numbers))
        totals = torch.cat([numbers[:, :2].sum(0), numbers[:, 2:].amax(0)])
        self._last_step = left_out, ReadLater(totals)
        return totals[0] if self.args.average_tokens_across_devices else total

    def tell_last_step(self) -> None:
        """Take note of what all ranks counted and left out in the last step; every rank must call it."""
        if self._last_step is None:
            return
        (left_out, numbers), self._last_step = self._last_step, None
        labels, found, signal = (*numbers.tolist(), 0, 0)[:3]
        self.stopping.agree(signal)
        if found:  # on every rank alike
            kinds = zip(*gather(left_out), strict=True)
            self.left_out.add(*([record for part in kind for record in part] for kind in kinds))
        self.left_out.step(labels)

    def get_train_dataloader(self):
        if self.packing is None:
            loader = super().get_train_dataloader()
        else:
            sampler = self._get_train_sampler()
            rows = self.packing.loader(self.train_dataset, sampler, self.data_collator, self.args)
            loader = self.accelerator.prepare(rows)
        own = getattr(loader, "base_dataloader", loader)  # a wrapper tells what its own has, but does not set it
        own.worker_init_fn = in_worker(own.worker_init_fn)
        if own.num_workers:
            own.multiprocessing_context = worker_context(own.multiprocessing_context)
        return loader

    def train(self, *args, **kwargs):
        """As `Trainer`'s.

        Raises:
            LlavaError: too many records were left out, or no step had anything to learn.
        """
        result = super().train(*args, **kwargs)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is None:
            rank0_print("load_best_model_at_end: there is no best checkpoint, the model is that of the last step")
        self.tell_last_step()
        self.left_out.check_labelled()
        return result

    def _prepare_inputs(self, inputs):
        """As `Trainer`'s, but for what must not become DeepSpeed's bfloat16."""
        names = [name for name in self.float32_inputs if name in inputs]
        apart = {name: [value.to(self.args.device) for value in inputs[name]] for name in names}
        rest = {name: value for name, value in inputs.items() if name not in apart}
        return super()._prepare_inputs(rest) | apart

    # --- step ---

    def training_step(self, model, inputs, *args, **kwargs):
        self.numbers.batch(inputs)
        return super().training_step(model, inputs, *args, **kwargs)

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.numbers.gradient(norm)
        return norm

    def log(self, logs, *args, **kwargs):
        super().log(self.numbers.corrected(self.step_log.added_to(logs)), *args, **kwargs)

    # --- evaluation ---

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """What `run_evaluation` measures, logged; every rank must call it. A run that is to end saves instead."""
        from llava.train.evaluation import run_evaluation

        metrics = run_evaluation(self, self.evaluation)
        if metrics is None:
            self._save_checkpoint(self.model, None)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _load_best_model(self):
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        elif is_adapted(self.model):
            restore_lora(self.model, self.state.best_model_checkpoint)
        elif not self.family.restore(self.accelerator.unwrap_model(self.model), self.state.best_model_checkpoint):
            super()._load_best_model()

    # --- optimizer ---

    def create_optimizer(self, model=None):
        if isinstance(self.optimizer, DummyOptim):  # DeepSpeed's file names the optimizer, and DeepSpeed makes it
            self.optimizer.params = self._groups_for_deepspeed()
            return self.optimizer
        made = self.optimizer is None
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        if made:
            optimizer.param_groups = self.family.parameter_groups(optimizer.param_groups, self.model, self.args)
        return optimizer

    def _groups_for_deepspeed(self) -> list[dict]:
        """Parameters with and without weight decay, as transformers groups them, and then as the family does: it hands
        on parameters without groups, which would all have one learning rate and one decay."""
        decayed = set(self.get_decay_parameter_names(self.model))
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        groups = [
            {
                "params": [p for name, p in trained if (name in decayed) == decays],
                "weight_decay": self.args.weight_decay if decays else 0.0,
                "lr": self.args.learning_rate,
            }
            for decays in (True, False)
        ]
        return self.family.parameter_groups([group for group in groups if group["params"]], self.model, self.args)

    # --- checkpoints ---

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        with readable_state(self, resume_from_checkpoint) as folder:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, folder)
        self.family.on_prepared(self.accelerator.unwrap_model(self.model))
        return prepared

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            draw_missing_numbers(self, checkpoint)

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
        """What a folder without a whole model needs to be loaded."""
        self.family.on_save(self.accelerator.unwrap_model(self.model), self.processing_class, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if is_adapted(self.model):
            restore_lora(self.model, resume_from_checkpoint)
        elif not self.family.restore(self.accelerator.unwrap_model(self.model), resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        """As `Trainer`'s; of a checkpoint that lacks a part of the state, the rest. The learning rates are those of
        this run's schedule."""
        schedule, step = unwrapped(self.lr_scheduler), self.state.global_step
        rates = getattr(schedule, "base_lrs", None)
        in_engine = schedule is not self.lr_scheduler  # DeepSpeed loads it with the rest of its state
        elsewhere = self.is_deepspeed_enabled or self.is_fsdp_enabled  # the optimizer's state, in files of their own
        optimizer, scheduler = optimizer_file(checkpoint), has_scheduler(checkpoint)
        try:
            if in_engine or (scheduler and (optimizer or elsewhere)):
                super()._load_optimizer_and_scheduler(checkpoint)
                step = getattr(schedule, "last_epoch", step)  # less than the steps where fp16 skipped some
            elif optimizer:
                self.optimizer.load_state_dict(torch.load(optimizer, map_location="cpu", weights_only=True))
        except ValueError as error:  # the numbers of parameters differ
            reason = " ".join(str(error).split())
            raise LlavaError(f"{checkpoint}: its optimizer is of another run ({reason}), expected this one's") from None
        if not (optimizer or elsewhere):
            rank0_print(
                f"{checkpoint}: holds no optimizer state (save_only_model): its moments begin anew, the learning rate "
                f"goes on from step {step}"
            )
        elif not (scheduler or in_engine):
            rank0_print(f"{checkpoint}: holds no scheduler state: the learning rate goes on from step {step}")
        go_on(schedule, rates, step)

    @during("saving of a checkpoint")
    def _save_checkpoint(self, model, trial):
        """As `Trainer`'s, by way of `llava.train.saving`.

        Raises:
            Preempted: the run is to end here, and the checkpoint is whole.
        """
        self.tell_last_step()  # before what was left out up to here is written
        self.numbers.check_weights()
        with self.stopping.while_saving():
            final = save_checkpoint(self, lambda folder: self._write_checkpoint(folder, model, trial))
        self.run_state.tell("running", self.state.global_step)
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(final))
        if self.stopping.agreed and self.state.global_step < self.state.max_steps:
            raise Preempted(self.stopping.agreed, self.state.global_step)

    def _write_checkpoint(self, folder: Path, model, trial) -> None:
        """Write the files of a checkpoint into a folder; every rank calls it."""
        args, state = self.args, self.state
        if args.should_save:
            self.save_run(folder)
            self.left_out.save(folder)
            self.position.save(folder, state.global_step)
        self._saved_in = folder.parent
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saved_in = None
        if state.best_model_checkpoint == str(folder):  # it will be found in its place
            state.best_model_checkpoint = os.path.join(args.output_dir, folder.name)
            if args.should_save:
                state.save_to_json(folder / STATE_NAME)
        if self.keeps_projector_alone:
            self.save_projector(folder)

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._saved_in is None else str(self._saved_in)

    def _push_from_checkpoint(self, checkpoint_folder):
        """Nothing while a checkpoint is written: it is sent when it is in its place."""

    def save_run(self, folder: str) -> None:
        """Write what the run is: its settings, and how many records it has."""
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, RUN_NAME), "w") as file:
            json.dump({**self.args.run_config.to_dict(), "records": len(self.train_dataset)}, file, indent=2)

    def save_projector(self, folder: str) -> None:
        """Write the projector (newline, token compressor) alone; every rank must call it."""
        state = projector_state(self.accelerator.unwrap_model(self.model).named_parameters())
        if self.args.should_save:
            save_projector(state, folder)
