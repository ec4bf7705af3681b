"""What the host knows of the lengths of packed segments.

Shapes: S segments. `cu_seqlens` [S + 1] holds where each segment begins and the last one ends: 0, n_0, n_0 + n_1, ...
"""

import itertools

import torch


class HostCopy:
    """What the host knows of a `cu_seqlens` tensor, kept on the tensor itself: read once, used by every layer.

    A change of the tensor in place shows in its version; inference tensors have none and must not be changed.
    """

    def __init__(self, lengths: tuple[int, ...], version: int | None):
        self.lengths = lengths
        self.total = sum(lengths)
        self.longest = max(lengths)
        self.version = version
        self.groups: dict[tuple[int, ...], list[list[int]]] = {}  # of the sdpa backend, by the lengths of the keys


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def pack_lengths(lengths, device=None) -> tuple[torch.Tensor, int]:
    """Segment lengths on the host -> (`cu_seqlens` int32 [S + 1] on `device`, longest length); no later device read.

    Raises:
        ValueError: no segment, or an empty one.
    """
    lengths = tuple(int(length) for length in lengths)
    _check_lengths(lengths, "lengths")
    cu_seqlens = torch.tensor((0, *itertools.accumulate(lengths)), dtype=torch.int32)
    cu_seqlens = cu_seqlens.to(device, non_blocking=True)  # a blocking copy waits for all that the device has to do
    cu_seqlens._host_copy = HostCopy(lengths, _version(cu_seqlens))
    return cu_seqlens, cu_seqlens._host_copy.longest


def _check_lengths(lengths: tuple[int, ...], name: str) -> None:
    if not lengths:
        raise ValueError(f"{name}: describes no segment, expected at least one")
    if min(lengths) < 1:
        at = next(i for i, length in enumerate(lengths) if length < 1)
        raise ValueError(f"{name}: segment {at} has length {lengths[at]}, expected at least 1")


def host_copy(cu_seqlens: torch.Tensor, name: str, keep: bool = True) -> HostCopy:
    """Lengths of the segments on the host; read from the device the first time this tensor is seen.

    keep: put them on the tensor; not where a compiled graph owns it, which may write other lengths to the same memory
        without a new version. A look costs nothing on a CPU, so that there it is not asked what was kept either.
    """
    known = getattr(cu_seqlens, "_host_copy", None) if keep or cu_seqlens.is_cuda else None
    if known is not None and known.version == _version(cu_seqlens):
        return known
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name}: found {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}, expected integers of shape [S + 1]"
        )
    starts = cu_seqlens.tolist()
    lengths = tuple(b - a for a, b in itertools.pairwise(starts))
    _check_lengths(lengths, name)
    if starts[0] != 0:
        raise ValueError(f"{name}: begins with {starts[0]}, expected 0")
    found = HostCopy(lengths, _version(cu_seqlens))
    if keep:
        cu_seqlens._host_copy = found
    return found
