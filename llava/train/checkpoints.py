"""Checkpoints that can be trusted: each becomes visible by one rename, when all of it is on the disk, with a manifest.

A save is written to OUT/.checkpoint-N.tmp/checkpoint-N, flushed to the disk, given `manifest.json` (sizes and SHA-256
of its files) and moved to OUT/checkpoint-N. What is read back is held against that list first.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llava.errors import LlavaError
from llava.utils import rank0_print

MANIFEST_NAME, STATE_NAME = "manifest.json", "trainer_state.json"
SCHEMA = 1
FINAL = ".final.tmp"  # the trained model, until it is whole
_TEMPORARY = re.compile(r"\.checkpoint-(\d+)\.(tmp|old)")
_PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "safetensors")


# --- reading ----------------------------------------------------------------------------------------------------------


def steps_of(folder: Path) -> int | None:
    """N of a folder `checkpoint-N`."""
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number != folder.name and number.isdecimal() else None


def checkpoints_of(out: str | Path) -> list[Path]:
    """The folders `checkpoint-N` of a run, whole or not, by their steps."""
    folders = [path for path in Path(out).glob("checkpoint-*") if path.is_dir() and steps_of(path) is not None]
    return sorted(folders, key=steps_of)


def newest_whole(out: str, how: str = "full", tell=rank0_print) -> str | None:
    """The last checkpoint of a run that is whole; those after it are named with what is wrong.

    Args:
        out: the run's folder.
        how: "full": by the content of each file; "sizes": by their sizes.
        tell: what takes each line.
    """
    for folder in reversed(checkpoints_of(out)):
        if (wrong := fault(folder, how, tell)) is None:
            return str(folder)
        tell(f"{folder}: passed over: {wrong}")
    return None


def fault(folder: str | Path, how: str = "full", tell=rank0_print) -> str | None:
    """What is wrong with a checkpoint, in a few words; None: nothing was found.

    Without a manifest (LLaVA-NeXT's, an earlier version's) its files are looked at as far as they show that they were
    cut. Args as of `newest_whole`.
    """
    folder = Path(folder)
    if not (folder / MANIFEST_NAME).exists():
        wrong = _cut(folder)
        if wrong is None:
            tell(f"{folder}: has no {MANIFEST_NAME} (of another program or an earlier version), its files look whole")
        return wrong
    try:
        manifest = read_manifest(folder)
    except LlavaError as error:
        return str(error).removeprefix(f"{folder}{os.sep}")
    if not manifest.get("finite", True):
        return "its weights are not finite"
    return _state_fault(folder) or _changed(folder, manifest["files"], how)


def read_manifest(folder: str | Path) -> dict | None:
    """What a checkpoint says of itself; None where it has no manifest.

    Raises:
        LlavaError: it is not one.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in content["files"].items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise LlavaError(f"{path}: not a manifest ({type(error).__name__}: {error})") from None
    if content.get("schema") != SCHEMA:
        raise LlavaError(f"{path}: found schema {content.get('schema')}, expected {SCHEMA}")
    return {**content, "files": files}


def _changed(folder: Path, files: dict[str, tuple[int, str]], how: str) -> str | None:
    """The first file that is not as it was written."""
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (found := path.stat().st_size) != size:
            return f"{name} has {found} bytes, {size} were written"
    if how != "full":
        return None
    try:
        for name, found in _each(sha256, folder, files):
            if found != files[name][1]:
                return f"{name} is not as it was written (SHA-256)"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return None


def _state_fault(folder: Path) -> str | None:
    try:
        state = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{STATE_NAME} is missing"
    except (OSError, ValueError) as error:
        return f"{STATE_NAME}: not valid JSON ({error})"
    if not isinstance(state, dict) or not isinstance(state.get("global_step"), int):
        return f"{STATE_NAME}: found no global_step"
    return None


def _cut(folder: Path) -> str | None:
    """The first file that shows that it was not written to its end."""
    if wrong := _state_fault(folder):
        return wrong
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if wrong := _file_fault(path):
            return f"{path.relative_to(folder)}: {wrong}"
    for path in folder.glob("*.index.json"):
        shards = set(json.loads(path.read_text(encoding="utf-8")).get("weight_map", {}).values())
        if lacking := sorted(shard for shard in shards if not (folder / shard).is_file()):
            return f"{lacking[0]} is missing"
    latest = folder / "latest"  # DeepSpeed's: the name of the folder that holds its state
    if latest.is_file() and not (folder / latest.read_text().strip()).is_dir():
        return f"{latest.read_text().strip()} is missing"
    return None


def _file_fault(path: Path) -> str | None:
    if path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            return f"not valid JSON ({error})"
    elif path.suffix == ".safetensors":
        return _safetensors_fault(path)
    elif path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            start = file.read(2)
        if not start or start == b"PK":  # a zip archive has its list at its end
            return "cut" if start else "empty"
    return None


def _safetensors_fault(path: Path) -> str | None:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            return "cut"
        try:
            tensors = json.loads(file.read(length))
        except ValueError:
            return "its header is not JSON"
    ends = [tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__"]
    expected = 8 + length + max(ends, default=0)
    return None if size == expected else f"has {size} bytes, {expected} were written"


# --- writing ----------------------------------------------------------------------------------------------------------


def temporary(out: str | Path, step: int) -> Path:
    """The folder in which checkpoint-`step` is written."""
    return Path(out) / f".checkpoint-{step}.tmp" / f"checkpoint-{step}"


def files_in(folder: Path) -> list[str]:
    """The files of a folder and its folders, relative to it; the manifest is not one of them."""
    found = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != MANIFEST_NAME)


def entries(folder: Path, names: Iterable[str]) -> dict[str, dict]:
    """What a manifest says of these files, once they are on the disk."""

    def entry(path: Path) -> dict:
        flush(path)
        return {"bytes": path.stat().st_size, "sha256": sha256(path)}

    return dict(_each(entry, folder, names))


def publish(written: Path, out: str | Path, about: dict, files: dict[str, dict]) -> Path:
    """Make a checkpoint visible, in place of one of the same step.

    Args:
        written: its folder (see `temporary`).
        out: the run's folder.
        about: what its manifest says beside the files.
        files: `entries` of all of its files.
    """
    write_json(written / MANIFEST_NAME, {"schema": SCHEMA, **about, "versions": _versions(), "files": files})
    for folder in {path.parent for path in written.rglob("*")}:
        flush(folder)
    final = Path(out) / written.name
    before = Path(out) / f".{written.name}.old"
    if final.exists():  # two renames; `tidy` ends what is stopped between them
        shutil.rmtree(before, ignore_errors=True)
        os.rename(final, before)
    os.rename(written, final)
    flush(Path(out))
    shutil.rmtree(before, ignore_errors=True)
    shutil.rmtree(written.parent)
    return final


def tidy(out: str | Path) -> None:
    """End what a run that was killed had begun: a checkpoint that was whole becomes visible, the rest is removed."""
    shutil.rmtree(Path(out) / FINAL, ignore_errors=True)
    for path in sorted(Path(out).glob(".checkpoint-*"), reverse=True):  # a new one (tmp) stands above the old
        if not (match := _TEMPORARY.fullmatch(path.name)):
            continue
        name = f"checkpoint-{match[1]}"
        whole = path / name if match[2] == "tmp" else path
        if not (Path(out) / name).exists() and (whole / MANIFEST_NAME).exists() and not fault(whole, "sizes"):
            os.rename(whole, Path(out) / name)
        shutil.rmtree(path, ignore_errors=True)


def rotate(out: str | Path, limit: int | None, keep: set[str]) -> None:
    """Remove checkpoints until `limit` are left; None: none.

    Those of `keep` stay: the one just written, the best. First go those of later steps, which are damaged or of a run
    that was left, then the oldest.
    """
    if not limit:
        return
    kept = {Path(path).resolve() for path in keep}
    newest = max(filter(None, map(steps_of, kept)), default=0)
    folders = checkpoints_of(out)
    order = [*(path for path in folders if steps_of(path) > newest), *folders]
    surplus = [path for path in dict.fromkeys(order) if path.resolve() not in kept]
    for folder in surplus[: max(len(folders) - max(limit, len(kept)), 0)]:
        # its name goes first, so that one that is half removed is none
        gone = folder.with_name(f".{folder.name}.old")
        os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def move_into(written: Path, out: Path) -> None:
    """Put the files of a folder into another one, each whole, in place of those of the same names."""
    names = files_in(written)
    for name in names:
        flush(written / name)
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(written / name, out / name)
    flush(out)
    shutil.rmtree(written)


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file that is whole or as before, also after a loss of power."""
    beside = path.with_name(f".{path.name}.tmp")
    with open(beside, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # file systems that cannot, of a folder
            raise
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_error(error: Exception, folder: Path, needed: int) -> LlavaError | None:
    """One line for a save that failed for its disk's sake; None: `error` is another.

    Args:
        folder: where it was written.
        needed: bytes of such a save, roughly.
    """
    text = str(error)
    number = getattr(error, "errno", None)
    full = number in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in text or "No space left" in text
    if full or "PytorchStreamWriter" in text or "inline_container" in text:  # torch does not tell why it could not
        free = shutil.disk_usage(folder).free
        return LlavaError(
            f"{folder}: disk full: a checkpoint needs about {_gigabytes(needed)}, {_gigabytes(free)} are free; "
            "expected room for it (save_total_limit keeps fewer); earlier checkpoints are as they were"
        )
    if isinstance(error, OSError) or "os error" in text:
        return LlavaError(f"{folder}: a checkpoint could not be written: {' '.join(text.split())}")
    return None


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _each(function, folder: Path, names: Iterable[str]):
    """(name, function of its path) of each file; hashing lets go of the interpreter's lock."""
    names = list(names)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from zip(names, pool.map(function, (folder / name for name in names)), strict=True)
