"""Class weights against scikit-learn, the weighted loss against torch."""

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F

from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional import balanced_weights, weighted_cross_entropy_sums


@pytest.mark.parametrize("counts", [[7403, 5405, 1097], [1, 1], [3, 1_000_000_007], [5, 4, 3, 2, 1]])
def test_weights_are_those_of_scikit_learn(counts):
    small = [min(count, 10_000) for count in counts]
    labels = np.repeat(np.arange(len(small)), small)
    expected = compute_class_weight("balanced", classes=np.arange(len(small)), y=labels)
    np.testing.assert_allclose(balanced_weights(small).numpy(), expected, rtol=1e-6)


def test_weights_are_fp32_from_any_kind_of_counts():
    expected = balanced_weights([3, 1])
    for counts in ((3, 1), torch.tensor([3, 1]), torch.tensor([3.0, 1.0], dtype=torch.float64)):
        torch.testing.assert_close(balanced_weights(counts), expected, rtol=0, atol=0)
    assert expected.dtype == torch.float32


def test_an_absent_class_gets_the_largest_weight_of_the_others():
    weights = balanced_weights([60, 0, 30, 10])
    assert torch.isfinite(weights).all()
    assert weights[1] == weights[3] == weights.max()


@pytest.mark.parametrize(
    "counts",
    [
        [],
        [5],
        [[1, 2], [3, 4]],
        [1, -1],
        [1.5, 2],
        [float("nan"), 1],
        [float("inf"), 1],
        [0, 0],
        None,
        {"a": 1},
        ["5", "6"],
    ],
)
def test_other_counts_are_refused(counts):
    with pytest.raises(MisconfigurationError, match="`counts`"):
        balanced_weights(counts)


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
