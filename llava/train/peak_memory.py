"""The most memory that is held while something runs: of a CUDA device, or of this process."""

import contextlib
from pathlib import Path

M_MMAP_THRESHOLD = -3  # of glibc's mallopt


class PeakMemory:
    """Context: afterwards, the most memory held since its start; None where it cannot be measured.

    On CUDA what PyTorch allocated on the device; on a CPU the process's resident set, where Linux lets it be measured.

    Attributes:
        bytes: the peak.
        grown: by how much it is above what was held at the start.
        gib: the peak in 2^30 bytes.
    """

    def __init__(self, device: str):
        self.device, self.bytes, self.grown, self._begun = device, None, None, None

    @property
    def gib(self) -> float | None:
        return None if self.bytes is None else round(self.bytes / 2**30, 3)

    def __enter__(self):
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._begun = torch.cuda.memory_allocated()
        elif _reset_peak_resident():
            self._begun = _resident("VmRSS")
        return self

    def __exit__(self, *exception):
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated()
        elif self._begun is not None:
            self.bytes = _resident("VmHWM")
        if self.bytes is not None:
            self.grown = max(0, self.bytes - self._begun)


def _reset_peak_resident() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or a kernel that does not offer it
        return False
    return _resident("VmHWM") is not None


def _resident(field: str) -> int | None:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


@contextlib.contextmanager
def given_back():
    """Let the C library give large blocks back when they are freed, so that the resident set is what is held. Else it
    keeps blocks of up to 32 MB in its heap, in whose gaps those of other sizes do not fit. That is faster, and how
    steps are timed."""
    import ctypes
    import ctypes.util

    library = ctypes.CDLL(ctypes.util.find_library("c") or None)
    if not hasattr(library, "mallopt"):  # not glibc
        yield
        return
    library.mallopt(M_MMAP_THRESHOLD, 2**20)
    library.malloc_trim(0)
    try:
        yield
    finally:
        library.mallopt(M_MMAP_THRESHOLD, 2**25)
