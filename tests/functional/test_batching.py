"""Shuffling, sorting in windows and splitting, against plain Python."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tricks.functional import batching
from lightning_tricks.functional.batching import (
    deal_to_windows,
    shuffle_to_windows,
    shuffled,
    shuffled_indices,
    split_steps,
)

LENGTHS = st.lists(st.integers(0, 9) | st.integers(0, 2**31 - 1), min_size=1, max_size=150)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 200), st.integers(1, 64), st.sampled_from([np.uint32, np.int64]))
def test_windows_are_sorted_and_ties_stay(lengths, window, together, kind):
    order = shuffled_indices(len(lengths), (3,)).astype(kind)
    expected = []
    for start in range(0, len(order), window):
        expected += sorted(order[start : start + window].tolist(), key=lambda index: -lengths[index])
    part, batching.PART = batching.PART, together
    try:
        found, falling = deal_to_windows(order, np.array(lengths, np.int32), window)
    finally:
        batching.PART = part
    assert found.tolist() == expected
    assert falling.tolist() == [lengths[index] for index in expected]
    assert found.dtype == kind


def test_of_nothing_comes_nothing():
    found, falling = deal_to_windows(np.zeros(0, np.uint32), np.array([1]), 5)
    assert len(found) == len(falling) == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), max_size=300), st.integers(0, 99))
def test_values_are_shuffled_as_their_places_are(values, seed):
    values = np.array(values, np.uint32)
    found = shuffled(values, (seed, 1))
    assert found.tolist() == values[shuffled_indices(len(values), (seed, 1))].tolist()


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 200), st.sampled_from([1, 7, 1 << 16]), st.booleans(), st.booleans())
def test_shuffled_windows_are_those_of_a_shuffle(lengths, window, together, plain, looked_up):
    """Whether lengths travel with the values, or are looked up."""
    lengths = np.array(lengths, np.int32)
    values = range(len(lengths)) if plain else np.arange(len(lengths), dtype=np.uint32)[::-1] * 3
    turn = shuffled_indices(len(lengths), (5, 2))
    order, expected = deal_to_windows(turn, lengths, window)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "PART", together)
        patch.setattr(batching, "RANDOM", 64 if looked_up else 0)
        found, falling = shuffle_to_windows(values, lengths, (5, 2), window)
    assert found.dtype == np.uint32
    assert sorted(found.tolist()) == sorted(values)
    if looked_up or int(lengths.max()) < 1 << 16:  # else so few bits are left to shuffle by that values share them
        assert falling.tolist() == expected.tolist()
        assert found.tolist() == np.asarray(values)[order].tolist()


def test_a_shuffle_takes_more_than_a_part():
    count = 2 * batching.PART + 7
    found = shuffled_indices(count, (0,))
    assert np.array_equal(np.sort(found), np.arange(count))
    assert abs(np.corrcoef(found, np.arange(count))[0, 1]) < 0.02


def test_the_steps_that_gain_most_are_split_first():
    sizes, gains = np.array([2, 6, 8, 1]), np.array([9, 0, 5, 50])
    assert split_steps(sizes, 4, 1, gains).tolist() == [2, 6, 8, 1]
    assert split_steps(sizes, 5, 1, gains).tolist() == [1, 1, 6, 8, 1]  # a single sample cannot be split
    assert split_steps(sizes, 6, 1, gains).tolist() == [1, 1, 6, 4, 4, 1]
    assert split_steps(sizes, 7, 1, gains).tolist() == [1, 1, 3, 3, 4, 4, 1]  # then those of most samples
