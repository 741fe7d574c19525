"""Learning-rate schedules against torch's own."""

import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from lightning_tricks.functional import (
    cosine_decay,
    inverse_square_root,
    linear_decay,
    linear_warmup,
    stable_decay,
)


def torchs(make, steps):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule, found = make(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("start", [0.1, 0.5])
def test_linear_warmup(start):
    expected = torchs(lambda optimizer: LinearLR(optimizer, start, total_iters=7), 10)
    assert [linear_warmup(step, 7, start) for step in range(10)] == pytest.approx(expected)
    assert linear_warmup(0, 0, start) == 1


@pytest.mark.parametrize("end", [0.0, 0.3])
def test_linear_decay(end):
    expected = torchs(lambda optimizer: LinearLR(optimizer, 1.0, end, total_iters=7), 10)
    assert [linear_decay(step, 7, end) for step in range(10)] == pytest.approx(expected)


@pytest.mark.parametrize("end", [0.0, 0.3])
def test_cosine_decay(end):
    expected = torchs(lambda optimizer: CosineAnnealingLR(optimizer, 7, eta_min=end), 8)
    assert [cosine_decay(step, 7, end) for step in range(8)] == pytest.approx(expected)
    assert cosine_decay(20, 7, end) == pytest.approx(end)


def test_inverse_square_root_is_that_of_the_transformer():
    """lrate = d**-0.5 * min(step**-0.5, step * warmup**-1.5): its part after the warm-up, over its highest."""
    warmup = 40
    expected = [step**-0.5 / warmup**-0.5 for step in range(warmup, warmup + 20)]
    assert [inverse_square_root(step, warmup) for step in range(20)] == pytest.approx(expected)


def test_stable_decay():
    found = [stable_decay(step, 10, 4, 0.2) for step in range(12)]
    assert found == pytest.approx([1] * 7 + [0.8, 0.6, 0.4, 0.2, 0.2])
    assert stable_decay(0, 1, 1, 0.0) == 1
    assert not math.isnan(stable_decay(5, 1, 1, 0.0))
