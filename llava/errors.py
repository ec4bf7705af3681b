"""The one exception for faults in what a user gave, and how command-line programs report it."""

import functools
import os
import select
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

    So does a `LostRank`, with exit status 1. Where nobody reads what it prints any more (`| head`), it ends quietly:
    with the status it would have had, or in the middle of its work with 141, as a program that SIGPIPE ends.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        try:
            try:
                return main(*args, **kwargs)
            except (LlavaError, LostRank) as error:
                line, status = told(error)
                if line:
                    print(line, file=sys.stderr)
                raise SystemExit(status) from None
        except BrokenPipeError:
            if not _drop_unread():
                raise
            raise SystemExit(141) from None
        finally:
            _flush()  # what is left in the buffer; Python's own attempt at its end would complain

    return wrapper


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except BrokenPipeError:
            _drop_unread()
        except (OSError, ValueError):  # a full disk, a closed file: for Python to tell
            continue


def _drop_unread() -> bool:
    """Whether stdout or stderr goes to a pipe that nobody reads; what follows is then dropped."""
    found = False
    for stream in (sys.stdout, sys.stderr):
        try:
            number = stream.fileno()
            poll = select.poll()
            poll.register(number, 0)
            unread = any(event & select.POLLERR for _, event in poll.poll(0))
        except (AttributeError, OSError, ValueError):  # no file, as under a test, or no poll, as on Windows
            continue
        if unread:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)
            found = True
    return found


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
