"""Packing by histogram gives the bins of plain best-fit-decreasing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tricks.functional.packing import pack_best_fit


def best_fit_decreasing(lengths, capacity):
    """As the textbook has it: one at a time."""
    left = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, space in enumerate(left) if space >= length]
        if fitting:
            left[min(fitting, key=lambda index: left[index])] -= length
        else:
            left.append(capacity - length)
    return sorted(left)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 32), min_size=1, max_size=120), st.integers(32, 80))
def test_as_the_textbook(lengths, capacity):
    bins, count = pack_best_fit(np.array(lengths), capacity)
    loads = np.bincount(bins, weights=lengths, minlength=count)
    assert sorted(capacity - loads) == best_fit_decreasing(lengths, capacity)
    assert len(loads) == count == len(set(bins.tolist()))


@pytest.mark.parametrize("capacity", [2048, 1 << 17])
def test_many(capacity):
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1, 20_000), 1, 2048).astype(int)
    bins, count = pack_best_fit(lengths, capacity)
    loads = np.bincount(bins, weights=lengths)
    assert loads.max() <= capacity
    assert count <= 1.01 * lengths.sum() / capacity + 1
