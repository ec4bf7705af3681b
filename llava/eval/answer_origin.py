"""What a file of answers was made with: `A.jsonl.meta.json` beside `A.jsonl`.

    {"schema": 1, "model", "weights_hash", "template", "settings": {...}, "questions_hash"}

`model` is the checkpoint as it was named, `weights_hash` that of `llava.eval.weights_hash`, `questions_hash` the
SHA-256 of the question file. Answers are added to a file only by what it was begun with.
"""

import hashlib
import json
import os

from llava.errors import LlavaError
from llava.eval import answer_file
from llava.eval.weights_hash import newest_change, weights_hash
from llava.utils import get_model_name_from_path

SCHEMA = 1
_KEYS = {"schema", "model", "weights_hash", "template", "settings", "questions_hash"}
_SAID_BY_THE_HASH = ("model_base",)  # settings of which the path may be another


def meta_path(answers: str) -> str:
    return f"{answers}.meta.json"


def file_hash(path: str) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(answers: str) -> dict | None:
    """What the file of answers was made with; None where nothing says so.

    Raises:
        LlavaError: the file beside it is none of these.
    """
    path = meta_path(answers)
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            meta = json.load(file)
    except (OSError, ValueError) as error:
        raise LlavaError(f"{path}: cannot be read ({str(error).splitlines()[0][:100]}), expected JSON") from None
    keys = sorted(meta) if isinstance(meta, dict) else None
    if keys is None or not meta.keys() >= _KEYS or not isinstance(meta["settings"], dict):
        raise LlavaError(f"{path}: found {keys or type(meta).__name__}, expected {', '.join(sorted(_KEYS))}")
    if meta["schema"] != SCHEMA:
        raise LlavaError(f"{path}: found schema {meta['schema']!r}, expected {SCHEMA}")
    return meta


def write(answers: str, meta: dict) -> None:
    """Write it, before the first answer."""
    answer_file.remove(meta_path(answers))
    answer_file.append(meta_path(answers), [meta])


def differences(found: dict, expected: dict) -> list[str]:
    """What differs, in words: "max_new_tokens 6, now 16"; keys that one side does not have yet are left out."""
    words = []
    for key in ("model", "weights_hash", "template", "questions_hash"):
        one, other = found.get(key), expected.get(key)
        if key == "model" and one and other:
            one, other = get_model_name_from_path(one), get_model_name_from_path(other)
        if key in expected and one != other:
            words.append(f"{key} {_short(key, one)}, now {_short(key, other)}")
    before, now = found.get("settings", {}), expected.get("settings", {})
    for key in now:
        if key not in _SAID_BY_THE_HASH and before.get(key) != now[key]:
            words.append(f"{key} {before.get(key)}, now {now[key]}")
    return words


def _short(key: str, value) -> str:
    return str(value)[:12] if key.endswith("_hash") else str(value)


def fault_of(answers: str, expected: dict) -> str | None:
    """Why the answers that are there cannot be completed by what `expected` says; None where they can.

    Args:
        expected: as the file beside the answers holds it, or the part of it that is known.
    """
    if not answer_file.has_rows(answers):
        return None
    path = meta_path(answers)
    try:
        found = read(answers)
    except LlavaError as error:
        return f"{error}; --overwrite asks anew"
    if found is None:
        return (
            f"{answers}: found answers without {path}, which says what model, template and settings they are of; "
            "expected both or neither (--overwrite asks anew)"
        )
    words = differences(found, expected)
    if not words:
        return None
    return f"{answers}: was answered with {'; '.join(words)} ({path}); --overwrite asks anew"


def has_changed(answers: str, meta: dict) -> bool:
    """Whether the model's files have changed since it answered; not where its folder is no longer there.

    They are read again only where one of them is newer than what says which they were.
    """
    place = meta["model"], meta["settings"].get("model_base")
    if not os.path.isdir(place[0]) or newest_change(*place) <= os.stat(meta_path(answers)).st_mtime:
        return False
    return weights_hash(*place) not in (None, meta["weights_hash"])
