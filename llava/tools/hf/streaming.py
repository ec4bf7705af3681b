"""Weights from one folder to another, tensor by tensor: what is in memory is one shard, never the model."""

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from llava.errors import LlavaError

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE = ("model.safetensors", "pytorch_model.bin")
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}


class Stored(NamedTuple):
    """One tensor as it lies in a file."""

    file: str
    name: str
    shape: tuple[int, ...]
    dtype: str  # torch's name of it

    @property
    def numel(self) -> int:
        count = 1
        for side in self.shape:
            count *= side
        return count


class Weights:
    """The weights of a model folder; only their headers are read until `read` is called.

    Args:
        folder: with .safetensors, or with .bin files of plain tensors; sharded or not.
        prefixes: read only the names that begin so; () for all.

    Raises:
        LlavaError: no weights, a shard that is missing or damaged.
    """

    def __init__(self, folder: str, prefixes: tuple[str, ...] = ()):
        self.folder = folder
        self.stored: dict[str, Stored] = {}
        self._open = (None, None)  # the file that was read last, as (path, reader)
        for file in weight_files(folder):
            entries = _safetensors_entries(file) if file.endswith(".safetensors") else self._bin_entries(file)
            for name, shape, dtype in entries:
                if not prefixes or name.startswith(prefixes):
                    self.stored[name] = Stored(file, name, tuple(shape), dtype)

    def read(self, name: str):
        """A tensor, copied from its file."""
        file = self.stored[name].file
        reader = self._reader(file)
        return reader[name].clone() if isinstance(reader, dict) else reader.get_tensor(name)

    def close(self) -> None:
        """Let go of the file that was read last."""
        self._open = (None, None)

    def _reader(self, file: str):
        if self._open[0] != file:
            if file.endswith(".safetensors"):
                from safetensors import safe_open

                self._open = file, safe_open(file, "pt")
            else:
                self._open = file, _load_bin(file)
        return self._open[1]

    def _bin_entries(self, file: str):
        return [
            (name, tuple(value.shape), str(value.dtype).removeprefix("torch."))
            for name, value in self._reader(file).items()
        ]


def weight_files(folder: str) -> list[str]:
    """Files of a folder's weights, in order.

    Raises:
        LlavaError: none, or a shard that the index names is not there.
    """
    for index in INDEXES:
        path = os.path.join(folder, index)
        if os.path.isfile(path):
            try:
                with open(path, encoding="utf-8") as file:
                    names = sorted(set(json.load(file)["weight_map"].values()))
            except (ValueError, KeyError, AttributeError):
                raise LlavaError(f"{path}: found no weight_map in it, expected an index of shards") from None
            lacking = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
            if lacking:
                raise LlavaError(f"{folder}: lacks {', '.join(lacking[:3])}, which {index} names")
            return [os.path.join(folder, name) for name in names]
    for name in SINGLE:
        if os.path.isfile(os.path.join(folder, name)):
            return [os.path.join(folder, name)]
    raise LlavaError(f"{folder}: found no weights, expected {', '.join((*SINGLE, *INDEXES))}")


def _safetensors_entries(path: str):
    """[(name, shape, dtype)] from the header of a file, which also says how long the file must be."""
    damaged = LlavaError(f"{path}: not a whole safetensors file")
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            size = os.path.getsize(path)
            if length > size:
                raise damaged
            header = json.loads(file.read(length))
    except (struct.error, ValueError):
        raise damaged from None
    header.pop("__metadata__", None)
    if max((entry["data_offsets"][1] for entry in header.values()), default=0) + 8 + length != size:
        raise damaged
    return [(name, entry["shape"], DTYPES.get(entry["dtype"], entry["dtype"])) for name, entry in header.items()]


def _load_bin(path: str) -> dict:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises several kinds for a file it will not unpickle
        raise LlavaError(f"{path}: not a file of plain tensors ({str(error).splitlines()[0][:120]})") from None


@dataclass(frozen=True)
class Target:
    """One tensor to be written: what it will be, and how to get it."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable

    @property
    def bytes(self) -> int:
        import torch

        count = getattr(torch, self.dtype).itemsize
        for side in self.shape:
            count *= side
        return count


def write_shards(folder: str, targets: dict[str, Target], max_shard_size: str | int = "5GB", label="writing") -> int:
    """Write safetensors files of at most `max_shard_size` each (a larger tensor gets its own), with an index.

    Args:
        folder: one that exists.
        targets: name -> tensor, read when its shard is written.
        label: of the progress bar, which counts bytes.

    Returns:
        Bytes of all tensors.

    Raises:
        LlavaError: a size that is none, or no room on the disk.
    """
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.torch import save_file
    from tqdm import tqdm

    try:
        plan = split_state_dict_into_shards_factory(
            targets,
            get_storage_size=lambda target: target.bytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError:
        raise LlavaError(f"max_shard_size: found {max_shard_size!r}, expected a size like 5GB or 500MB") from None
    total = sum(target.bytes for target in targets.values())
    with tqdm(total=total, desc=label, unit="B", unit_scale=True) as bar:
        for name, members in plan.filename_to_tensors.items():
            shard = {}
            for member in members:
                shard[member] = _read(member, targets[member])
                bar.update(targets[member].bytes)
            path = os.path.join(folder, name)
            try:
                save_file(shard, path, {"format": "pt"})
            except OSError as error:
                raise LlavaError(f"{folder}: cannot be written: {error.strerror or error}") from None
            os.chmod(path, 0o666 & ~_umask())  # safetensors lets nobody but the owner read
            del shard
    if plan.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": plan.tensor_to_filename}
        with open(os.path.join(folder, INDEXES[0]), "w", encoding="utf-8") as file:
            json.dump(index, file, indent=2, sort_keys=True)
    return total


def _read(name: str, target: Target):
    value = target.read()
    if tuple(value.shape) != target.shape:
        raise LlavaError(f"{name}: found {tuple(value.shape)}, expected {target.shape}")
    return value.contiguous()


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def with_dtype(read: Callable, dtype: str) -> Callable:
    """`read` whose tensor has another dtype."""
    import torch

    return lambda: read().to(getattr(torch, dtype))


def with_rows(read: Callable, rows: int) -> Callable:
    """`read` of an embedding whose tensor has `rows` rows; new ones are the mean of the old.

    A new row of the output layer then never has the largest logit, since a mean is not above the largest of what it is
    the mean of: greedy answers stay what they were.
    """
    import torch

    def grown():
        value = read()
        mean = value.mean(0, dtype=torch.float32).to(value.dtype)
        return torch.cat([value, mean.expand(rows - value.shape[0], -1)])

    return grown


def with_fewer_rows(read: Callable, rows: int) -> Callable:
    """`read` of an embedding, cut to its first `rows` rows."""
    return lambda: read()[:rows].clone()
