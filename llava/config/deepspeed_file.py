"""The check of a DeepSpeed configuration before a run: DeepSpeed itself reads it late, and some of it in silence."""

import difflib
import json
from pathlib import Path

from llava.errors import LlavaError

# entry -> keys of the run that it repeats, which must say the same (transformers fills them in where it is "auto")
_REPEATED = {
    "train_micro_batch_size_per_gpu": ("per_device_train_batch_size",),
    "gradient_accumulation_steps": ("gradient_accumulation_steps",),
    "gradient_clipping": ("max_grad_norm",),
    "optimizer.params.lr": ("learning_rate",),
    "optimizer.params.betas": ("adam_beta1", "adam_beta2"),
    "optimizer.params.eps": ("adam_epsilon",),
    "optimizer.params.weight_decay": ("weight_decay",),
    "scheduler.params.warmup_max_lr": ("learning_rate",),
    "fp16.enabled": ("fp16",),
    "bf16.enabled": ("bf16",),
}
_QUANTISED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
_KNOWN = ("zero_optimization", "train_batch_size", *dict.fromkeys(name.split(".")[0] for name in _REPEATED))


def check_deepspeed(run) -> None:
    """Raise `LlavaError` for a resolved run whose `deepspeed` is no configuration, or one that contradicts the run."""
    if not run["deepspeed"]:
        return
    content, where = _content(run)
    for name in content.keys() - set(_KNOWN):  # DeepSpeed takes no notice of what it does not know
        near = difflib.get_close_matches(name, _KNOWN, n=1, cutoff=0.8)
        if near:
            raise LlavaError(f"{where}: unknown key {name!r}; did you mean {near[0]!r}?")
    zero = content.get("zero_optimization", {})
    if not isinstance(zero, dict) or type(zero.get("stage", 0)) is not int or not 0 <= zero.get("stage", 0) <= 3:
        raise LlavaError(f"{where}: zero_optimization is {zero!r}, expected a mapping with a stage of 0 to 3")
    for name, keys in _REPEATED.items():
        found, values = _entry(content, name), [run[key] for key in keys]
        expected = values if len(keys) > 1 else values[0]
        if found not in (None, "auto", expected):
            raise LlavaError(
                f"{where}: {name} is {found!r}, but {' and '.join(keys)} ({run.source(keys[0])}) is {expected!r}; "
                'expected the same, or "auto"'
            )


def check_zero_plus_plus(run, cuda: bool, world_size: int) -> None:
    """Raise `LlavaError` for ZeRO++ (arXiv 2306.10209) that the devices of a run that is checked cannot compute."""
    content, where = _content(run)
    zero = content.get("zero_optimization", {})
    quantised = [name for name in _QUANTISED if zero.get(name)]
    if quantised and not cuda:
        raise LlavaError(f"{where}: {quantised[0]} needs CUDA devices; scripts/zero3.json does without")
    group = zero.get("zero_hpz_partition_size", 1)
    if type(group) is int and world_size % max(min(group, world_size), 1):
        raise LlavaError(
            f"{where}: zero_hpz_partition_size is {group}, which does not divide the {world_size} processes; "
            "expected the GPUs of a node"
        )


def _content(run) -> tuple[dict, str]:
    """The configuration of a run that has one, and where it is from."""
    given, where = run["deepspeed"], f"{run.source('deepspeed')}: deepspeed"
    content = given if isinstance(given, dict) else _read(given, where)
    return content, given if isinstance(given, str) and not given.startswith("{") else where


def _read(given: str, where: str) -> dict:
    path = Path(given)
    if not given.startswith("{"):
        if not path.is_file():
            raise LlavaError(f"{where}: {given}: no such file, expected a DeepSpeed configuration (JSON)")
        where = given
    try:
        content = json.loads(given if given.startswith("{") else path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LlavaError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise LlavaError(f"{where}: found {type(content).__name__}, expected a mapping")
    return content


def _entry(content: dict, name: str):
    for part in name.split("."):
        if not isinstance(content, dict):
            return None
        content = content.get(part)
    return content
