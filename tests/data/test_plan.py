"""Plan: what is looked up for many steps at a time is what is looked up step by step."""

import numpy as np
import pytest

from lightning_tricks.data import LengthBucketSampler, _plan
from lightning_tricks.data._order import PlainOrder

LENGTHS = np.random.default_rng(0).integers(1, 60, 700)
ORDERS = {
    "plain": PlainOrder(703, batch_size=5, shuffle=True, seed=1),
    "in order": PlainOrder(700, batch_size=7, shuffle=False, seed=0),
    "dropped": PlainOrder(703, batch_size=5, shuffle=True, seed=1, drop_last=True),
    "fixed": LengthBucketSampler(LENGTHS, batch_size=6, window=4),
    "budget": LengthBucketSampler(LENGTHS, max_tokens=200, window=4),
}


@pytest.mark.parametrize("block", [1, 40, 1 << 14])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("name", ORDERS)
def test_batches_are_the_parts(name, world, block, monkeypatch):
    monkeypatch.setattr(_plan, "BLOCK", block)
    order = ORDERS[name]
    plan = order.plan(world, order.limit)
    for rank in range(world):
        for step in (0, 1, len(plan) - 1, len(plan)):
            expected = [plan.part(at, rank, world).tolist() for at in range(step, len(plan))]
            assert list(plan.batches(rank, world, step)) == expected
