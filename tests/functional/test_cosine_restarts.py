"""Snapshot ensembles' learning rate, against the paper's formula where it divides evenly."""

import math

import pytest

from lightning_tricks.functional import cosine_restarts, cycle_ends


@pytest.mark.parametrize(("steps", "cycles"), [(12, 3), (10, 1), (8, 8), (300, 6)])
def test_is_the_papers_formula(steps, cycles):
    length = math.ceil(steps / cycles)
    for t in range(1, steps + 1):
        expected = 0.5 * (math.cos(math.pi * ((t - 1) % length) / length) + 1)
        assert cosine_restarts(t - 1, steps, cycles) == pytest.approx(expected, abs=1e-15)


def test_every_cycle_is_complete_where_it_does_not_divide():
    assert cycle_ends(11, 3) == [3, 7, 11]
    starts = [step for step in range(11) if cosine_restarts(step, 11, 3) == 1.0]
    assert starts == [0, 3, 7]


def test_the_floor():
    shares = [cosine_restarts(step, 100, 1, floor=0.25) for step in range(101)]
    assert shares[0] == 1.0
    assert shares == sorted(shares, reverse=True)
    assert 0.25 < shares[99] < 0.26
    assert shares[100] == 0.25
