"""The check of a whole data set before training: conversations, `<image>` counts, templates and paths."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.util import find_spec
from itertools import islice

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, SeparatorStyle, get_template
from llava.data.paths import media_of, resolve_path
from llava.data.records import Records
from llava.data.turns import check_turns, read_turns
from llava.errors import LlavaError

_THREADS = 32  # paths are often on a network file system, where the wait is for the answer and not for the processor
_CHUNK = 4096
_VIDEO_FILES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".wmv", ".flv", ".mpeg", ".mpg", ".m4v")


def check_record(record: dict, template: Conversation, add_time_instruction: bool = False) -> None:
    """Whether a record can be trained on, as far as its own text tells.

    Args:
        add_time_instruction: the first turn of a video record is given its `<image>` then.

    Raises:
        LlavaError: no conversation, nobody to answer, turns that do not fit the template, or an `<image>` count that
            does not match the images.
    """
    source = record.get("conversations")
    if not isinstance(source, list) or not source:
        raise LlavaError(f"conversations: found {source!r}, expected a list of turns")
    turns = read_turns(source)
    check_turns(turns, template)
    if not any(text.strip() for _, text in turns):
        raise LlavaError("conversations: found no text, expected some")
    if all(speaker != "gpt" for speaker, _ in turns) and template.sep_style is not SeparatorStyle.PLAIN:
        raise LlavaError("conversations: found no answer (gpt), expected at least one")
    kind, names = media_of(record)
    counted = turns[1:] if kind == "video" and add_time_instruction else turns
    found = sum(text.count(DEFAULT_IMAGE_TOKEN) for _, text in counted) + (len(turns) - len(counted))
    if found != len(names):
        what = {"image": "image(s)", "video": "video"}.get(kind, "images")
        raise LlavaError(f"conversations: found {found} <image> for {len(names)} {what}, expected as many")
    if template.sep_style is SeparatorStyle.PLAIN and len(names) != 1:
        raise LlavaError(f"image: found {len(names)}, expected 1 (template plain)")


def validate_records(
    records: Records,
    *,
    version: str,
    image_folder: str | None = None,
    video_folder: str | None = None,
    allow_absolute_paths: bool = False,
    add_time_instruction: bool = False,
    check_paths: bool = True,
    max_faults: int = 20,
) -> None:
    """Check every record before training; reads no image, only asks whether the files are there (in parallel).

    Args:
        version: template name.
        image_folder, video_folder: where relative paths start; a mixture entry's own folders come first.
        check_paths: whether to look for the files.
        max_faults: stop after so many; one message lists them all.

    Raises:
        LlavaError: what is wrong; the first line names file, record and fault, further lines the other records.
    """
    if not records:
        raise LlavaError("data_path: found no records, expected at least one")
    template = get_template(version)
    faults: dict[int, str] = {}
    paths: dict[str, int] = {}
    for index, record in enumerate(records):
        try:
            check_record(record, template, add_time_instruction)
            kind, names = media_of(record)
            if names:
                part = records.part(index)
                own, run = (part.video_folder, video_folder) if kind == "video" else (part.image_folder, image_folder)
                if kind == "video" and names[0].lower().endswith(_VIDEO_FILES):
                    _check_pyav(names[0])
                for name in names:
                    paths.setdefault(resolve_path(own or run, name, allow_absolute_paths), index)
        except LlavaError as error:
            faults[index] = str(error)
            if len(faults) >= max_faults:
                break
    if check_paths and len(faults) < max_faults:
        for path, index in islice(_missing(paths), max_faults - len(faults)):
            faults.setdefault(index, f"found no file {path}, expected an image or video")
    if faults:
        lines = [f"{records.describe(index)}: {faults[index]}" for index in sorted(faults)]
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise LlavaError("\n  ".join([lines[0] + more, *lines[1:]]))


@lru_cache(maxsize=1)
def _has_pyav() -> bool:
    return find_spec("av") is not None


def _check_pyav(name: str) -> None:
    if not _has_pyav():
        raise LlavaError(f"video {name}: reading a video file needs PyAV; install it with: pip install av")


def _missing(paths: dict[str, int]):
    """The (path, record) pairs whose path does not exist."""
    from tqdm import tqdm

    items = list(paths.items())
    chunks = [items[at : at + _CHUNK] for at in range(0, len(items), _CHUNK)]
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        tqdm(total=len(items), desc="looking for the images", disable=len(chunks) < 2) as bar,
    ):
        for chunk in chunks:
            exists = pool.map(os.path.exists, [path for path, _ in chunk], chunksize=64)
            yield from (item for item, there in zip(chunk, exists, strict=True) if not there)
            bar.update(len(chunk))
