"""The one exception for faults in what a user gave, and how command-line programs report it."""

import functools
import sys
import traceback

from llava.utils import is_rank0


class LlavaError(ValueError):
    """A fault in a config, a data file, an image or a checkpoint.

    The message is one line that names the file, the key or record id, what was found and what was expected.
    """


class OutOfReach(LlavaError):
    """A model or encoder that is not on this machine: nothing is known to be wrong with it, and nothing to be right."""


class LostRank(RuntimeError):
    """This process's part of a run ended because of another rank.

    The message is one line that names that rank, or empty where it has been told already.
    """


def told(error: BaseException) -> tuple[str, int]:
    """What a program says of what ended it, and its exit status."""
    if isinstance(error, (LlavaError, LostRank)):
        return f"error: {error}" if str(error) else "", 2 if isinstance(error, LlavaError) else 1
    return "".join(traceback.format_exception(error)).rstrip(), 1


def report_errors(main):
    """Decorate a command-line `main`: a `LlavaError` ends the program with one line on stderr and exit status 2.

    So does a `LostRank`, with exit status 1.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except (LlavaError, LostRank) as error:
            line, status = told(error)
            if line:
                print(line, file=sys.stderr)
            raise SystemExit(status) from None

    return wrapper


def report_interrupts(main):
    """Decorate a command-line `main`: Ctrl-C ends the program with one line on stderr and exit status 130.

    The line ends with what the `KeyboardInterrupt` says, if anything. Of several processes the first one tells.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except KeyboardInterrupt as stop:
            if is_rank0():
                print(f"interrupted {stop}".strip(), file=sys.stderr)
            raise SystemExit(130) from None

    return wrapper
