"""Optimizer, schedule and reports, made once on the side: what they do not take is told before anything is loaded."""

import contextlib
import importlib.util
import inspect

from llava.config.reporting import check_reports, report_names
from llava.errors import LlavaError

STEPS = 1000  # of the trial's schedule where the run's own are not known yet
# first letters of optimizers that are made for a model's own layers -> the package that they need
OF_A_MODEL = {"galore": "galore_torch", "apollo": "apollo_torch", "lomo": "lomo_optim", "adalomo": "lomo_optim"}
OF_THE_RUN = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")  # a schedule's arguments
OF_TRANSFORMERS = ("every_n_layers", "offload")  # of checkpointing's arguments, those that are not PyTorch's
NOT_GIVEN = {"function", "args", "kwargs"}
PACKAGES = {"lora_enable": "peft", "use_liger_kernel": "liger_kernel"}
EXTRAS = {"peft": "train", "liger_kernel": "liger"}  # package -> the extra of this project that brings it


def try_settings(training_args, run) -> None:
    """Raise `LlavaError` for settings that transformers would refuse only after the model is loaded.

    Args:
        training_args: the run's `TrainingArguments`.
        run: its resolved `Run`.
    """
    check_reports(run)
    for name in report_names(training_args.report_to):
        _try_report(name)
    for name, package in PACKAGES.items():
        if getattr(training_args, name):
            _need(package, name)
    _check_words(training_args, run)
    _try_optimizer(training_args)
    _try_schedule(training_args)


def _check_words(args, run) -> None:
    """What transformers finds wrong only when it trains."""
    import torch

    if isinstance(getattr(args, "parallelism_config", None), str):
        raise LlavaError(f"parallelism_config is {args.parallelism_config!r}, expected none: it is an object of Python")
    if args.save_strategy == "best" and not args.metric_for_best_model:
        raise LlavaError("save_strategy is best without metric_for_best_model, expected both")
    if args.fsdp and args.parallel_mode.value != "distributed":
        raise LlavaError(f"fsdp is {args.fsdp} in a run of one process, expected several (torchrun)")
    dealt = args.accelerator_config
    if run["pack_sequences"] and (dealt.split_batches or dealt.dispatch_batches):
        raise LlavaError(
            f"accelerator_config: found split_batches {dealt.split_batches} and dispatch_batches "
            f"{dealt.dispatch_batches}, expected neither with pack_sequences: a row goes to one rank as it is"
        )
    taken = {*inspect.signature(torch.utils.checkpoint.checkpoint).parameters, *OF_TRANSFORMERS} - NOT_GIVEN
    for key in args.gradient_checkpointing_kwargs or {}:
        if key not in taken:
            raise LlavaError(f"gradient_checkpointing_kwargs: found {key!r}, expected {', '.join(sorted(taken))}")


def _try_report(name: str) -> None:
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    with _told(f"report_to: {name}"):
        for callback in get_reporting_integration_callbacks([name]):
            callback()


def _try_optimizer(args) -> None:
    """`optim` with `optim_args`; not where DeepSpeed's file names an optimizer of its own."""
    import torch
    from transformers import Trainer

    name = str(getattr(args.optim, "value", args.optim))
    if _deepspeed_has(args, "optimizer"):
        return
    package = next((package for start, package in OF_A_MODEL.items() if name.startswith(start)), None)
    if package:
        _need(package, f"optim {name}")
        if package != "lomo_optim" and not args.optim_target_modules:
            raise LlavaError(f"optim: {name} needs optim_target_modules, expected names of layers")
        return
    given = f" with optim_args {args.optim_args}" if args.optim_args else ""
    with _told(f"optim: {name}{given}"):
        make, options = Trainer.get_optimizer_cls_and_kwargs(args)
        make([torch.nn.Parameter(torch.zeros(1))], **options)


def _try_schedule(args) -> None:
    """`lr_scheduler_type` with `lr_scheduler_kwargs`; not where DeepSpeed's file names a schedule of its own."""
    import torch
    from transformers import get_scheduler
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    if _deepspeed_has(args, "scheduler"):
        return
    steps = args.max_steps if args.max_steps > 0 else STEPS
    name, options = args.lr_scheduler_type.value, args.lr_scheduler_kwargs or {}
    if not isinstance(options, dict):
        raise LlavaError(f"lr_scheduler_kwargs is {options!r}, expected a mapping")
    parameters = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[name]).parameters
    taken = [key for key in parameters if key not in OF_THE_RUN]
    unknown = [key for key in options if key not in taken and "kwargs" not in taken]  # some pass on what they get
    if unknown:
        raise LlavaError(
            f"lr_scheduler_kwargs: found {unknown[0]!r}, expected {', '.join(taken) or 'none'} with lr_scheduler_type "
            f"{name}"
        )
    given = f" with lr_scheduler_kwargs {options}" if options else ""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    with _told(f"lr_scheduler_type: {name}{given}"):
        schedule = get_scheduler(
            name,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=options,
        )
        if name not in ("reduce_lr_on_plateau", "greedy"):  # which step by a measured number
            optimizer.step()
            schedule.step()


def _deepspeed_has(args, section: str) -> bool:
    return bool(args.deepspeed) and section in args.hf_deepspeed_config.config


def _need(package: str, key: str) -> None:
    if not importlib.util.find_spec(package):
        how = f": pip install -e '.[{EXTRAS[package]}]'" if package in EXTRAS else ""
        raise LlavaError(f"{key} needs the package {package}, expected it installed{how}")


@contextlib.contextmanager
def _told(what: str):
    """Whatever is raised inside in one line about `what`."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"{reason} is missing"
        raise LlavaError(f"{what}: {reason}") from error
