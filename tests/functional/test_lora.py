"""The low-rank update against the product of the paper, written out."""

import pytest
import torch

from lightning_tricks.functional import low_rank_update


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (0, 5)])
def test_equals_the_product_with_the_full_matrix(shape):
    x, down, up = torch.randn(shape), torch.randn(2, 5), torch.randn(2, 7)
    full = 1.5 * up.t() @ down
    torch.testing.assert_close(low_rank_update(x, down, up, 1.5), x @ full.t())


def test_gradients_equal_those_of_the_full_product():
    factors = [torch.randn(2, 5, requires_grad=True), torch.randn(2, 7, requires_grad=True)]
    x, weights = torch.randn(6, 5), torch.randn(6, 7)
    ours = torch.autograd.grad((low_rank_update(x, *factors, 0.5) * weights).sum(), factors)
    plain = torch.autograd.grad((x @ (0.5 * factors[1].t() @ factors[0]).t() * weights).sum(), factors)
    torch.testing.assert_close(ours, plain)


def test_casts_the_adapter_to_the_inputs():
    down, up = torch.randn(2, 5, requires_grad=True), torch.randn(2, 7, requires_grad=True)
    out = low_rank_update(torch.randn(3, 5, dtype=torch.bfloat16), down, up, 2.0)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert down.grad.dtype == up.grad.dtype == torch.float32


def test_autocast_computes_at_its_precision():
    with torch.autocast("cpu", torch.bfloat16):
        assert low_rank_update(torch.randn(3, 5), torch.randn(2, 5), torch.randn(2, 7), 2.0).dtype == torch.bfloat16
