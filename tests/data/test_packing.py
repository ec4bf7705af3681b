"""Which samples share a row: nothing lost or doubled, no row too long, every rank as many, the same rows again."""

import itertools
from types import SimpleNamespace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.data.packing import BufferPacking, StepPacking, cost, divide, first_fit_decreasing, plan
from llava.data.sampler import EpochSampler, LengthGroupedSampler

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=80)


def flat(rows):
    return list(itertools.chain.from_iterable(rows))


def slow_first_fit(tokens, pack_length):
    rows = []
    for at in sorted(range(len(tokens)), key=lambda at: (-tokens[at], at)):
        fits = (row for row in rows if sum(tokens[other] for other in row) + tokens[at] <= pack_length)
        row = next(fits, None)
        if row is None:
            rows.append([at])
        else:
            row.append(at)
    return rows


@given(LENGTHS, st.integers(60, 200))
def test_first_fit_decreasing_is_the_slow_one(lengths, pack_length):
    assert first_fit_decreasing(lengths, pack_length) == slow_first_fit(lengths, pack_length)


def test_a_sample_longer_than_a_row_has_one_to_itself():
    assert first_fit_decreasing([5, 30, 5], 10) == [[1], [0, 2]]


@given(LENGTHS, st.integers(60, 200), st.integers(1, 8), st.integers(0, 3), st.sampled_from([None, 1, 7, 1024]))
def test_plan(lengths, pack_length, world, seed, buffer):
    ranks = plan(lengths, pack_length, world=world, seed=seed, buffer=buffer)
    assert len(ranks) == world and len({len(rows) for rows in ranks}) == 1
    rows = [row for rank in ranks for row in rank]
    assert sorted(flat(rows)) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in row) <= pack_length for row in rows)
    assert ranks == plan(lengths, pack_length, world=world, seed=seed, buffer=buffer)


def test_a_buffer_of_a_mixture_fills_its_rows():
    """The kind of mixture that packing is for: text, one picture, anyres, several; rows of 8,192 tokens."""
    lengths = [[120, 650, 2400, 3000, 780, 1450][number * 7 % 6] + number % 97 for number in range(3000)]
    rows = flat(plan(lengths, 8192, world=8, seed=0, buffer=1024))
    assert sum(lengths) / (len(rows) * 8192) > 0.95


@given(LENGTHS, st.integers(1, 8))
def test_a_step_is_divided_by_cost(lengths, rows):
    costs = [length**2 for length in lengths]
    made = divide(lengths, costs, rows)
    assert len(made) == rows and sorted(flat(made)) == list(range(len(lengths)))
    assert all(row == sorted(row) for row in made)
    loads = [sum(costs[at] for at in row) for row in made]
    least = max(max(costs), sum(costs) / rows)  # no division does better
    assert max(loads) <= (4 / 3) * least + max(costs)
    if len(lengths) >= rows:
        assert all(made)


@given(LENGTHS, st.integers(1, 8), st.integers(60, 400))
def test_no_row_of_a_step_is_longer_than_pack_length(lengths, rows, pack_length):
    """Or they do not fit: then rows are as even as they can be."""
    made = divide(lengths, lengths, rows, pack_length)
    assert sorted(flat(made)) == list(range(len(lengths))) and len(made) == rows
    longest = max(sum(lengths[at] for at in row) for row in made)
    if longest > pack_length:
        assert len(slow_first_fit(lengths, pack_length)) > rows
        assert longest <= (4 / 3) * max(max(lengths), sum(lengths) / rows) + max(lengths)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(1, 8))
def test_samples_of_any_step_fit_into_as_many_times_the_longest(lengths, batch):
    """What pack_length is when it is not given: the batch size times the longest sample."""
    rows = -(-len(lengths) // batch)
    made = divide(lengths, [length**2 for length in lengths], rows, 60 * batch)
    assert max(sum(lengths[at] for at in row) for row in made) <= 60 * batch


def test_length_decides_where_cost_leaves_no_room():
    tokens, costs = [60, 50, 40, 50], [10, 4, 3, 2]
    assert divide(tokens, costs, 2) == [[0], [1, 2, 3]]
    assert divide(tokens, costs, 2, 100) == [[0, 2], [1, 3]]


@settings(max_examples=50)
@given(st.integers(1, 90), st.integers(1, 4), st.integers(1, 3), st.integers(1, 8), st.booleans())
def test_a_step_has_the_samples_that_it_has_unpacked(records, batch, accumulated, world, epochs):
    order = LengthGroupedSampler(range(records), batch, world, None, seed=1)
    sampler = EpochSampler(order) if epochs else order
    size, rows = batch * accumulated * world, accumulated * world
    tokens = [1 + number % 13 for number in range(records)]
    packing = StepPacking(sampler, tokens, tokens, samples=size, rows=rows)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        expected, batches = list(sampler), list(packing)
        assert len(batches) == len(packing) and len(batches) % rows == 0
        for step in range(0, len(batches), rows):
            at = step // rows * size
            assert sorted(flat(batches[step : step + rows])) == sorted(expected[at : at + size])
        assert sorted(flat(batches)) == sorted(expected)
        assert batches == list(packing)
    assert len(StepPacking(sampler, tokens, tokens, samples=size, rows=rows, drop_last=True)) == records // size * rows


@settings(max_examples=50)
@given(LENGTHS, st.integers(1, 8), st.integers(1, 3), st.booleans())
def test_an_epoch_from_a_buffer(lengths, world, accumulated, epochs):
    order = LengthGroupedSampler(lengths, 1, 1, None, seed=3)
    sampler = EpochSampler(order) if epochs else order
    options = {"pack_length": 60, "rows": world * accumulated, "buffer": 16, "seed": 5}
    packing, again = (BufferPacking(sampler, lengths, **options) for _ in range(2))
    seen = []
    for epoch in (0, 1, 2):
        packing.set_epoch(epoch)
        again.set_epoch(epoch)
        batches = list(packing)
        assert batches == list(again) and len(batches) == len(packing) and len(batches) % (world * accumulated) == 0
        if epochs:
            assert {item[0] for item in flat(batches)} == {epoch}
            batches = [[item[1] for item in row] for row in batches]
        assert sorted(flat(batches)) == list(range(len(lengths)))
        assert all(sum(lengths[number] for number in row) <= 60 for row in batches)
        seen.append(batches)
    if len(lengths) > 40:
        assert seen[0] != seen[1]


def test_cost():
    text = SimpleNamespace(hidden_size=8, intermediate_size=12, num_hidden_layers=3)
    by_hand = 3 * (2 * 10 * (4 * 64 + 3 * 8 * 12) + 2 * 100 * 8)
    assert cost(10, 0, text) == by_hand
    text.vision_config = {"hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 2}
    assert cost(10, 5, text) == by_hand + 2 * (2 * 5 * (4 * 16 + 2 * 4 * 6) + 4 * 25 * 4)
    assert cost(20, 0, text) > 2 * cost(10, 0, text)
    several = cost(np.array([10.0, 10.0, 99999.0]), np.array([5.0, 0.0, 0.0]), text)
    assert several.tolist() == [cost(10, 5, text), by_hand, cost(99999, 0, text)]


def test_a_step_without_room_says_so_once(capsys):
    rows = list(StepPacking(range(6), [8] * 6, [1] * 6, samples=3, rows=2, pack_length=10))
    assert [sorted(map(len, rows[at : at + 2])) for at in (0, 2)] == [[1, 2], [1, 2]]
    said = capsys.readouterr().out
    assert said.count("the 3 samples of a step have 24 tokens and do not fit into 2 rows of pack_length 10") == 1
    assert "its longest row has 16" in said
