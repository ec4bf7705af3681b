import random

import pytest

from llava.data.sampler import GROUP_BY, LengthGroupedSampler
from llava.errors import LlavaError


def mixed(count=200, seed=0):
    generator = random.Random(seed)
    return [generator.choice([1, 1, -1]) * generator.randint(1, 500) for _ in range(count)]


def global_batches(order, size):
    return [order[at : at + size] for at in range(0, len(order), size)]


@pytest.mark.parametrize("group_by", GROUP_BY)
@pytest.mark.parametrize(("batch", "world"), [(4, 2), (1, 1), (7, 3), (300, 1)])
@pytest.mark.parametrize("lengths", [mixed(), [abs(x) for x in mixed(101)], [-abs(x) for x in mixed(33)], [5]])
def test_every_record_once_per_epoch(group_by, batch, world, lengths):
    sampler = LengthGroupedSampler(lengths, batch, world, group_by)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        assert sorted(sampler) == list(range(len(lengths))) and len(sampler) == len(lengths)


@pytest.mark.parametrize("group_by", GROUP_BY)
def test_the_order_comes_from_seed_and_epoch_alone(group_by):
    def order(seed, epoch):
        sampler = LengthGroupedSampler(mixed(), 4, 2, group_by, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 1) == order(1, 1)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(5, 0)
    sampler = LengthGroupedSampler(mixed(), 4, 2, group_by)
    assert list(sampler) == list(sampler)


@pytest.mark.parametrize("group_by", ["modality_length", "modality_length_auto"])
def test_global_batches_hold_one_modality(group_by):
    lengths = mixed()
    size = 8
    images = sum(length > 0 for length in lengths)
    texts = len(lengths) - images
    batches = global_batches(list(LengthGroupedSampler(lengths, 4, 2, group_by)), size)
    pure = images // size + texts // size
    signs = [{lengths[index] > 0 for index in batch} for batch in batches]
    assert all(len(kinds) == 1 for kinds in signs[:pure])
    assert {True} in signs[:pure] and {False} in signs[:pure]
    first_pure = [next(iter(kinds)) for kinds in signs[:pure]]
    assert first_pure != sorted(first_pure) and first_pure != sorted(first_pure, reverse=True)
    assert sum(len(batch) for batch in batches[pure:]) == images % size + texts % size


def test_ranks_get_about_the_same_length():
    lengths = [abs(length) for length in mixed(400)]

    def gap(order):
        sums = [
            [sum(lengths[index] for index in batch[at : at + 8]) for at in range(0, 32, 8)]
            for batch in global_batches(order, 32)
            if len(batch) == 32
        ]
        return sum(max(ranks) - min(ranks) for ranks in sums)

    grouped = gap(list(LengthGroupedSampler(lengths, 8, 4, "modality_length")))
    assert grouped < 0.3 * gap(list(LengthGroupedSampler(lengths, 8, 4, None)))


@pytest.mark.parametrize("group_by", ["modality_length_auto", "varlen", "length"])
def test_batches_hold_similar_lengths(group_by):
    lengths = [abs(length) for length in mixed(400)]

    def spread(order):
        return sum(
            max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in global_batches(order, 8)
        )

    grouped = spread(list(LengthGroupedSampler(lengths, 8, 1, group_by)))
    assert grouped < 0.6 * spread(list(LengthGroupedSampler(lengths, 8, 1, None)))


def test_length_begins_with_the_longest():
    lengths = [abs(length) for length in mixed(400)]
    assert lengths[next(iter(LengthGroupedSampler(lengths, 8, 1, "length")))] == max(lengths)


def test_faults():
    with pytest.raises(LlavaError, match="group_by: found 'size'"):
        LengthGroupedSampler([1], 1, 1, "size")
    with pytest.raises(LlavaError, match="record 1: found a conversation of length 0"):
        LengthGroupedSampler([1, 0], 1, 1, "modality_length")
