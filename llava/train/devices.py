"""The GPUs of a run, looked at before anything is loaded; `python -m llava.train.devices` prints how many there are."""

import argparse
import os
import re
import shlex
import sys
import warnings
from pathlib import Path

from llava.errors import LlavaError, report_errors

DRIVER_FILE = Path("/proc/driver/nvidia/version")


def check_devices(use_cpu: bool, argv: list[str]) -> None:
    """Refuse a run of this program with `argv` that these GPUs would spoil, unless it is for the CPU."""
    if use_cpu:
        return
    count = usable_devices(on_cpu="--use_cpu true")
    # Without a launcher's LOCAL_RANK transformers takes all GPUs by DataParallel, which cuts lists of images apart.
    if count > 1 and os.environ.get("LOCAL_RANK", "-1") == "-1":
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        command = shlex.join(["torchrun", "--nproc_per_node", str(count), sys.argv[0], *argv])
        raise LlavaError(
            f"found {count} GPUs and no launcher, expected one process per GPU: set CUDA_VISIBLE_DEVICES={first} "
            f"for one GPU, or type: {command}"
        )


def usable_devices(on_cpu: str) -> int:
    """How many GPUs this process sees.

    Raises `LlavaError` where PyTorch sees some but can use none: a run would silently go to the CPU. `on_cpu` is what a
    user sets to have it there.
    """
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count, usable = torch.cuda.device_count(), torch.cuda.is_available()
    if usable or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return count
    driver, reason = _driver(), _reason(str(warning.message) for warning in caught)
    # where NVML is missing too (some containers), PyTorch counts none, and only its warning tells
    if not count and not (driver and reason):
        return 0
    raise LlavaError(
        f"found {count or 'some'} GPUs with driver {driver or 'unknown'}, of which torch {torch.__version__} (CUDA "
        f"{torch.version.cuda}) can use none{reason and f': {reason}'}; expected a newer driver, or a torch wheel for "
        f"this one; to run on the CPU: {on_cpu}"
    )


def _driver() -> str:
    """The NVIDIA driver's version, "" if there is none to be read."""
    try:
        found = re.search(r"\b\d+\.\d[\d.]*", DRIVER_FILE.read_text())
    except OSError:
        return ""
    return found.group() if found else ""


def _reason(messages) -> str:
    """Why PyTorch could not start CUDA: CUDA's error, or its warning's first sentence; "" if it did not warn."""
    for message in messages:
        text = message.partition("CUDA initialization: ")[2]
        if text:
            error = re.search(r"Error \d+: [^(]+", text)
            return error.group().strip() if error else re.split(r"\. |\(Triggered", text)[0].strip()
    return ""


@report_errors
def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(description="Print how many CUDA devices a run can use.").parse_args(argv)
    print(usable_devices(on_cpu="NUM_PROCS=1"))


if __name__ == "__main__":
    main()
