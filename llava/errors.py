"""The one exception for faults in what a user gave, and how command-line programs report it."""

import functools
import sys

from llava.utils import is_rank0


class LlavaError(ValueError):
    """A fault in a config, a data file, an image or a checkpoint.

    The message is one line that names the file, the key or record id, what was found and what was expected.
    """


class OutOfReach(LlavaError):
    """A model or encoder that is not on this machine: nothing is known to be wrong with it, and nothing to be right."""


def report_errors(main):
    """Decorate a command-line `main`: a `LlavaError` ends the program with one line on stderr and exit status 2."""

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except LlavaError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None

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
