"""Train a vision-language model of any family: `python -m llava.train.train [CONFIG.yaml] [--key value ...]`.

Also `python llava/train/train_mem.py <flags>`, as LLaVA-NeXT is launched. The same code runs as one CPU process and
under `torchrun` or `deepspeed` on many GPUs.
"""

import importlib
import os
import sys
from dataclasses import replace
from functools import partial

from llava.errors import report_errors, report_interrupts
from llava.train.checkpoints import STATE_NAME
from llava.train.launcher import under_launcher
from llava.train.phases import enter
from llava.train.process_groups import leave_process_group, limit_groups
from llava.train.ranks import check_seen_by_all, from_rank0, of_rank0
from llava.train.resume import (
    check_own,
    checkpoint_to_begin_at,
    checkpoint_to_resume,
    finished_steps,
    how_to_go_on,
    open_output,
    remove_run,
    reopen,
)
from llava.train.run_state import RunState, one_run
from llava.train.saving import final_model
from llava.train.stopping import Preempted, Stopping, in_worker
from llava.train.warned_once import warned_once
from llava.train.watch import watched
from llava.utils import is_rank0, rank0_print

__all__ = ["check_own", "checkpoint_to_resume", "finished_steps", "open_output", "remove_run", "run", "save", "train"]

# what programs of LLaVA-NeXT's users import from here, imported when it is first used
_OF_USERS = {
    "user_data": (
        *("preprocess", "preprocess_multimodal", "preprocess_plain", "preprocess_v1", "preprocess_llama_2"),
        *("preprocess_mpt", "preprocess_gemma", "preprocess_qwen", "preprocess_llama3", "LazySupervisedDataset"),
        *("DataCollatorForSupervisedDataset", "make_supervised_data_module", "conversation_lib"),
    ),
    "user_state": (
        *("maybe_zero_3", "get_mm_adapter_state_maybe_zero_3", "get_peft_state_maybe_zero_3"),
        *("get_peft_state_non_lora_maybe_zero_3", "find_all_linear_names", "safe_save_model_for_hf_trainer"),
        "smart_tokenizer_and_embedding_resize",
    ),
    "user_arguments": ("ModelArguments", "DataArguments"),
    "arguments": ("TrainingArguments",),
    "llava_trainer": ("LLaVATrainer",),
}
_HOMES = {name: home for home, names in _OF_USERS.items() for name in names}


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"llava.train.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@under_launcher
@report_errors
@report_interrupts
def train(argv=None):
    """Train as the arguments say, resume where a checkpoint lies in `output_dir`, save; see `llava.config`."""
    from llava.train.arguments import parse_args

    run(*parse_args(argv))


def run(model_args, data_args, training_args, make=None):
    """One run.

    Args:
        model_args, data_args, training_args: of `parse_args`.
        make: in place of the `prepare` of the model's family.
    """
    args = training_args
    state = RunState(args.output_dir, args.should_save)
    stopping = Stopping(args.save_grace_seconds, lambda: how_to_go_on(args, state.step))
    try:
        _meet(args)
        told = state.told_at_the_end(lambda step: how_to_go_on(args, step))
        with warned_once() as once, stopping, watched(args.ddp_timeout, once), one_run(args), told:
            _train(model_args, data_args, args, make, state, stopping)
    except Preempted as stop:
        rank0_print(f"stopped by {stop}")
    finally:
        leave_process_group(sys.exc_info()[1])


def _meet(training_args) -> None:
    """Meet the other ranks, if there are any; no group waits for longer than `ddp_timeout`."""
    if training_args.deepspeed:
        import deepspeed

        # before anything else: ZeRO-3 builds the model by the world size
        deepspeed.init_distributed(timeout=training_args.ddp_timeout_delta)
    limit_groups(training_args.ddp_timeout)


def _train(model_args, data_args, training_args, make, state, stopping):
    from llava.families import family_of

    family = family_of(model_args.model_name_or_path)
    settings = training_args.run_config
    family.check(settings)
    if training_args.verbose_logging:
        for key, setting in settings.settings.items():
            rank0_print(f"{key}: {setting.value} ({setting.source})")
    count = partial(_count_records, data_args, training_args)
    if not from_rank0(lambda: open_output(training_args, count)):
        return
    checkpoint = from_rank0(lambda: checkpoint_to_begin_at(training_args))
    if checkpoint is not None:
        check_seen_by_all(os.path.join(checkpoint, STATE_NAME), "an output_dir that all machines share")
        check_checkpoint(checkpoint, training_args)
    trainer = make_trainer(model_args, data_args, training_args, make=make, run_state=state, stopping=stopping)
    enter("preparation of the training")
    _take_steps(trainer, checkpoint)


def make_trainer(model_args, data_args, training_args, *, make=None, run_state=None, stopping=None, first=None):
    """The `LLaVATrainer` of a run that has passed its family's `check`, ready to take steps; nothing is written.

    Args:
        model_args, data_args, training_args: of `parse_args`.
        make: in place of the `prepare` of the model's family.
        run_state, stopping: as the trainer's.
        first: how many of the records are trained on, the first ones; None: all.

    Raises:
        LlavaError: parts, records or settings that do not go together.
    """
    from transformers import set_seed

    from llava.data import make_data
    from llava.families import family_of
    from llava.families.precision import Precision
    from llava.families.training import tunable_parts
    from llava.train.evaluation import make_evaluation
    from llava.train.llava_trainer import LLaVATrainer
    from llava.train.lora import adapt
    from llava.train.parts import set_trainable
    from llava.train.preview import show_samples
    from llava.train.speed import speed_up

    family = family_of(model_args.model_name_or_path)
    origins = family.check_fit(training_args.run_config)
    enter("reading of records")
    records, held_out = _read_data(family, model_args, data_args, training_args)
    records = records if first is None else records.first(first)
    enter("loading of the model")
    set_seed(training_args.seed)  # projector, newline token, new embeddings and adapters are drawn here
    loaded, args = (make or family.prepare)(model_args, data_args, training_args)
    data, model = make_data(records, family, loaded, args), loaded.model
    show_samples(data["train_dataset"])
    speed_up(model, training_args)
    if training_args.lora_enable:
        model = adapt(model, model_args, training_args)
    parts = tunable_parts(model_args, training_args)
    set_trainable(model, parts, training_args.lora_bias, family, training_args.mm_vision_tower_trainable_blocks)
    _tell_parts(family, model, parts, origins, training_args)
    precision = Precision.of(training_args)
    precision.apply(model)
    family.check_precision(model, precision)
    packing = _packing(data["train_dataset"], data_args, training_args, model.config)
    padded = replace(args, pack_sequences=False)
    evaluation = held_out and make_evaluation(*held_out, family, loaded, padded, training_args.eval_image_folder)
    return LLaVATrainer(
        **{"model": model, "processing_class": loaded.processor, "args": training_args, "family": family},
        **{"parts": parts, "evaluation": evaluation, "run_state": run_state, "stopping": stopping},
        packing=packing,
        **data,
    )


def _tell_parts(family, model, parts, origins, training_args) -> None:
    """Where each part starts from, and the rates of the vision tower's blocks where they differ."""
    from llava.families.rates import decay_preview

    for part, origin in origins.items():
        rank0_print(f"{part}: {origin} ({'trained' if part in parts else 'frozen'})")
    preview = decay_preview(family, model, training_args) if "mm_vision_tower" in parts else None
    if preview:
        rank0_print(preview)


def _packing(dataset, data_args, training_args, config):
    """How the run's samples share rows; None: one to a row."""
    if not data_args.pack_sequences:
        return None
    from llava.data.lengths import record_lengths
    from llava.data.packed_loading import Packing

    enter("reading of lengths")
    of_data = dataset.records, dataset.family, dataset.loaded, dataset.args
    lengths = of_rank0(record_lengths(*of_data, worker_init_fn=in_worker()))
    return Packing.of(dataset, lengths, data_args, training_args, config)


def _count_records(data_args, training_args) -> int:
    from llava.data import load_records

    return len(load_records(data_args.data_path, training_args.seed))


def _read_data(family, model_args, data_args, training_args):
    """The checked records to train on, and records and questions to evaluate on, or None."""
    from llava.data import read_records
    from llava.data.records import media_kinds
    from llava.train.evaluation import evaluates, read_evaluation

    rules = {"version": family.record_template(model_args), "refused": family.refused_media(model_args)}
    records = read_records(data_args, seed=training_args.seed, **rules)
    held_out = read_evaluation(data_args, training_args, **rules) if evaluates(training_args) else None
    kinds = media_kinds(records) | (media_kinds(held_out[0]) if held_out else set())
    family.check_media(training_args.run_config, kinds)
    return records, held_out


def _take_steps(trainer, checkpoint: str | None) -> None:
    """Train from the beginning or from a checkpoint on, and save."""
    args = trainer.args
    if checkpoint is not None:
        rank0_print(f"resuming from {checkpoint}")
        trainer.left_out.load(checkpoint)
        trainer.position.load(checkpoint)
    trainer.accelerator.wait_for_everyone()  # each has seen what the folder holds
    reopen(args, trainer.run_state, checkpoint)
    try:
        with trainer.stopping.at_steps():
            trainer.train(resume_from_checkpoint=checkpoint)
        save(trainer, args.output_dir)
    except (KeyboardInterrupt, Preempted) as stop:
        for callback in trainer.callback_handler.callbacks:
            if getattr(callback, "training_bar", None) is not None:
                callback.training_bar.close()  # else it is drawn again below what is said
        stop.step = trainer.state.global_step
        raise


def check_checkpoint(checkpoint: str, training_args) -> None:
    """Refuse to go on from a checkpoint that is not this run's, or lacks what the run needs; no weight is read.

    Raises:
        LlavaError: what is wrong.
    """
    from llava.train.kinds import check_carried
    from llava.train.same_model import check_same_model
    from llava.train.schedule import check_state

    check_carried(checkpoint, training_args)
    check_state(checkpoint, training_args)
    check_same_model(checkpoint, training_args.run_config)


def save(trainer, out: str):
    """Leave the trained model in `out`: all of it, or after LLaVA's stage 1 the projector alone."""
    enter("saving of the model")
    trainer.numbers.check_weights()
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.config.get_text_config().use_cache = True
    with final_model(trainer) as folder:
        if trainer.keeps_projector_alone:
            trainer.save_projector(folder)
            if is_rank0():
                trainer.save_description(folder)
        else:
            trainer.save_model(folder)
        if is_rank0():
            trainer.save_run(folder)
    trainer.save_state()
    trainer.run_state.tell("finished", trainer.state.global_step)  # last: it says that the run has ended
    if trainer.left_out.bad:
        rank0_print(f"records left out: {len(trainer.left_out.bad)}")
    if trainer.left_out.no_label:
        rank0_print(f"records left out because they have nothing to learn: {len(trainer.left_out.no_label)}")
    if trainer.numbers.skipped:
        rank0_print(f"steps skipped, not finite: {trainer.numbers.skipped} ({trainer.numbers.file.path})")
    if truncated := trainer.train_dataset.stats["truncated"]:
        rank0_print(f"samples cut to model_max_length: {truncated}")
    rank0_print(f"saved to {out}")


if __name__ == "__main__":
    train()
