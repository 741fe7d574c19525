"""Weighted losses against torch, and the papers' formulas in float64."""

import pytest
import torch
from torch.nn import functional as F

from lightning_tricks.functional import class_loss_sums, log_prior, two_class_logits, weighted_cross_entropy_sums

WEIGHTS = torch.tensor([0.5, 1.0, 4.0])


@pytest.mark.parametrize("extra", [(), (4,), (2, 3)])
@pytest.mark.parametrize("ignored", [False, True])
def test_the_quotient_is_torchs_weighted_mean(extra, ignored):
    logits, targets = torch.randn(6, 3, *extra), torch.randint(0, 3, (6, *extra))
    if ignored:
        targets[::2] = 255
    weights = torch.tensor([0.5, 1.0, 4.0])
    numerator, denominator = weighted_cross_entropy_sums(logits, targets, weights, ignore_index=255)
    expected = F.cross_entropy(logits, targets, weight=weights, ignore_index=255)
    torch.testing.assert_close(numerator / denominator, expected)


def test_sums_over_parts_give_the_mean_of_the_whole():
    logits, targets, weights = torch.randn(10, 3), torch.randint(0, 3, (10,)), torch.tensor([0.5, 1.0, 4.0])
    parts = [weighted_cross_entropy_sums(logits[i:j], targets[i:j], weights) for i, j in ((0, 1), (1, 4), (4, 10))]
    mean = sum(n for n, _ in parts) / sum(d for _, d in parts)
    torch.testing.assert_close(mean, F.cross_entropy(logits, targets, weight=weights))


@pytest.mark.parametrize("size", [0, 3])
def test_without_a_valid_target_both_are_zero_and_the_graph_stands(size):
    logits = torch.randn(size, 4, requires_grad=True)
    numerator, denominator = weighted_cross_entropy_sums(logits, torch.full((size,), -100), torch.ones(4))
    numerator.backward()
    assert numerator == denominator == 0
    torch.testing.assert_close(logits.grad, torch.zeros(size, 4))


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_logits_are_computed_in_fp32(autocast):
    logits, targets, weights = torch.randn(50, 3).bfloat16(), torch.randint(0, 3, (50,)), torch.rand(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        numerator, denominator = weighted_cross_entropy_sums(logits, targets, weights)
    expected = F.cross_entropy(logits.double(), targets, weight=weights.double(), reduction="sum")
    assert numerator.dtype == denominator.dtype == torch.float32
    torch.testing.assert_close(numerator.double(), expected, rtol=1e-5, atol=1e-5)


def batch(*extra, ignored=False):
    logits, targets = torch.randn(6, 3, *extra, dtype=torch.float64), torch.randint(0, 3, (6, *extra))
    if ignored:
        targets[::2] = -100
    return logits.requires_grad_(), targets


def mean(sums):
    numerator, denominator = sums
    return numerator / denominator


@pytest.mark.parametrize("extra", [(), (4,), (2, 3)])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_smoothing_is_torchs(extra, ignored, smoothing):
    logits, targets = batch(*extra, ignored=ignored)
    found = mean(weighted_cross_entropy_sums(logits, targets, WEIGHTS, label_smoothing=smoothing))
    expected = F.cross_entropy(logits.float(), targets, weight=WEIGHTS, label_smoothing=smoothing)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("extra", [(), (4,)])
@pytest.mark.parametrize("ignored", [False, True])
def test_focal_with_gamma_0_is_cross_entropy(extra, ignored):
    logits, targets = batch(*extra, ignored=ignored)
    found, expected = (
        class_loss_sums(logits, targets, WEIGHTS, gamma=0.0),
        weighted_cross_entropy_sums(logits, targets, WEIGHTS),
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found[0], logits), torch.autograd.grad(expected[0], logits))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("extra", [(), (4,)])
def test_focal_is_the_papers(gamma, extra):
    logits, targets = batch(*extra)
    p = logits.softmax(1).gather(1, targets.unsqueeze(1)).squeeze(1)
    weights = WEIGHTS.double()[targets]
    expected = (weights * -((1 - p) ** gamma) * p.log()).sum()
    found, denominator = class_loss_sums(logits, targets, WEIGHTS, gamma=gamma)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert denominator == pytest.approx(weights.sum().item())
    (ours,), (papers,) = torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits)
    torch.testing.assert_close(ours, papers, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_has_a_gradient_where_the_probability_is_1_or_0(gamma):
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    numerator, _ = class_loss_sums(logits, torch.tensor([0, 0]), torch.ones(2), gamma=gamma)
    numerator.backward()
    assert numerator.item() == pytest.approx(400.0)
    assert logits.grad.isfinite().all()
    assert (logits.grad[0] == 0).all()


@pytest.mark.parametrize("tau", [0.5, 1.0])
@pytest.mark.parametrize("extra", [(), (4,)])
def test_adjusted_logits_are_the_papers(tau, extra):
    """Menon et al., equation 10, in float64, by hand."""
    counts = torch.tensor([70.0, 20.0, 10.0], dtype=torch.float64)
    logits, targets = batch(*extra)
    prior = (counts / counts.sum()).view(1, 3, *(1,) * len(extra))
    powers = logits.exp() * prior**tau
    expected = -(powers / powers.sum(1, keepdim=True)).gather(1, targets.unsqueeze(1)).log().sum()
    found, _ = class_loss_sums(logits, targets, torch.ones(3), offset=tau * log_prior(counts))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_prior_of_an_absent_class_is_finite():
    assert log_prior([10, 0]).isfinite().all()
    assert log_prior([[10, 0], [5, 5]]).shape == (2, 2)


@pytest.mark.parametrize("ignored", [False, True])
def test_labels_that_hold_or_not_are_torchs_binary_cross_entropy(ignored):
    logits, targets = torch.randn(6, 4), torch.randint(0, 2, (6, 4))
    each = torch.rand(4, 2) + 0.1
    valid = torch.ones_like(targets, dtype=torch.bool)
    if ignored:
        valid[::2, 1] = False
        targets = targets.masked_fill(~valid, -100)
    numerator, denominator = class_loss_sums(two_class_logits(logits), targets, each)
    plain = targets.clamp_min(0)
    weights = torch.stack([each[label, plain[:, label]] for label in range(4)], dim=1) * valid
    expected = F.binary_cross_entropy_with_logits(logits, plain.float(), weight=weights, reduction="sum")
    torch.testing.assert_close(numerator, expected)
    torch.testing.assert_close(denominator, weights.sum())


def test_an_offset_for_each_label():
    logits, targets = torch.randn(6, 4), torch.randint(0, 2, (6, 4))
    offset = log_prior([[90, 10], [50, 50], [10, 90], [1, 99]])
    found, _ = class_loss_sums(two_class_logits(logits), targets, torch.ones(4, 2), offset=offset)
    shifted = logits + offset[:, 1] - offset[:, 0]
    torch.testing.assert_close(
        found, F.binary_cross_entropy_with_logits(shifted, targets.float(), reduction="sum"), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("size", [0, 3])
def test_without_a_valid_target_a_focal_loss_is_zero_and_the_graph_stands(size):
    logits = torch.randn(size, 4, requires_grad=True)
    numerator, denominator = class_loss_sums(logits, torch.full((size,), -100), torch.ones(4), gamma=2.0)
    numerator.backward()
    assert numerator == denominator == 0
    torch.testing.assert_close(logits.grad, torch.zeros(size, 4))
