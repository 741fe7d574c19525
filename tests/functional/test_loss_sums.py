"""What losses are divided by, against plain loops over sequences."""

import math

import pytest
import torch

from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional import per_maximum_length, per_sequence, per_token

LENGTHS = (5, 0, 1, 3)


@pytest.fixture
def batch():
    losses = torch.rand(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    return losses, mask


def sequences(losses):
    return [row[:length].tolist() for row, length in zip(losses, LENGTHS, strict=True) if length]


def test_per_token(batch):
    total, count = per_token(*batch)
    assert count == 9
    assert float(total) == pytest.approx(sum(map(sum, sequences(batch[0]))))


def test_per_sequence(batch):
    total, count = per_sequence(*batch)
    assert count == 3
    assert float(total) == pytest.approx(sum(sum(row) / len(row) for row in sequences(batch[0])))


def test_per_maximum_length(batch):
    total, count = per_maximum_length(*batch, 8)
    assert count == 3
    assert float(total) == pytest.approx(sum(map(sum, sequences(batch[0]))) / 8)


@pytest.mark.parametrize("mode", [per_token, per_sequence, lambda *both: per_maximum_length(*both, 8)])
def test_what_is_masked_may_be_anything_and_gets_no_gradient(batch, mode):
    losses, mask = batch[0].float().requires_grad_(), batch[1]
    with torch.no_grad():
        losses[~mask] = math.nan
    total, _ = mode(losses, mask)
    total.backward()
    assert total.isfinite()
    assert (losses.grad[~mask] == 0).all()
    assert (losses.grad[mask] > 0).all()


@pytest.mark.parametrize("mode", [per_token, per_sequence, lambda *both: per_maximum_length(*both, 8)])
def test_nothing_is_a_sum_of_zero_over_zero(mode):
    total, count = mode(torch.rand(2, 3, dtype=torch.bfloat16), torch.zeros(2, 3))
    assert (float(total), int(count), total.dtype) == (0, 0, torch.float32)


@pytest.mark.parametrize("shape", [(4, 5, 1), (5, 4), (20,)])
def test_shapes_that_differ_are_refused(shape):
    with pytest.raises(MisconfigurationError, match=r"same shape \(sequences, tokens\), got \(4, 5\)"):
        per_token(torch.rand(4, 5), torch.ones(shape))


@pytest.mark.parametrize("length", [0, -1, 2.5, True, "8"])
def test_a_length_that_is_none_is_refused(length):
    with pytest.raises(MisconfigurationError, match="`length` must be a whole number of tokens above 0, got"):
        per_maximum_length(torch.rand(2, 3), torch.ones(2, 3), length)
