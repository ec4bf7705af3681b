"""The check of a whole data set before training: conversations, `<image>` counts, templates and paths."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.util import find_spec

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, SeparatorStyle, get_template
from llava.data.forms import canonical
from llava.data.paths import brief, media_of, resolve_path, shown_media
from llava.data.records import Part, Records
from llava.data.turns import check_turns, leading_system, read_turns
from llava.errors import LlavaError
from llava.utils import rank0_print

_THREADS = 32  # paths are often on a network file system, where the wait is for the answer and not for the processor
_CHUNK = 4096
_VIDEO_FILES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".wmv", ".flv", ".mpeg", ".mpg", ".m4v")


_NOTES = {
    "unused image": "name an image but have no <image>{}: trained as text",
    "unused video": "name a video but have no <image>{}: trained as text",
    "literal": "have <image> in a text but name no image or video{}: it is text there",
    "empty": "have no answer with text{}: left out, as there is nothing to learn",
    "system": "have a system turn of their own{}: dropped for the template's system text (system_turn: template)",
}


def check_record(
    record: dict, template: Conversation, add_time_instruction: bool = False, system_turn: str = "template"
) -> list[str]:
    """Whether a record can be trained on, as far as its own text tells.

    Args:
        add_time_instruction: the first turn of a video record is given its `<image>` then.
        system_turn: what becomes of a record's own system turn, "template" or "record".

    Returns:
        what is worth a note, of the names in `_NOTES`.

    Raises:
        LlavaError: a form that is none (see `llava.data.forms`), no conversation, nobody to answer, turns that do not
            fit the template, or an `<image>` count that does not match the images and is not 0.
    """
    return _check(canonical(record), template, add_time_instruction, system_turn)


def _check(record: dict, template: Conversation, add_time_instruction: bool, system_turn: str) -> list[str]:
    source = record.get("conversations")
    if not isinstance(source, list) or not source:
        raise LlavaError(f"conversations: found {brief(source)}, expected a list of turns")
    turns = read_turns(source)
    check_turns(turns, template)
    if not any(text.strip() for _, text in turns):
        raise LlavaError("conversations: found no text, expected some")
    if all(speaker != "gpt" for speaker, _ in turns) and template.sep_style is not SeparatorStyle.PLAIN:
        raise LlavaError("conversations: found no answer (gpt), expected at least one")
    system = leading_system(source)
    notes = ["system"] if system is not None and system_turn == "template" else []
    answers = turns[1:2] if template.sep_style is SeparatorStyle.PLAIN else [turn for turn in turns if turn[0] == "gpt"]
    notes += [] if any(text.strip() for _, text in answers) else ["empty"]
    kind, names = shown_media(record, add_time_instruction)
    if template.sep_style is SeparatorStyle.PLAIN and len(names) != 1:
        raise LlavaError(f"image: found {len(names)}, expected 1 (template plain)")
    counted = turns[1:] if kind == "video" and add_time_instruction else turns
    found = sum(text.count(DEFAULT_IMAGE_TOKEN) for _, text in counted) + (len(turns) - len(counted))
    if kind is None:
        return [*notes, "literal"] if found else notes
    if not names:
        return [*notes, f"unused {kind}"]
    if system is not None and system_turn == "record" and DEFAULT_IMAGE_TOKEN in system:
        raise LlavaError("conversations: found <image> in the system turn, expected it in a human's")
    if found != len(names):
        what = {"image": "image(s)", "video": "video"}[kind]
        raise LlavaError(f"conversations: found {found} <image> for {len(names)} {what}, expected as many")
    return notes


def validate_records(
    records: Records,
    *,
    version: str,
    image_folder: str | None = None,
    video_folder: str | None = None,
    allow_absolute_paths: bool = False,
    add_time_instruction: bool = False,
    system_turn: str = "template",
    check_paths: bool = True,
    max_faults: int = 20,
) -> None:
    """Check every record before training; reads no image, only asks whether the files are there (in parallel).

    What is no fault but may not be meant is printed, a line for each kind, with a count and the first record.

    Args:
        version: template name.
        image_folder, video_folder: where relative paths start; a mixture entry's own folders come first.
        system_turn: as `check_record`.
        check_paths: whether to look for the files.
        max_faults: stop after so many; one message lists them all.

    Raises:
        LlavaError: what is wrong; the first line names file, record and fault, further lines the other records. A
            folder that is not there, or has none of the files, is one line for all of its records.
    """
    if not records:
        raise LlavaError("data_path: found no records, expected at least one")
    template, own_folders = get_template(version), {"image": image_folder, "video": video_folder}
    faults: dict[int, str] = {}
    folders: dict[tuple[str, str | None], dict[str, int]] = {}  # (what names it, folder) -> path -> first record
    notes: dict[str, list[int]] = {}  # name -> [how many, first record]
    for index, record in enumerate(records):
        try:
            record = canonical(record)
            found = _check(record, template, add_time_instruction, system_turn)
            for key, folder, path in _paths(record, records.part(index), own_folders, allow_absolute_paths):
                folders.setdefault((key, folder), {}).setdefault(path, index)
            if "unused video" not in found:
                _check_pyav(record)
        except LlavaError as error:
            faults[index] = str(error)
            if len(faults) >= max_faults:
                break
            continue
        for name in found:
            notes.setdefault(name, [0, index])[0] += 1
    wrong, missing = _look_for(folders, max_faults) if check_paths and len(faults) < max_faults else ([], {})
    faults = missing | faults
    if faults or wrong:
        lines = [*wrong, *(f"{records.describe(index)}: {faults[index]}" for index in sorted(faults))][:max_faults]
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise LlavaError("\n  ".join([lines[0] + more, *lines[1:]]))
    if notes.get("empty", [0])[0] == len(records):
        raise LlavaError(f"{records.describe(0)}: found no answer with text in any record, expected something to learn")
    for name, (count, first) in notes.items():
        example = f" (first: {records.describe(first)})"
        rank0_print(f"note: {count:,} of {len(records):,} records {_NOTES[name].format(example)}")


def _paths(record: dict, part: Part, folders: dict, allow_absolute_paths: bool):
    """(the key that names its folder, the folder or None, path) of each file of a record; its part's folder counts
    before the run's."""
    kind, names = media_of(record)
    key = f"{kind}_folder"
    own = getattr(part, key, None)
    where, folder = (f"{part.path}: {key}", own) if own else (key, folders.get(kind) or None)
    for name in names:
        yield where, None if os.path.isabs(name) else folder, resolve_path(folder, name, allow_absolute_paths)


def _wrong_folder(key: str, folder: str | None, paths: dict[str, int]) -> str:
    """What to say where none of the files is there."""
    files = f"{len(paths):,} file{'s' if len(paths) > 1 else ''} (first: {next(iter(paths))})"
    if folder is None:
        return f"{key} is not used for {files} of which none is there; expected paths that are, or a folder for them"
    if not os.path.isdir(folder):
        return f"{key} {folder}: no such folder, expected the records' {files} in it"
    return f"{key} {folder}: found none of the records' {files}, expected the folder that their paths start from"


@lru_cache(maxsize=1)
def _has_pyav() -> bool:
    return find_spec("av") is not None


def _check_pyav(record: dict) -> None:
    kind, names = media_of(record)
    if kind == "video" and names[0].lower().endswith(_VIDEO_FILES) and not _has_pyav():
        raise LlavaError(f"video {names[0]}: reading a video file needs PyAV; install it with: pip install av")


def _look_for(folders: dict[tuple[str, str | None], dict[str, int]], limit: int) -> tuple[list[str], dict[int, str]]:
    """What is wrong with whole folders, and with records whose file alone is not there: number -> fault."""
    wrong: list[str] = []
    faults: dict[int, str] = {}
    for (key, folder), paths in folders.items():
        missing = _missing(paths, folder, limit)
        if missing is None:
            wrong.append(_wrong_folder(key, folder, paths))
        for path, index in missing or ():
            faults.setdefault(index, f"found no file {path}, expected an image or video")
    return wrong, faults


def _missing(paths: dict[str, int], folder: str | None, limit: int) -> list[tuple[str, int]] | None:
    """The first (path, record) pairs whose path does not exist; None if that is all of several, or the folder."""
    if folder is not None and not os.path.isdir(folder):
        return None
    from tqdm import tqdm

    items, missing, seen = list(paths.items()), [], 0
    chunks = [items[at : at + _CHUNK] for at in range(0, len(items), _CHUNK)]
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        tqdm(total=len(items), desc="looking for the images", disable=len(chunks) < 2) as bar,
    ):
        for chunk in chunks:
            exists = list(pool.map(os.path.exists, [path for path, _ in chunk], chunksize=64))
            missing += [item for item, there in zip(chunk, exists, strict=True) if not there]
            seen += len(chunk)
            if limit <= len(missing) < seen:
                break
            bar.update(len(chunk))
    return None if len(missing) == len(items) > 1 else missing[:limit]
