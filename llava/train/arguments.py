"""A training run's arguments: `parse_args` turns a command line into what the trainer reads.

The LLaVA fields of `TrainingArguments` are generated from the keys of the config package, so a key exists once. The
class is made at first use, since it needs transformers; `--help` and errors in a config come before that.
"""

import dataclasses
import os
import socket
import sys
import warnings
from functools import cache
from types import SimpleNamespace
from typing import Any

from llava.config import Run, resolve
from llava.config.commandline import WHERE
from llava.config.deepspeed_file import check_deepspeed, check_zero_plus_plus
from llava.config.evaluation import greater_is_better
from llava.config.reporting import check_reports
from llava.config.schema import own_keys
from llava.errors import LlavaError
from llava.train.compile_lock import tell_compilation
from llava.train.devices import check_devices
from llava.train.process_groups import limit_new_groups
from llava.train.trial import try_settings
from llava.utils import rank0_print


def parse_args(argv: list[str] | None = None) -> tuple[SimpleNamespace, SimpleNamespace, Any]:
    """(model_args, data_args, training_args) from `[CONFIG.yaml] [--key value ...]`; `argv` None: this program's.

    model_args and data_args carry the attributes of LLaVA-NeXT's ModelArguments and DataArguments and this project's
    own; training_args is a `TrainingArguments` with the resolved run (values and sources) in its `run_config`.
    `--help` prints the keys and ends the program. Raises `LlavaError` for a fault in the command line or a file.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--help" in argv or "-h" in argv:
        from llava.config.table import help_text

        print(help_text())
        raise SystemExit(0)
    run = resolve(argv)
    if run["output_dir"] is None:
        raise LlavaError("output_dir is not set, expected the folder that the run writes to (--output_dir)")
    check_devices(bool(run["use_cpu"]), argv)
    training_args = make_training_arguments(run)
    try_settings(training_args, run)
    for notice in run.notices:
        rank0_print(f"note: {notice}", file=sys.stderr)
    model_args = SimpleNamespace(**run.group("model"))
    data_args = SimpleNamespace(**run.group("data"))
    data_args.mm_use_im_start_end = model_args.mm_use_im_start_end
    return model_args, data_args, training_args


@cache
def training_arguments_class() -> type:
    """`transformers.TrainingArguments` with the keys of the group train as fields (theirs keep their types)."""
    import transformers

    theirs = {field.name: field.type for field in dataclasses.fields(transformers.TrainingArguments)}
    fields = [
        (
            key.name,
            theirs.get(key.name, key.type),
            dataclasses.field(default=key.default, metadata={"help": key.description}),
        )
        for key in own_keys().values()
        if key.group == "train"
    ]
    return dataclasses.make_dataclass(
        "TrainingArguments",
        fields,
        bases=(transformers.TrainingArguments,),
        namespace={"__module__": __name__, "__doc__": "transformers.TrainingArguments with LLaVA's fields."},
        repr=False,
    )


def __getattr__(name: str):
    if name == "TrainingArguments":
        return training_arguments_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def make_training_arguments(run: Run):
    """The `TrainingArguments` of a resolved run, after falling back from what this machine cannot do."""
    check_deepspeed(run)
    values = _values(run)
    _fall_back(values, run)
    if values.get("logging_dir"):
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", values["logging_dir"])
    limit_new_groups(values.get("ddp_timeout", training_arguments_class().ddp_timeout))
    training_args = _make(values)
    mismatches = getattr(getattr(training_args, "hf_deepspeed_config", None), "mismatches", ())
    if mismatches:  # transformers says so when the model is loaded
        raise LlavaError(f"{run['deepspeed']}: {'; '.join(line.removeprefix('- ') for line in mismatches)}")
    training_args.run_config = run
    return training_args


def check_training_arguments(run: Run) -> None:
    """Raise `LlavaError` for what a run would be refused for on the machine that it is for; no device is looked at, and
    no DeepSpeed."""
    check_reports(run)
    check_deepspeed(run)
    values = {name: value for name, value in _values(run).items() if name not in _NEEDS_DEVICE}
    try_settings(_make({**values, "deepspeed": None, "use_cpu": True}), run)


_NEEDS_DEVICE = {
    *("bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode"),
}


def _values(run: Run) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(training_arguments_class()) if field.init}
    values = {name: value for name, value in (run.group("trainer") | run.group("train")).items() if name in names}
    if values.get("metric_for_best_model"):  # transformers goes by the last letters, which may be a kind of questions
        values["greater_is_better"] = greater_is_better(run)
    values["neftune_noise_alpha"] = values.get("neftune_noise_alpha") or None  # 0 is no noise, not noise of 0
    if "activation_checkpointing" in names and values.get("activation_checkpointing") is None:
        # the name from transformers 5.20 on; with both set it does not warn about the older one
        values["activation_checkpointing"] = values["gradient_checkpointing"]
    return values


def _make(values: dict[str, Any]):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return training_arguments_class()(**values)
    except Exception as error:  # of many kinds: transformers', accelerate's and DeepSpeed's
        reason = " ".join(str(error).split()) or type(error).__name__
        raise LlavaError(f"training arguments: {reason}") from error


def _fall_back(values: dict[str, Any], run: Run) -> None:
    """Turn off in `values` what needs a CUDA device or a package that is not there; one notice each."""
    import torch
    from transformers.utils import is_torch_tf32_available

    from llava.model.builder import flash_attention_runs

    notices = run.notices
    cuda = torch.cuda.is_available() and not values.get("use_cpu")
    if values.get("tf32") and not (cuda and is_torch_tf32_available()):
        values["tf32"] = None
        notices.append("tf32 needs a CUDA device of the Ampere generation or later; trained without it")
    if values.get("attn_implementation") == "flash_attention_2" and not (cuda and flash_attention_runs()):
        values["attn_implementation"] = None
        lacking = "a flash-attn package that can be imported" if cuda else "a CUDA device"
        notices.append(f"attn_implementation flash_attention_2 needs {lacking}; the best available is used")
    if values.get("enable_jit_checkpoint"):  # its handler would stand in the way of `llava.train.stopping`
        values["enable_jit_checkpoint"] = False
        notices.append("enable_jit_checkpoint: every run saves when it is told to stop, with or without it")
    if values.get("deepspeed"):
        _prepare_deepspeed(cuda)
        check_zero_plus_plus(run, cuda, int(os.environ["WORLD_SIZE"]))
    if cuda:
        return
    if values.get("use_liger_kernel"):
        raise LlavaError(
            f"{run.source('use_liger_kernel')}: use_liger_kernel needs a CUDA device, expected one or no such key"
        )
    if values.get("torch_compile_tower"):
        values["torch_compile_tower"] = False
        notices.append("torch_compile_tower needs a CUDA device; the tower runs uncompiled")
    for name in ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval"):
        lacking = values.get(name) and _lacks_on_cpu(name, run)
        if lacking:
            values[name] = False
            notices.append(f"{name} needs {lacking}; float32 is used")
    compile_names = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
    if any(values.get(name) for name in compile_names):
        values.update(torch_compile=False, torch_compile_backend=None, torch_compile_mode=None)
        notices.append("torch_compile needs a CUDA device; the model runs uncompiled")
    values.setdefault("dataloader_pin_memory", False)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or values.get("deepspeed"):
        values["use_cpu"] = True  # otherwise accelerate starts no process group


def _lacks_on_cpu(name: str, run: Run) -> str | None:
    """What half precision, of this key, lacks for a run on the CPU; None: nothing.

    bfloat16 is kept where the CPU was asked for with it: on the command line, or by one file that has both. A config
    made for GPUs means float32 there, which on a CPU is no slower.
    """
    meant = run["use_cpu"] and (run.source(name) == WHERE or run.source("use_cpu") == run.source(name))
    if not meant:
        return "a CUDA device"
    if name.startswith("bf16"):
        return None
    if not run["deepspeed"]:
        return "a CUDA device or DeepSpeed"  # accelerate has none of its own for a CPU
    from deepspeed.accelerator import get_accelerator

    return None if get_accelerator().is_fp16_supported() else "a CUDA device or a CPU that computes in float16"


def _prepare_deepspeed(cuda: bool) -> None:
    """What DeepSpeed reads from the environment when it is imported; a single process needs no launcher.

    What it compiles from then on is told.
    """
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    tell_compilation()
    if "WORLD_SIZE" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
