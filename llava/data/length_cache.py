"""Lengths kept beside the data file that they are of, so that a second run with the same settings need not ask again.

The file is `FILE.llava-lengths-v1.arrow`, or in the user's cache folder where there is no writing beside FILE. It holds
the lengths of a few settings, a record batch for each, the newest first; its metadata name their fingerprints and the
SHA-256 of FILE: lengths of other content are not used. Pictures are not looked at again; whoever replaces them removes
the file. Without pyarrow (it comes with the extra `train`) nothing is kept.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import tempfile
from typing import NamedTuple

import numpy as np

from llava.utils import rank0_print

ENDING = ".llava-lengths-v1.arrow"
_COLUMNS = {"row": np.int64, "tokens": np.int32, "patches": np.int32, "exact": np.bool_}  # see `Lengths`
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
        if not importlib.util.find_spec("pyarrow"):
            rank0_print("lengths: not kept for the next run, which takes pyarrow: pip install -e '.[train]'")
            return
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
        if not os.path.isfile(path) or not importlib.util.find_spec("pyarrow"):
            return {}
        import pyarrow as pa

        try:
            with pa.OSFile(path) as source, pa.ipc.open_file(source) as file:
                said = file.schema.metadata or {}
                if said.get(b"content") != self.content.encode():
                    return {}
                names = said[b"settings"].decode().split()
                batches = {
                    name: file.get_batch(at) for at, name in enumerate(names) if settings is None or name == settings
                }
        except (pa.ArrowException, OSError, KeyError) as error:
            reason = str(error).splitlines()[0]
            rank0_print(f"{path}: cannot be read ({reason}); the lengths are asked for again")
            return {}
        columns = {
            name: [batch[key].to_numpy(zero_copy_only=False) for key in _COLUMNS] for name, batch in batches.items()
        }
        return {name: (rows, Lengths(*values)) for name, (rows, *values) in columns.items()}

    def _write(self, path: str, kept: dict[str, tuple[np.ndarray, Lengths]]) -> None:
        """Under another name first: a run that is killed leaves no half of a file."""
        import pyarrow as pa

        names = list(kept)[:_SETTINGS]
        types = {name: pa.from_numpy_dtype(kind) for name, kind in _COLUMNS.items()}
        schema = pa.schema(types.items(), {"content": self.content, "settings": " ".join(names)})
        os.makedirs(os.path.dirname(path), exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=os.path.dirname(path))
        try:
            with os.fdopen(handle, "wb") as file:
                with pa.ipc.new_file(file, schema) as writer:
                    for rows, lengths in (kept[name] for name in names):
                        writer.write_batch(pa.record_batch([rows, *lengths], schema=schema))
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
