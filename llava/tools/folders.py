"""What the commands that write a model share: a folder that is there whole or not at all, and a quiet terminal."""

import contextlib
import os
import shutil
import tempfile

from llava.errors import LlavaError


def quiet() -> None:
    """No progress bars of transformers' loading."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@contextlib.contextmanager
def new_folder(out: str, source: str, overwrite: bool = False):
    """A folder to fill, which gets the name `out` if the block ends well and is removed if not.

    Args:
        out: the name. A checkpoint of that name stays what it was until the new one takes its place.
        source: what is read meanwhile, which may not lie in `out`.
        overwrite: whether a checkpoint may be replaced.

    Raises:
        LlavaError: `out` holds `source`, is there and may not be replaced, or cannot be made.
    """
    if os.path.commonpath([os.path.realpath(source), os.path.realpath(out)]) == os.path.realpath(out):
        raise LlavaError(f"{out}: holds the weights that are read, expected another folder")
    out = os.path.abspath(out)
    parent, name = os.path.split(out)
    if os.path.lexists(out):
        if not overwrite:
            raise LlavaError(f"{out}: is there already; --overwrite replaces it")
        if not os.path.isfile(os.path.join(out, "config.json")):
            raise LlavaError(f"{out}: found no config.json in it, expected a checkpoint to replace")
    try:
        os.makedirs(parent, exist_ok=True)
        work = tempfile.mkdtemp(prefix=f".{name}.", dir=parent)
    except OSError as error:
        raise LlavaError(f"{out}: cannot be made: {error.strerror}") from None
    try:
        folder = os.path.join(work, name)
        os.mkdir(folder)
        yield folder
        replaced = os.path.join(work, "replaced")
        if os.path.lexists(out):
            os.rename(out, replaced)
        try:
            os.rename(folder, out)
        except BaseException:
            if os.path.lexists(replaced):
                os.rename(replaced, out)
            raise
    finally:
        shutil.rmtree(work)
