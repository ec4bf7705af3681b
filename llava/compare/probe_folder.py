"""The labelled pictures that a probe is of: a folder for each class, and which are trained on and which asked."""

import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from llava.errors import LlavaError
from llava.images import PICTURE_SUFFIXES

TEST_SHARE, VALIDATION_SHARE = 0.2, 0.2  # of a class's pictures; of those that are left
THREADS = min(8, os.cpu_count() or 1)  # that read pictures
_NAMED = 10  # unreadable pictures that are told one by one
_EXPECTED = "expected FOLDER/CLASS/PICTURE, or FOLDER/train/CLASS/PICTURE beside FOLDER/val or FOLDER/test"


@dataclass(frozen=True)
class Pictures:
    """Attributes:
    folder: that `paths` are below.
    classes: names, in order.
    paths: of the readable pictures, sorted.
    labels: for each picture the number of its class.
    parts: for each picture "fit" (trained on), "validation" (trained on too, once it has decided what is chosen) or
        "test".
    left_out: how many pictures cannot be read.
    """

    folder: str
    classes: list[str]
    paths: list[str]
    labels: list[int]
    parts: list[str]
    left_out: int = 0

    def of(self, *parts: str) -> list[int]:
        """Numbers of the pictures of these parts."""
        return [number for number, part in enumerate(self.parts) if part in parts]


def read_folder(folder: str, seed: int = 0, record: Path | None = None) -> Pictures:
    """The pictures of a folder, each read once to see that it can be.

    FOLDER/CLASS/*: a fifth of each class's pictures, drawn by the seed, is the test part. FOLDER/train/CLASS/* beside
    FOLDER/test/CLASS/* (or val): as the folder says; with both, val is the validation part. Otherwise validation is a
    fifth of each class's training pictures. What a class is dealt depends on its own pictures alone.

    Args:
        record: a JSON file of what was found unreadable, kept so that a second call reads no pictures.

    Raises:
        LlavaError: no folder, fewer than two classes, a class with fewer than two readable pictures to train on and
            test by, or classes of the test pictures that have none to train on.
    """
    if not os.path.isdir(folder):
        raise LlavaError(f"probe: found no folder {folder}, {_EXPECTED}")
    given = _given_parts(folder)
    listed = [(part, *entry) for part, base in given.items() for entry in _listed(folder, base)]
    classes = sorted({name for _, name, _ in listed})
    if len(classes) < 2:
        found = f"one class, {classes[0]}" if classes else "no pictures in folders of classes"
        raise LlavaError(f"probe: {folder}: found {found}, expected two or more: {_EXPECTED.removeprefix('expected ')}")
    faults = _unreadable(folder, [path for *_, path in listed], record)
    _tell(faults)
    entries = []
    for name in classes:
        own = {part: [p for q, n, p in listed if (q, n) == (part, name) and p not in faults] for part in given}
        missing = sum(1 for _, n, path in listed if n == name and path in faults)
        entries += [(path, name, part) for part, paths in _dealt(folder, name, own, missing, seed) for path in paths]
    entries.sort()
    paths, names, parts = ([entry[i] for entry in entries] for i in range(3))
    if "test" not in parts:
        raise LlavaError(f"probe: {folder}: found no readable picture to test by, {_EXPECTED}")
    return Pictures(folder, classes, paths, [classes.index(name) for name in names], parts, len(faults))


def _folders(path: str) -> list[str]:
    return sorted(e.name for e in os.scandir(path) if e.is_dir() and not e.name.startswith("."))


def _given_parts(folder: str) -> dict[str, str]:
    """{part: subfolder} that the folder itself deals; {"": ""} where there are only classes."""
    names = _folders(folder)
    held = [name for name in ("val", "test") if name in names]
    if "train" not in names or not held or not _folders(os.path.join(folder, "train")):
        return {"": ""}
    return {"fit": "train", **({"validation": "val"} if len(held) == 2 else {}), "test": held[-1]}


def _listed(folder: str, base: str) -> list[tuple[str, str]]:
    """(class, path below the folder) of every picture of a part; a class's folder without any is refused."""
    found = []
    for name in _folders(os.path.join(folder, base)):
        inside = sorted(os.listdir(os.path.join(folder, base, name)))
        pictures = [file for file in inside if file.lower().endswith(PICTURE_SUFFIXES) and not file.startswith(".")]
        if not pictures:
            where = os.path.join(folder, base, name)
            raise LlavaError(f"probe: {where}: found no pictures, expected some of {', '.join(PICTURE_SUFFIXES)}")
        found += [(name, os.path.join(base, name, file)) for file in pictures]
    return found


def _dealt(folder: str, name: str, own: dict[str, list[str]], missing: int, seed: int):
    """(part, paths) of a class's readable pictures."""
    cannot = f" ({missing} more cannot be read)" if missing else ""
    rest = own.get("", own.get("fit", []))
    if len(rest) < 2:
        raise LlavaError(
            f"probe: {folder}: found {len(rest)} picture{'' if len(rest) == 1 else 's'} of the class {name}"
            f"{cannot}{'' if '' in own else ' to train on'}, expected two or more"
        )
    random.Random(f"{seed} {name}").shuffle(rest)
    if "" in own:
        count = max(1, round(TEST_SHARE * len(rest)))
        yield "test", rest[:count]
        rest = rest[count:]
    else:
        yield "test", own["test"]
    if "validation" in own:
        yield "validation", own["validation"]
        count = 0
    else:
        count = max(1, round(VALIDATION_SHARE * len(rest))) if len(rest) > 1 else 0
        yield "validation", rest[:count]
    yield "fit", rest[count:]


def _unreadable(folder: str, paths: list[str], record: Path | None) -> dict[str, str]:
    """{path: why} of the pictures that cannot be read."""
    from tqdm import tqdm

    stamp = fingerprint(folder, paths)
    if record is not None and record.is_file():
        known = read_json(record)
        if isinstance(known, dict) and known.get("pictures") == stamp:
            return known["unreadable"]
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda path: _fault(os.path.join(folder, path)), paths)
        found = list(tqdm(found, total=len(paths), desc="probe: reading pictures", unit="picture"))
    faults = {path: fault for path, fault in zip(paths, found, strict=True) if fault}
    if record is not None:
        write_json(record, {"folder": folder, "pictures": stamp, "unreadable": faults})
    return faults


def _fault(path: str) -> str | None:
    from llava.images.reading import load_image

    try:
        load_image(path)
    except LlavaError as error:
        return str(error)
    return None


def _tell(faults: dict[str, str]) -> None:
    from tqdm import tqdm

    told = list(faults.values())
    for line in told[:_NAMED]:
        tqdm.write(f"left out: {line}")
    if len(told) > _NAMED:
        tqdm.write(f"left out: {len(told) - _NAMED} more pictures that cannot be read")


def fingerprint(folder: str, paths: list[str]) -> str:
    """A hash of which pictures these are, by name, size and time of change."""
    import hashlib

    digest = hashlib.sha256()
    for path in paths:
        stat = os.stat(os.path.join(folder, path))
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def read_json(path: Path):
    """What `write_json` wrote; None of a file that is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return None


def write_json(path: Path, content) -> None:
    """Whole or not at all; what JSON has no value for as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.tmp")
    half.write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")
    os.replace(half, path)
