"""Several training runs in one process (or one per rank, under torchrun), as starting Python costs more than they do.

`python -m tests.support.runs FLAGS.json`: a list of command lines, or of {"flags": a command line, "fault": what
`tests.support.bad_numbers` has}. Those that fail are told, and the exit status is 1.
Beside what a run saves lies `buffers.json`, the dtype of each of its model's buffers.
"""

import functools
import gc
import json
import os
import sys
import traceback
from contextlib import nullcontext

from llava.train import train as program
from tests.support.bad_numbers import install

WITH_FLOAT16 = f"{__name__}:allow_float16"  # a change that `tests.support.forks` makes


def allow_float16() -> None:
    """DeepSpeed says that no CPU knows float16, though PyTorch computes in it."""
    import torch
    from deepspeed.accelerator import get_accelerator

    cpu = type(get_accelerator())
    known = cpu.supported_dtypes
    cpu.is_fp16_supported, cpu.supported_dtypes = lambda self: True, lambda self: [*known(self), torch.float16]


def main(words: list[str]) -> int:
    with open(words[0]) as file:
        runs = json.load(file)
    # DeepSpeed keeps the first group
    leave, program.leave_process_group = program.leave_process_group, lambda error=None: None
    program.save = functools.partial(_save, program.save)
    failed, environment = 0, dict(os.environ)
    for run in runs:
        flags, fault = (run["flags"], install(**run["fault"])) if isinstance(run, dict) else (run, nullcontext())
        for name in os.environ.keys() - environment.keys():
            if name.startswith("ACCELERATE_"):  # what transformers tells accelerate of a run with DeepSpeed
                del os.environ[name]
        gc.collect()  # as long as a run's DeepSpeed settings live, transformers takes the next one for ZeRO-3 too
        try:
            with fault:
                program.run(*_parse(flags))
        except Exception:
            failed += 1
            print(f"failed: {' '.join(flags)}", traceback.format_exc(), sep="\n", file=sys.stderr)
    leave()
    return int(failed > 0)


def _save(save, trainer, out: str) -> None:
    save(trainer, out)
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        with open(os.path.join(out, "buffers.json"), "w") as file:
            json.dump({name: str(buffer.dtype) for name, buffer in model.named_buffers()}, file)


def _parse(flags):
    from llava.train.arguments import parse_args

    return parse_args(flags)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
