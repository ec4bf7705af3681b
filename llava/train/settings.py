"""The checks of a resolved run that need no weights, for `python -m llava.config show`."""

import os

from llava.config import Run
from llava.errors import OutOfReach
from llava.families import family_of
from llava.train.arguments import check_training_arguments

_MOST_BYTES = 256 * 2**20  # of data files that are looked into


def check_settings(run: Run) -> None:
    """Refuse what `llava.train.train` would refuse before it reads weights, as far as the files on this machine tell.

    What is not here yet (a model, an encoder, DeepSpeed, the data) is left out; `run.notices` say so.

    Raises:
        LlavaError: what is wrong.
    """
    family = family_of(run["model_name_or_path"], download=False)
    family.check(run)
    check_training_arguments(run)
    try:
        family.check_fit(run)
        family.check_media(run, _media_kinds(run))
    except OutOfReach as error:
        run.notices.append(f"not on this machine, so not all is checked: {error}")


def _media_kinds(run: Run) -> set[str]:
    """The kinds of media that the run's data have; none of data that are not here, or too large for a glance."""
    from llava.data.records import data_files, load_records, media_kinds

    path = run["data_path"]
    files = data_files(path) if path else []
    if not files or not all(map(os.path.isfile, files)):
        return set()
    if sum(map(os.path.getsize, files)) > _MOST_BYTES:
        run.notices.append(
            f"{path}: large data, not looked into: whether videos fit these settings is seen in training"
        )
        return set()
    return media_kinds(load_records(path))
