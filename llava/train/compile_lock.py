"""DeepSpeed's extensions are compiled at first use: a line says so, and a lock that nobody holds is taken over.

PyTorch lets one process compile in a folder: the one that has made the file `lock` in it, and keeps it open. The others
wait until it is removed, for ever where that process was killed.
"""

import contextlib
import fcntl
import os
import time
from pathlib import Path

from llava.utils import rank0_print

_FRESH = 10.0  # seconds in which a lock counts as held, though no process of this machine is seen to hold it
_FRESH_ELSEWHERE = 1800.0  # the same, on a disk that other machines may compile on
_OF_MACHINES = ("nfs", "lustre", "gpfs", "ceph", "beegfs", "cifs", "smb", "fuse", "9p", "afs", "panfs", "wekafs")


def tell_compilation() -> None:
    """From now on compiling is told, and stale locks are taken over."""
    from torch.utils import cpp_extension

    if not issubclass(cpp_extension.FileBaton, _Told):
        cpp_extension.FileBaton = _told_baton(cpp_extension.FileBaton)


class _Told:
    """What all batons of `_told_baton` are."""


def _told_baton(base: type) -> type:
    class ToldBaton(_Told, base):
        """PyTorch's lock on a folder that one process compiles in."""

        def try_acquire(self) -> bool:
            """True: this process is to compile. False: another has, which is waited for here."""
            path, said = Path(self.lock_file_path), False
            while not super().try_acquire():
                if self._remove_if_stale(path):
                    continue
                if not said:
                    said = True
                    rank0_print(f"waiting for {owner_of(path) or 'another process'}, which compiles {path.parent}")
                time.sleep(self.wait_seconds)
                if not path.exists() and any(path.parent.glob("*.so")):
                    return False
            with contextlib.suppress(OSError):  # a file system without them
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # for those that do not see this process
            if not any(path.parent.glob("*.so")):
                print(f"compiling {path.parent.name} in {path.parent}: once, it takes a minute or so", flush=True)
            return True

        def _remove_if_stale(self, path: Path) -> bool:
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX)  # else of two processes one removes the other's new lock
                age = is_stale(path)
                if age is not None:
                    path.unlink()
                    print(f"{path}: removed, made {age:.0f} s ago by a process that is gone", flush=True)
                return age is not None
            finally:
                os.close(folder)

    return ToldBaton


def is_stale(lock: Path) -> float | None:
    """The age in seconds of a lock that nobody holds; None: somebody holds it, or may do so, or there is none."""
    try:
        age = time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return None
    fresh = _FRESH_ELSEWHERE if _is_shared(lock) else _FRESH
    return age if age > fresh and owner_of(lock) is None and not _is_locked(lock) else None


def _is_locked(path: Path) -> bool:
    """Whether a process that has told of its compiling holds the lock, on whatever side of a container's wall."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # two that ask do not see each other
    except BlockingIOError:
        return True
    except OSError:  # it has been removed, or there are no such locks
        return False
    return False


def owner_of(lock: Path) -> str | None:
    """The process of this machine that has the lock open."""
    path = os.path.realpath(lock)
    for links in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(os.readlink(link) == path for link in links.iterdir()):
                return f"process {links.parent.name}"
        except OSError:  # another user's, or it has ended
            continue
    return None


def _is_shared(path: Path) -> bool:
    """Whether other machines may see this file."""
    real, best = os.path.realpath(path), ("", "")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, *_ = line.split()
        if len(mount) > len(best[0]) and f"{real}/".startswith(f"{mount.rstrip('/')}/"):
            best = mount, kind
    return best[1].startswith(_OF_MACHINES)
