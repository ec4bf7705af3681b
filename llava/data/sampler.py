"""Orders of the training records that put similar ones into one batch.

All randomness comes from (seed, epoch), so every rank computes the same order and a resumed run finds its place.
A slice of `world_size * batch_size` consecutive indices is one global batch; rank r gets its r-th part.
"""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from llava.errors import LlavaError

GROUP_BY = ("modality_length", "modality_length_auto", "varlen", "length", None)

_MEGABATCH = 50  # batches sorted together by "length" and "modality_length_auto", as in transformers
_VARLEN_MEGABATCH = 8  # global batches shuffled together by "varlen"


class LengthGroupedSampler(Sampler):
    """LLaVA-NeXT's groupings; every index comes exactly once per epoch.

    Args:
        lengths: a length per record; for the modality groupings positive where a record has an image, negative where
            it is text only, never 0.
        batch_size: records per rank and step.
        world_size: ranks, times the steps accumulated into one update if those are to be alike too.
        group_by: "modality_length": global batches of one modality, evenly split over the ranks by length;
            "modality_length_auto": that, and of similar length; "varlen": of similar length; "length": as
            transformers' group_by_length; None: a plain shuffle.
        seed: see above.

    The records of either modality that do not fill a global batch come at the end, images first, so only there may
    a batch hold both.

    Raises:
        LlavaError: an unknown grouping, or a length of 0 with a modality grouping.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, world_size: int = 1, group_by: str | None = None, seed: int = 0
    ):
        if group_by not in GROUP_BY:
            raise LlavaError(f"group_by: found {group_by!r}, expected one of {', '.join(map(str, GROUP_BY))}")
        if group_by in ("modality_length", "modality_length_auto") and not all(lengths):
            raise LlavaError(f"record {list(lengths).index(0)}: found a conversation of length 0, expected some text")
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.world_size = world_size
        self.group_by = group_by
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; without it every epoch has the first one's."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.group_by is None:
            return iter(torch.randperm(len(self.lengths), generator=generator).tolist())
        if self.group_by == "varlen":
            return iter(self._varlen(generator))
        if self.group_by == "length":
            return iter(self._sorted_megabatches(list(range(len(self.lengths))), self.batch_size, generator))
        return iter(self._by_modality(generator))

    def _by_modality(self, generator: torch.Generator) -> list[int]:
        whole, rest = [], []
        size = self.batch_size * self.world_size
        for indices in (
            [index for index, length in enumerate(self.lengths) if length > 0],
            [index for index, length in enumerate(self.lengths) if length < 0],
        ):
            if self.group_by == "modality_length_auto":
                indices = self._sorted_megabatches(indices, size, generator)
            else:
                indices = _shuffled(indices, generator)
            batches = [indices[at : at + size] for at in range(0, len(indices), size)]
            if batches and len(batches[-1]) < size:
                rest += batches.pop()
            whole += batches
        whole = [self._spread_over_ranks(batch) for batch in _shuffled(whole, generator)]
        return [index for batch in whole for index in batch] + rest

    def _spread_over_ranks(self, batch: list[int]) -> list[int]:
        """A full global batch, longest first, dealt out so that the ranks get about the same total length."""
        shares: list[list[int]] = [[] for _ in range(self.world_size)]
        totals = [0] * self.world_size
        for index in sorted(batch, key=lambda i: abs(self.lengths[i]), reverse=True):
            open_ranks = [rank for rank in range(self.world_size) if len(shares[rank]) < self.batch_size]
            rank = min(open_ranks, key=lambda r: totals[r])
            shares[rank].append(index)
            totals[rank] += abs(self.lengths[index])
        return [index for share in shares for index in share]

    def _sorted_megabatches(self, indices: list[int], batch: int, generator: torch.Generator) -> list[int]:
        """Shuffled, then sorted by length (longest first) within runs of some fifty batches.

        The longest record of all comes first, so that a lack of memory shows at once.
        """
        indices = _shuffled(indices, generator)
        if not indices:
            return []
        size = batch * max(min(len(indices) // (batch * 4), _MEGABATCH), 1)
        runs = [
            sorted(indices[at : at + size], key=lambda i: abs(self.lengths[i]), reverse=True)
            for at in range(0, len(indices), size)
        ]
        longest = max(range(len(runs)), key=lambda run: abs(self.lengths[runs[run][0]]))
        runs[0][0], runs[longest][0] = runs[longest][0], runs[0][0]
        return [index for run in runs for index in run]

    def _varlen(self, generator: torch.Generator) -> list[int]:
        size = self.batch_size * self.world_size
        order = sorted(range(len(self.lengths)), key=lambda i: abs(self.lengths[i]), reverse=True)
        runs = [order[at : at + size * _VARLEN_MEGABATCH] for at in range(0, len(order), size * _VARLEN_MEGABATCH)]
        order = [index for run in runs for index in _shuffled(run, generator)]
        batches = [order[at : at + size] for at in range(0, len(order), size)]
        rest = batches.pop() if batches and len(batches[-1]) < size else []
        return [index for batch in _shuffled(batches, generator) for index in batch] + rest


def _shuffled(items: list, generator: torch.Generator) -> list:
    return [items[at] for at in torch.randperm(len(items), generator=generator).tolist()]


class EpochSampler(Sampler):
    """Another sampler's indices as (epoch, index), so that a data set in any worker process knows the epoch."""

    def __init__(self, sampler: Sampler):
        self.sampler, self.epoch = sampler, 0

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __iter__(self):
        return ((self.epoch, index) for index in self.sampler)
