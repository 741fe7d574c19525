"""Rows shared out to ranks by cost, against every way to share them out."""

from itertools import combinations, pairwise

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_tricks.data._stream_cuts import always_enough, batches_of, cut_ranks

BUDGET = 12


def batches(lengths):
    found, left = 0, sorted(lengths, reverse=True)
    while left:
        found, left = found + 1, left[BUDGET // left[0] :]
    return found


def will_do(lengths, cuts, steps):
    return all(b - a >= steps >= batches(lengths[a:b]) for a, b in pairwise(cuts))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=10), st.integers(2, 4), st.integers(1, 5))
def test_parts_are_found_whenever_there_are_some(lengths, world, steps):
    assume(len(lengths) >= world)
    ways = [[0, *cuts, len(lengths)] for cuts in combinations(range(1, len(lengths)), world - 1)]
    found = cut_ranks(np.array(lengths), world, BUDGET, steps)
    if found is None:
        assert not any(will_do(lengths, cuts, steps) for cuts in ways)
    else:
        assert will_do(lengths, found.tolist(), steps)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=4, max_size=60), st.integers(1, 4), st.randoms(use_true_random=False))
def test_what_is_always_enough_is_enough_in_any_order(lengths, world, random):
    assert batches_of(np.array(lengths), BUDGET) == batches(lengths)
    steps = always_enough(np.array(lengths), BUDGET, world)
    alone = sum(length > BUDGET // 2 for length in lengths)
    if steps is None:  # nearly all fill a batch alone, and cannot be dealt out without rest
        assert len(lengths) % world
        assert alone >= len(lengths) // world
        return
    assert steps <= len(lengths) // world
    for _ in range(5):
        random.shuffle(lengths)
        assert will_do(lengths, cut_ranks(np.array(lengths), world, BUDGET, steps).tolist(), steps)
    sorted_ones = sorted(lengths)
    assert will_do(sorted_ones, cut_ranks(np.array(sorted_ones), world, BUDGET, steps).tolist(), steps)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=4, max_size=60), st.integers(1, 4))
def test_parts_cost_the_same_where_any_number_of_steps_will_do(lengths, world):
    cuts = cut_ranks(np.array(lengths), world, BUDGET, None).tolist()
    costs = [sum(lengths[a:b]) for a, b in pairwise(cuts)]
    assert min(np.diff(cuts)) >= 1
    assert max(costs) <= sum(lengths) / world + world * max(lengths)
