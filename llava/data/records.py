"""Data files to records: LLaVA JSON, JSONL, `{a,b}.json`, and the mixture YAML with its sampling strategies."""

import bisect
import difflib
import json
import math
import os
import random
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from llava.data.forms import canonical
from llava.errors import LlavaError

_MIXTURE_KEYS = ("json_path", "sampling_strategy", "image_folder", "video_folder")


class Part(NamedTuple):
    """Where a run of records comes from: the file, their numbers in it (from 0), and folders of their own if any."""

    path: str
    rows: Sequence[int]
    image_folder: str | None = None
    video_folder: str | None = None


class Records(list):
    """A list of records (dictionaries) that knows which file each came from.

    Attributes:
        parts: one `Part` per file read, in order.
    """

    def __init__(self):
        super().__init__()
        self.parts: list[Part] = []
        self._starts: list[int] = []

    def add_part(self, part: Part, records: list[dict]) -> None:
        """Append `records`, the ones that `part` describes."""
        self._starts.append(len(self))
        self.parts.append(part)
        self.extend(records)

    def part(self, index: int) -> Part:
        """The part that record `index` belongs to."""
        return self.parts[bisect.bisect_right(self._starts, index) - 1]

    def by_part(self):
        """(part, its records) of each."""
        ends = [*self._starts[1:], len(self)]
        return [(part, self[at:end]) for part, at, end in zip(self.parts, self._starts, ends, strict=True)]

    def first(self, count: int | None) -> "Records":
        """The first so many; None: all."""
        found = Records()
        for part, records in self.by_part():
            left = len(records) if count is None else min(len(records), count - len(found))
            if left:
                found.add_part(part._replace(rows=part.rows[:left]), records[:left])
        return found

    def record_id(self, index: int) -> str:
        """The record's `id`, or its number where it has none."""
        return str(self[index].get("id", index))

    def describe(self, index: int) -> str:
        """File, place in the file (from 1) and id of a record, for error messages."""
        place = bisect.bisect_right(self._starts, index) - 1
        part = self.parts[place]
        row = part.rows[index - self._starts[place]]
        return f"{part.path}: record {row + 1} (id {self[index].get('id')!r})"


def load_records(data_path: str, seed: int = 0) -> Records:
    """Read all records that `data_path` names, in the form of LLaVA (see `llava.data.forms.canonical`).

    One that has a fault is left as it is, for `llava.data.validate.validate_records` to tell with all others.

    Args:
        data_path: a `.json` (a list) or `.jsonl` file, several as `folder/{a,b}.json`, or a `.yaml` mixture:
            `datasets:` with entries of `json_path`, `sampling_strategy` (all, first:X, end:X, random:X with X a count
            or N%, rounded up) and, if they differ from the run's, `image_folder` and `video_folder`.
        seed: decides what `random:X` picks; the picked records keep the order of their file.

    Raises:
        LlavaError: a file that is missing or does not parse (with its line), or a mixture entry that is not as above.
    """
    data_path = str(data_path)
    records = Records()
    if data_path.endswith((".yaml", ".yml")):
        for number, entry in enumerate(_read_mixture(data_path)):
            strategy = entry.get("sampling_strategy", "all")
            for path in _expand(_beside(data_path, entry["json_path"])):
                found = read_file(path)
                rows = sample_rows(len(found), strategy, f"{seed}/{number}/{os.path.basename(path)}", data_path)
                part = Part(path, rows, entry.get("image_folder"), entry.get("video_folder"))
                records.add_part(part, [_in_llavas_form(found[row]) for row in rows])
        return records
    for path in _expand(data_path):
        found = read_file(path)
        records.add_part(Part(path, range(len(found))), [_in_llavas_form(record) for record in found])
    return records


def data_files(data_path: str) -> list[str]:
    """The data files that `data_path` names, as `load_records` takes it; a mixture that is not there names none."""
    if data_path.endswith((".yaml", ".yml")):
        entries = _read_mixture(data_path) if os.path.isfile(data_path) else []
        return [path for entry in entries for path in _expand(_beside(data_path, entry["json_path"]))]
    return _expand(data_path)


def media_kinds(records) -> set[str]:
    """ "image", "video": what some of the records have."""
    return {kind for kind in ("image", "video") if any(record.get(kind) for record in records)}


def _in_llavas_form(record: dict) -> dict:
    try:
        return canonical(record)
    except LlavaError:
        return record


def read_file(path: str) -> list[dict]:
    """The records of one `.json` or `.jsonl` file, as they are written there.

    Raises:
        LlavaError: missing, not UTF-8, not JSON (names the line), or not a list of objects (names the record).
    """
    if not path.endswith((".json", ".jsonl")):
        raise LlavaError(f"{path}: found an unknown kind of data file, expected .json, .jsonl or .yaml")
    try:
        with open(path, encoding="utf-8-sig") as file:
            records = _read_lines(path, file) if path.endswith(".jsonl") else json.load(file)
    except FileNotFoundError:
        raise LlavaError(f"{path}: no such file, expected training data") from None
    except IsADirectoryError:
        raise LlavaError(f"{path}: found a folder, expected a data file") from None
    except UnicodeDecodeError as error:
        raise LlavaError(f"{path}: found bytes that are not UTF-8 ({error.reason}), expected JSON") from None
    except json.JSONDecodeError as error:
        raise LlavaError(
            f"{path}, line {error.lineno}: found {error.msg} (column {error.colno}), expected JSON"
        ) from None
    if not isinstance(records, list):
        raise LlavaError(f"{path}: found {type(records).__name__}, expected a list of records")
    for row, record in enumerate(records):
        if not isinstance(record, dict):
            raise LlavaError(f"{path}: record {row + 1}: found {type(record).__name__}, expected an object")
    return records


def _read_lines(path: str, file) -> list:
    records = []
    for number, line in enumerate(file, start=1):
        line = line.removeprefix("\ufeff")  # files that were joined have one inside
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            place = f"{path}, line {number}"
            raise LlavaError(f"{place}: found {error.msg} (column {error.colno}), expected one JSON object") from None
    return records


def sample_rows(count: int, strategy: str, seed: str, where: str = "sampling_strategy") -> Sequence[int]:
    """Which of `count` records a sampling strategy keeps, in file order.

    Args:
        strategy: all, first:X, end:X or random:X; X is a count or N% (rounded up), at most all.
        seed: decides a random choice.

    Raises:
        LlavaError: not a strategy.
    """
    kind, _, amount = strategy.partition(":") if isinstance(strategy, str) else ("", "", "")
    if kind == "all" and not amount:
        return range(count)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)(%?)\s*", amount)
    if kind not in ("first", "end", "random") or not match or ("." in match[1] and not match[2]):
        expected = "all, first:X, end:X or random:X with X a count or N%"
        raise LlavaError(f"{where}: found sampling_strategy {strategy!r}, expected {expected}")
    # exact arithmetic: 7% of 100 is 7, which floating point would round up to 8
    wanted = math.ceil(Fraction(match[1]) * count / 100) if match[2] else int(match[1])
    wanted = min(wanted, count)
    if kind == "first":
        return range(wanted)
    if kind == "end":
        return range(count - wanted, count)
    return sorted(random.Random(seed).sample(range(count), wanted))


def _expand(path: str) -> list[str]:
    """`folder/{a,b}.json` as its files; any other path as itself."""
    match = re.fullmatch(r"(.*)\{(.*)\}(.*)", path)
    return [f"{match[1]}{name.strip()}{match[3]}" for name in match[2].split(",")] if match else [path]


def _beside(mixture: str, path: str) -> str:
    """A mixture's path as given, or beside the mixture file where only that exists."""
    beside = os.path.join(os.path.dirname(mixture), path)
    given_exists = all(os.path.exists(name) for name in _expand(path))
    return beside if not given_exists and all(os.path.exists(name) for name in _expand(beside)) else path


def _read_mixture(path: str) -> list[dict]:
    import yaml

    try:
        with open(path, encoding="utf-8-sig") as file:
            content = yaml.safe_load(file)
    except FileNotFoundError:
        raise LlavaError(f"{path}: no such file, expected a data mixture") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise LlavaError(f"{path}{line}: found {getattr(error, 'problem', error)}, expected YAML") from None
    entries = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise LlavaError(f"{path}: found no list under 'datasets', expected entries with json_path")
    for number, entry in enumerate(entries, start=1):
        where = f"{path}: datasets entry {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("json_path"), str):
            raise LlavaError(f"{where}: found no json_path, expected the path of a data file")
        for key in entry:
            if key not in _MIXTURE_KEYS:
                near = difflib.get_close_matches(str(key), _MIXTURE_KEYS, n=1, cutoff=0.0)[0]
                raise LlavaError(f"{where}: unknown key {key!r}: did you mean {near!r}?")
            if not isinstance(entry[key], str):
                raise LlavaError(f"{where}: {key}: found {entry[key]!r}, expected text")
    return entries
