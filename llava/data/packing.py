"""Sequence packing: which samples share a row.

A row is what one forward pass of one rank takes: whole samples one after the other, without padding. Two ways:

    step     the samples of an optimizer step, those that it has unpacked, are divided over its rows by cost
    buffer   rows are filled from a look-ahead buffer, the longest sample first (first-fit decreasing); a step is a
             number of rows, and has as many samples as there is room for

All is decided by lengths and a seed, so every rank finds the same rows, and a resumed run finds its place.
"""

import heapq
import random
from collections.abc import Iterator, Sequence
from itertools import chain

from torch.utils.data import Sampler

from llava.utils import rank0_print


def cost(tokens: int, patches: int, config) -> float:
    """What a sample costs, in forward FLOPs: weights times tokens, and attention, which is quadratic.

    2 N (4 D² + 3 D I) + 2 N² D a layer of the language model (causal, D wide, I in the MLP), and 2 P (4 C² + 2 C J) +
    4 P² C a layer of the vision encoder (C wide, J in the MLP): a decoder with a gated MLP and all heads of its own,
    and an encoder that sees all of a sample's P patches at once. It is a measure to divide by; what a step really takes
    is counted by `llava.train.flops`.

    Args:
        tokens: N, merged, of the language model; or float [samples].
        patches: P, of the vision encoder; or float [samples].
        config: a model's, with the text half in it or beside it.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    width, inner, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    total = 1.0 * layers * (2 * tokens * (4 * width**2 + 3 * width * inner) + 2 * tokens**2 * width)
    vision = getattr(config, "vision_config", None) or getattr(config, "mm_vision_config", None)
    if vision is None:
        return total
    read = vision.get if isinstance(vision, dict) else lambda name, other=None: getattr(vision, name, other)
    wide = read("embed_dim") or read("hidden_size")
    depth = read("depth") or read("num_hidden_layers")
    if not depth:  # an encoder of the user's own, which need not say how it is made
        return total
    inner = read("intermediate_size") or int(wide * (read("mlp_ratio") or 4))
    return total + depth * (2 * patches * (4 * wide**2 + 2 * wide * inner) + 4 * patches**2 * wide)


def divide(tokens: Sequence[int], costs: Sequence[float], rows: int, pack_length: int | None = None) -> list[list[int]]:
    """Samples divided over a number of rows so that the most expensive row is cheap: the dearest sample first, each to
    the cheapest row that has room (LPT; Graham 1969: at most 4/3 of the best).

    Where that leaves no room for one, lengths alone decide.

    Args:
        tokens, costs: of each sample.
        rows: how many there are.
        pack_length: most tokens of a row; None: no limit. Where the samples do not fit into so many rows it is
            exceeded, by as little as LPT finds.

    Returns:
        The places of the samples in each row, in order; a row may be empty.
    """
    made = _longest_first(tokens, costs, rows, pack_length)
    if made is None:
        made = first_fit_decreasing(tokens, pack_length)
        made += [[] for _ in range(rows - len(made))]
        if len(made) > rows:
            made = _longest_first(tokens, tokens, rows, None)
    return [sorted(row) for row in made]


def _longest_first(tokens, costs, rows: int, pack_length: int | None) -> list[list[int]] | None:
    """LPT; None where a sample finds no row with room."""
    made: list[list[int]] = [[] for _ in range(rows)]
    filled, cheapest = [0] * rows, [(0.0, row) for row in range(rows)]
    for at in sorted(range(len(tokens)), key=lambda at: (-costs[at], -tokens[at], at)):
        passed = []
        while cheapest and pack_length is not None and filled[cheapest[0][1]] + tokens[at] > pack_length:
            passed.append(heapq.heappop(cheapest))
        if not cheapest:
            return None
        spent, row = cheapest[0]
        heapq.heapreplace(cheapest, (spent + costs[at], row))
        made[row].append(at)
        filled[row] += tokens[at]
        for entry in passed:
            heapq.heappush(cheapest, entry)
    return made


def first_fit_decreasing(tokens: Sequence[int], pack_length: int) -> list[list[int]]:
    """Places of samples in as few rows of at most `pack_length` tokens as first-fit decreasing finds (at most 11/9 of
    the fewest, and 1 more).

    A sample longer than a row has one to itself: it is cut when it is made.
    """
    # over the rows, a tree of the most room that is left in each half: the first row with enough in O(log rows)
    size = 1 << max(len(tokens) - 1, 0).bit_length()
    room, rows = [pack_length] * (2 * size), []
    for at in sorted(range(len(tokens)), key=lambda at: (-tokens[at], at)):
        need, node = min(tokens[at], pack_length), 1
        while node < size:
            node *= 2
            node += room[node] < need
        row = node - size
        if row == len(rows):
            rows.append([])
        rows[row].append(at)
        room[node] -= need
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


def plan(lengths: Sequence[int], pack_length: int, *, world: int, seed: int, buffer: int | None = None):
    """An epoch's rows, filled from a look-ahead buffer.

    Args:
        lengths: tokens of each sample, by its number.
        pack_length: most tokens of a row.
        world: ranks; all get the same number of rows, the last of which may be empty.
        seed: of the order in which the samples come.
        buffer: how many samples are looked at together; None: all.

    Returns:
        [rank][row][numbers of samples]; every sample is in exactly one row.
    """
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    rows = _fill(order, lengths, pack_length, buffer)
    random.Random(seed).shuffle(rows)  # the last ones of a buffer are the emptiest
    rows += [[] for _ in range(-len(rows) % world)]
    return [rows[rank::world] for rank in range(world)]


def _fill(order: Sequence[int], lengths: Sequence[int], pack_length: int, buffer: int | None) -> list[list[int]]:
    """Rows of the samples in an order; what a buffer leaves in rows that are not half full waits for the next one."""
    rows, held, at = [], [], 0
    size = max(buffer or len(order), 1)
    while at < len(order):
        taken = max(size - len(held), 1)
        held, at = [*held, *order[at : at + taken]], at + taken
        made = first_fit_decreasing([lengths[number] for number in held], pack_length)
        made = [[held[place] for place in row] for row in made]
        held = []
        if at < len(order):
            full = [2 * sum(lengths[number] for number in row) >= pack_length for row in made]
            held = list(chain.from_iterable(row for row, enough in zip(made, full, strict=True) if not enough))
            made = [row for row, enough in zip(made, full, strict=True) if enough]
        rows += made
    return rows


class StepPacking(Sampler):
    """Batches for a data loader, one a row: the samples of each optimizer step, divided over its rows.

    A step's rows come one accumulation step after the other, in each one for every rank, which is how accelerate deals
    batches out. A row without samples is an empty batch.

    Args:
        sampler: gives numbers of samples, or (epoch, number), in the order of the unpacked run.
        tokens, costs: of each sample.
        samples: of a step.
        rows: of a step: accumulation steps times ranks.
        pack_length: see `divide`.
        drop_last: leave out a last step with fewer samples.
    """

    def __init__(
        self,
        sampler: Sampler,
        tokens: Sequence[int],
        costs: Sequence[float],
        *,
        samples: int,
        rows: int,
        pack_length: int | None = None,
        drop_last: bool = False,
    ):
        self.sampler, self.tokens, self.costs = sampler, tokens, costs
        self.samples, self.rows, self.pack_length, self.drop_last = samples, rows, pack_length, drop_last
        self._told = False  # of a row that is too long

    def __len__(self) -> int:
        whole, rest = divmod(len(self.sampler), self.samples)
        return self.rows * (whole + (rest > 0 and not self.drop_last))

    def __iter__(self) -> Iterator[list]:
        step = []
        for item in self.sampler:
            step.append(item)
            if len(step) == self.samples:
                yield from self._divided(step)
                step = []
        if step and not self.drop_last:
            yield from self._divided(step)

    def _divided(self, step: list) -> Iterator[list]:
        numbers = [item[1] if isinstance(item, tuple) else item for item in step]
        tokens, costs = [int(self.tokens[number]) for number in numbers], [self.costs[number] for number in numbers]
        rows = divide(tokens, costs, self.rows, self.pack_length)
        longest = max(sum(tokens[at] for at in row) for row in rows)
        if self.pack_length is not None and longest > self.pack_length and not self._told:
            self._told = True
            rank0_print(
                f"packing: the {len(step)} samples of a step have {sum(tokens)} tokens and do not fit into {self.rows} "
                f"rows of pack_length {self.pack_length}: its longest row has {longest}. Other steps may do so too"
            )
        return ([step[at] for at in row] for row in rows)


class BufferPacking(Sampler):
    """Batches for a data loader, one a row: rows filled from a look-ahead buffer.

    Which samples share a row is decided once, in the order of the first epoch, so that every epoch has as many steps;
    later ones shuffle the rows.

    Args:
        sampler: gives numbers of samples, or (epoch, number).
        tokens: of each sample.
        pack_length: most tokens of a row.
        rows: of a step: accumulation steps times ranks. The last step is filled up with empty rows.
        buffer: samples that are looked at together.
        seed: of the order of the rows.
    """

    def __init__(self, sampler: Sampler, tokens: Sequence[int], *, pack_length: int, rows: int, buffer: int, seed: int):
        self.sampler, self.seed, self.epoch = sampler, seed, 0
        order = [item[1] if isinstance(item, tuple) else item for item in sampler]
        self._rows = _fill(order, list(map(int, tokens)), pack_length, buffer)
        self._rows += [[] for _ in range(-len(self._rows) % rows)]
        self._with_epoch = isinstance(next(iter(sampler), None), tuple)

    def __len__(self) -> int:
        return len(self._rows)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list]:
        order = list(range(len(self._rows)))
        random.Random(f"{self.seed}, {self.epoch}").shuffle(order)
        for row in order:
            yield [(self.epoch, number) if self._with_epoch else number for number in self._rows[row]]
