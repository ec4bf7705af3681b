"""Settings of the evaluation in training that contradict each other."""

from llava.config.checks import together
from llava.errors import LlavaError

SCHEDULES_BY_METRIC = ("reduce_lr_on_plateau", "greedy")  # of learning rates
_NEEDS_EVALUATION = ("do_eval", "eval_data_path", "eval_exact_match", "eval_blank_images")
_NEEDS_STRATEGY = ("load_best_model_at_end", "metric_for_best_model")


def check_evaluation(run) -> None:
    """Raise `LlavaError` for an evaluation without data, settings of one that never takes place, and a
    `metric_for_best_model` that is not measured."""
    strategy = str(run["eval_strategy"] or "no")
    if strategy == "no":
        _check_without(run)
    if (strategy != "no" or run["eval_on_start"]) and run["eval_data_path"] is None:
        asked = "eval_on_start" if strategy == "no" else "eval_strategy"
        raise LlavaError(together(run, asked, "eval_data_path", "records to evaluate on"))
    if run["eval_blank_images"] and not run["eval_exact_match"]:
        raise LlavaError(together(run, "eval_blank_images", "eval_exact_match", "eval_exact_match too"))
    _check_metric(run)
    if run["load_best_model_at_end"] and run["save_only_model"] and run["deepspeed"]:
        raise LlavaError(
            together(run, "save_only_model", "load_best_model_at_end", "whole checkpoints: DeepSpeed loads no others")
        )


def _check_without(run) -> None:
    """Nothing asks for what an evaluation after some of the steps would measure."""
    names = _NEEDS_STRATEGY if run["eval_on_start"] else (*_NEEDS_EVALUATION, *_NEEDS_STRATEGY)
    asked = next((name for name in names if run[name]), "save_strategy" if run["save_strategy"] == "best" else None)
    if asked:
        raise LlavaError(together(run, asked, "eval_strategy", "eval_strategy steps or epoch, and eval_data_path"))


def _check_metric(run) -> None:
    """`metric_for_best_model` is one that these settings measure; the kinds of questions show in the data."""
    metric = run["metric_for_best_model"]
    name, asks = (metric or "loss").removeprefix("eval_"), run["eval_exact_match"]
    known = ["loss", *(["exact_match", "exact_match_KIND"] if asks else [])]
    known += ["blank_images_exact_match"] if run["eval_blank_images"] else []
    if name not in known and not (asks and name.startswith("exact_match_")):
        listed = ", ".join(f"eval_{name}" for name in known)
        more = "" if asks else "; with eval_exact_match also eval_exact_match"
        where = run.source("metric_for_best_model")
        raise LlavaError(f"{where}: metric_for_best_model is {metric!r}, expected one of {listed}{more}")
    schedule, options = run["lr_scheduler_type"], run["lr_scheduler_kwargs"] or {}
    if schedule in SCHEDULES_BY_METRIC and isinstance(options, dict):
        found, expected = options.get("mode", "min"), "max" if greater_is_better(run) else "min"
        if found != expected:
            raise LlavaError(
                f"{run.source('lr_scheduler_type')}: lr_scheduler_type {schedule} takes a {found}imum of eval_{name} "
                f"for the best, expected lr_scheduler_kwargs with mode {expected}"
            )


def greater_is_better(run) -> bool:
    """What is better of `metric_for_best_model`, as the run says or else as the metric is: the loss alone falls."""
    given = run["greater_is_better"]
    return (run["metric_for_best_model"] or "loss").removeprefix("eval_") != "loss" if given is None else given
