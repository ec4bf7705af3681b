"""Small helpers used everywhere; imports nothing heavy. Also what LLaVA's users import from here."""

import importlib
import logging
import logging.handlers
import os
import sys

from llava.constants import LOGDIR

# read from video files; imported when they are first used
_VIDEO = dict.fromkeys(("process_video_with_decord", "process_video_with_pyav"), "llava.images.video_arrays")

server_error_msg = "**The model could not be reached. Please try again.**"
moderation_msg = "This message was not sent on: it may break the rules of the service."


def __getattr__(name: str):
    if name in _VIDEO:
        return getattr(importlib.import_module(_VIDEO[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def is_rank0() -> bool:
    """True in the process that prints and writes: global rank 0, or a run without `torchrun`/`deepspeed`."""
    return int(os.environ.get("RANK", "0")) == 0


def rank0_print(*args, **kwargs) -> None:
    """`print` on global rank 0 only."""
    if is_rank0():
        print(*args, flush=True, **kwargs)


def rank_print(*args, **kwargs) -> None:
    """`print` on every rank, with its number in front where there are several."""
    rank = (f"Rank {os.environ['RANK']}: ",) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ()
    print(*rank, *args, flush=True, **kwargs)


def get_model_name_from_path(model_path):
    """Last part of a path; `run_checkpoint-N` for a checkpoint folder inside a run."""
    parts = model_path.strip("/").split("/")
    return f"{parts[-2]}_{parts[-1]}" if parts[-1].startswith("checkpoint-") and len(parts) > 1 else parts[-1]


def disable_torch_init() -> None:
    """Nothing: transformers builds a model without drawing the weights that it is about to read.

    LLaVA's replaces `reset_parameters` of torch's layers for the whole process, so that new ones are uninitialised
    memory.
    """


def build_logger(logger_name: str, logger_filename: str) -> logging.Logger:
    """A logger that writes to stderr and to a file in `LOGDIR`, a new one each day (UTC).

    stdout and stderr stay what they are; LLaVA's sends them into the logger.
    """
    logger = logging.getLogger(logger_name)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    path = os.path.abspath(os.path.join(LOGDIR, logger_filename))
    if path in (getattr(handler, "baseFilename", None) for handler in logger.handlers):
        return logger
    os.makedirs(os.path.dirname(path), exist_ok=True)
    form = logging.Formatter("%(asctime)s | %(levelname)s | %(name)s | %(message)s", "%Y-%m-%d %H:%M:%S")
    files = logging.handlers.TimedRotatingFileHandler(path, when="D", utc=True, encoding="utf-8", delay=True)
    for handler in (files, *(() if logger.handlers else (logging.StreamHandler(),))):
        handler.setFormatter(form)
        logger.addHandler(handler)
    return logger


class StreamToLogger:
    """A text stream whose lines become a logger's messages; what a stream has besides is the terminal's."""

    def __init__(self, logger: logging.Logger, log_level: int = logging.INFO):
        self.terminal, self.logger, self.log_level, self.linebuf = sys.stdout, logger, log_level, ""

    def __getattr__(self, name: str):
        return getattr(self.terminal, name)

    def write(self, text: str) -> None:
        *lines, self.linebuf = (self.linebuf + text).split("\n")
        for line in lines:
            self.logger.log(self.log_level, line.rstrip())

    def flush(self) -> None:
        if self.linebuf:
            self.logger.log(self.log_level, self.linebuf.rstrip())
        self.linebuf = ""


def violates_moderation(text: str) -> bool:
    """Refused: no text is sent anywhere from here (LLaVA's asks a service on the internet)."""
    from llava.errors import LlavaError

    raise LlavaError("violates_moderation: no text is sent to a moderation service here; check messages yourself")


def pretty_print_semaphore(semaphore) -> str:
    """A semaphore's free places, and whether all are taken, as text."""
    return "None" if semaphore is None else f"Semaphore(value={semaphore._value}, locked={semaphore.locked()})"
