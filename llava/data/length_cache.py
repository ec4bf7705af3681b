"""Lengths kept beside the data file that they are of, so that a second run with the same settings need not ask again.

The file is `FILE.llava-lengths-v1.safetensors`, or in the user's cache folder where there is no writing beside FILE.
It holds the lengths of a few settings, the newest first, each under its fingerprint, and the SHA-256 of FILE: lengths
of other content are not used. Pictures are not looked at again; whoever replaces them removes the file.
"""

import contextlib
import fcntl
import hashlib
import os
import tempfile
from typing import NamedTuple

import numpy as np

from llava.utils import rank0_print

ENDING = ".llava-lengths-v1.safetensors"
_SETTINGS = 8  # of so many settings a file keeps the lengths: towers are compared on the same data


class Lengths(NamedTuple):
    """Of N records: tokens and patches int32 [N], and bool [N] whether they are exact, as `llava.families.base.Length`
    says. A record that gives no sample has 0 tokens."""

    tokens: np.ndarray
    patches: np.ndarray
    exact: np.ndarray

    @classmethod
    def empty(cls, count: int) -> "Lengths":
        return cls(np.zeros(count, np.int32), np.zeros(count, np.int32), np.zeros(count, bool))

    def put(self, at, values: "Lengths") -> None:
        """Set those of the records `at`."""
        for own, new in zip(self, values, strict=True):
            own[at] = new

    def take(self, at) -> "Lengths":
        """Those of the records `at`."""
        return Lengths(*(own[at] for own in self))


class LengthCache:
    """The lengths that are kept of one data file.

    Args:
        data_file: the file, which is read to the end.
    """

    def __init__(self, data_file: str):
        with open(data_file, "rb") as file:
            self.content = hashlib.file_digest(file, "sha256").hexdigest()
        self.paths = places(data_file)

    def read(self, settings: str, rows: np.ndarray) -> tuple[Lengths, np.ndarray]:
        """What is known of the rows of the file under a fingerprint, and bool [N] which of them are known."""
        found, known = Lengths.empty(len(rows)), np.zeros(len(rows), bool)
        for path in self.paths:
            kept = self._read(path, settings).get(settings)
            if kept is None or not len(kept[0]):
                continue
            at = np.searchsorted(kept[0], rows).clip(max=len(kept[0]) - 1)
            new = (kept[0][at] == rows) & ~known
            found.put(new, kept[1].take(at[new]))
            known |= new
        return found, known

    def write(self, settings: str, rows: np.ndarray, lengths: Lengths) -> None:
        """Keep the lengths of some rows, and what was kept of others; a disk that is full or closed is told of."""
        for path in self.paths:
            kept = self._read(path)
            before = kept.pop(settings, (np.zeros(0, np.int64), Lengths.empty(0)))
            every = np.union1d(before[0], rows)
            joined = Lengths.empty(len(every))
            joined.put(np.searchsorted(every, before[0]), before[1])
            joined.put(np.searchsorted(every, rows), lengths)
            try:
                self._write(path, {settings: (every, joined), **kept})
                return
            except OSError as error:
                reason = f"{path}: {error.strerror or error}"
        rank0_print(f"lengths: cannot be kept ({reason}); the next run asks for them again")

    def _read(self, path: str, settings: str | None = None) -> dict[str, tuple[np.ndarray, Lengths]]:
        """Fingerprint -> (rows, their lengths) of a file, one or all; nothing of a file of other content."""
        from safetensors import SafetensorError, safe_open

        if not os.path.isfile(path):
            return {}
        try:
            with safe_open(path, "np") as file:
                said = file.metadata() or {}
                if said.get("content") != self.content:
                    return {}
                names = [name for name in said.get("settings", "").split() if settings in (None, name)]
                parts = {
                    name: [file.get_tensor(f"{name}.{part}") for part in ("rows", *Lengths._fields)] for name in names
                }
        except (SafetensorError, OSError) as error:
            rank0_print(f"{path}: cannot be read ({error}); the lengths are asked for again")
            return {}
        return {name: (rows, Lengths(*values)) for name, (rows, *values) in parts.items()}

    def _write(self, path: str, kept: dict[str, tuple[np.ndarray, Lengths]]) -> None:
        """Under another name first: a run that is killed leaves no half of a file."""
        from safetensors.numpy import save

        names = list(kept)[:_SETTINGS]
        tensors = {f"{name}.rows": kept[name][0] for name in names}
        tensors |= {f"{name}.{part}": values for name in names for part, values in kept[name][1]._asdict().items()}
        data = save(tensors, {"content": self.content, "settings": " ".join(names)})
        os.makedirs(os.path.dirname(path), exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=os.path.dirname(path))
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                os.fchmod(file.fileno(), 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def places(data_file: str) -> list[str]:
    """Where the lengths of a file may be, the first choice first."""
    path = os.path.abspath(data_file)
    user = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    number = hashlib.sha256(path.encode()).hexdigest()[:16]
    return [path + ENDING, os.path.join(user, "llava", "lengths", f"{os.path.basename(path)}-{number}{ENDING}")]


@contextlib.contextmanager
def one_process(data_file: str):
    """One process of this machine at a time; gives whether another had to be waited for. Who is killed lets go."""
    number = hashlib.sha256(os.path.abspath(data_file).encode()).hexdigest()[:16]
    lock = os.path.join(tempfile.gettempdir(), f"llava-lengths-{os.getuid()}-{number}.lock")
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            waited = False
        except BlockingIOError:
            rank0_print(f"waiting for another process, which asks for the lengths of {data_file}")
            fcntl.flock(file, fcntl.LOCK_EX)
            waited = True
        yield waited


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
