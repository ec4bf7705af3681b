"""A JSONL file of answers that grows while they come, survives a crash, and is in order at the end.

Rank 0 appends to the file itself, rank N to `FILE.rankN` beside it; `collect` reads them all and `write_in_order` puts
them into one. Imports nothing heavy.
"""

import glob
import json
import os

from llava.errors import LlavaError


def rank_path(path: str, rank: int) -> str:
    """The file that a rank appends to."""
    return path if rank == 0 else f"{path}.rank{rank}"


def _part_paths(path: str) -> list[str]:
    return sorted(glob.glob(f"{glob.escape(path)}.rank[0-9]*"))


def append(path: str, rows: list[dict]) -> None:
    """Write rows so that they outlive a crash of the process or the machine right after."""
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: str) -> list[dict]:
    """The rows of a file; [] where there is none. A last line that a crash cut short is removed from the file.

    Raises:
        LlavaError: another line is not a JSON object; names it.
    """
    if not os.path.exists(path):
        return []
    with open(path, "rb") as file:
        content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    rows = []
    for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError:  # not JSON, or not UTF-8
            row = None
        if not isinstance(row, dict):
            raise LlavaError(f"{path}, line {number}: found {line[:40]!r}, expected an answer row")
        rows.append(row)
    return rows


def has_rows(path: str) -> bool:
    """Whether there is anything in the file, or in one of another rank beside it."""
    return any(os.path.exists(name) and os.path.getsize(name) for name in (path, *_part_paths(path)))


def remove(path: str) -> None:
    """Remove the file and those of other ranks."""
    for name in (path, *_part_paths(path)):
        if os.path.exists(name):
            os.remove(name)


def collect(path: str) -> list[dict]:
    """The rows of a file and of what other ranks of an earlier run left beside it."""
    return [row for name in (path, *_part_paths(path)) for row in read_rows(name)]


def write_in_order(path: str, rows: list[dict]) -> None:
    """Replace the file at one stroke by one with these rows, and remove the other ranks' files."""
    parts = _part_paths(path)
    if parts or not os.path.exists(path) or rows != read_rows(path):
        temporary = f"{path}.tmp"
        if os.path.exists(temporary):
            os.remove(temporary)
        append(temporary, rows)
        os.replace(temporary, path)
    for part in parts:
        os.remove(part)
