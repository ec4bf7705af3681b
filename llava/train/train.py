"""Train a vision-language model of any family: `python -m llava.train.train [CONFIG.yaml] [--key value ...]`.

Also `python llava/train/train_mem.py <flags>`, as LLaVA-NeXT is launched. The same code runs as one CPU process and
under `torchrun` or `deepspeed` on many GPUs.
"""

import time

from llava.errors import report_errors, report_interrupts
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
from llava.utils import is_rank0, rank0_print

__all__ = ["check_own", "checkpoint_to_resume", "finished_steps", "open_output", "remove_run", "run", "save", "train"]


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
    try:
        _train(model_args, data_args, training_args, make)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(*(stop.args or [how_to_go_on(training_args, None)])) from None
    finally:
        leave_process_group()


def leave_process_group():
    """End this process's part in a distributed run; without it the process may abort at its exit."""
    import torch

    # a process that ends inside its group aborts under ZeRO-2
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gloo = torch.distributed.get_backend() == "gloo"
        torch.distributed.destroy_process_group()
        if gloo:  # its threads let go of the last tensors a moment late, and abort if Python is shutting down by then
            time.sleep(0.5)


def _train(model_args, data_args, training_args, make):
    from transformers import set_seed

    from llava.data import load_records, make_data
    from llava.families import family_of
    from llava.families.precision import Precision
    from llava.families.training import tunable_parts
    from llava.train.evaluation import make_evaluation
    from llava.train.llava_trainer import LLaVATrainer
    from llava.train.lora import adapt
    from llava.train.parts import set_trainable
    from llava.train.preview import show_samples

    family = family_of(model_args.model_name_or_path)
    settings = training_args.run_config
    family.check(settings)
    if training_args.verbose_logging:
        for key, setting in settings.settings.items():
            rank0_print(f"{key}: {setting.value} ({setting.source})")
    if not open_output(training_args, lambda: len(load_records(data_args.data_path, training_args.seed))):
        return
    checkpoint = checkpoint_to_begin_at(training_args)
    if checkpoint is not None:
        check_checkpoint(checkpoint, training_args)
    if training_args.deepspeed:
        import deepspeed

        deepspeed.init_distributed()  # ZeRO-3 asks for the world size while the model is built
    origins = family.check_fit(settings)
    records, held_out = _read_data(family, model_args, data_args, training_args)
    set_seed(training_args.seed)  # projector, newline token, new embeddings and adapters are drawn here
    loaded, args = (make or family.prepare)(model_args, data_args, training_args)
    data, model = make_data(records, family, loaded, args), loaded.model
    show_samples(data["train_dataset"])
    if training_args.lora_enable:
        model = adapt(model, model_args, training_args)
    parts = tunable_parts(model_args, training_args)
    set_trainable(model, parts, training_args.lora_bias, family)
    for part, origin in origins.items():
        rank0_print(f"{part}: {origin} ({'trained' if part in parts else 'frozen'})")
    Precision.of(training_args).apply(model)
    evaluation = held_out and make_evaluation(*held_out, family, loaded, args, training_args.eval_image_folder)
    trainer = LLaVATrainer(
        **{"model": model, "processing_class": loaded.processor, "args": training_args, "family": family},
        **{"parts": parts, "evaluation": evaluation, **data},
    )
    _take_steps(trainer, checkpoint)


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
    reopen(args)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        save(trainer, args.output_dir)
    except KeyboardInterrupt:
        for callback in trainer.callback_handler.callbacks:
            if getattr(callback, "training_bar", None) is not None:
                callback.training_bar.close()  # else it is drawn again below what is said
        raise KeyboardInterrupt(how_to_go_on(args, trainer.state.global_step)) from None


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
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.config.get_text_config().use_cache = True
    if trainer.keeps_projector_alone:
        trainer.save_projector(out)
        if is_rank0():
            trainer.save_description(out)
    else:
        trainer.save_model(out)
    if is_rank0():
        trainer.save_run(out)
    trainer.accelerator.wait_for_everyone()
    trainer.save_state()  # last: its presence says that the run has ended
    if trainer.left_out.bad:
        rank0_print(f"records left out: {len(trainer.left_out.bad)}")
    if trainer.left_out.no_label:
        rank0_print(f"records left out because they have nothing to learn: {len(trainer.left_out.no_label)}")
    if truncated := trainer.train_dataset.stats["truncated"]:
        rank0_print(f"samples cut to model_max_length: {truncated}")
    rank0_print(f"saved to {out}")


if __name__ == "__main__":
    train()
