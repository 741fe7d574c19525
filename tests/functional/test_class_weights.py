"""Class weights against scikit-learn and the papers' formulas."""

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional import (
    balanced_weights,
    checked_weights,
    effective_number_weights,
    inverse_square_root_weights,
)


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


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999])
def test_effective_numbers_are_the_papers(beta):
    counts = np.array([7403, 5405, 1097], dtype=np.float64)
    # (1 - beta) / (1 - beta^n) as the sum of a geometric series, not as the code writes it
    series = np.array([sum(beta**power for power in range(int(count))) for count in counts])
    expected = 1 / series / (1 / series).sum() * 3
    np.testing.assert_allclose(effective_number_weights(counts, beta).numpy(), expected, rtol=1e-5)


def test_effective_numbers_go_from_equal_weights_to_balanced_ones():
    counts = [500, 50, 5]
    torch.testing.assert_close(effective_number_weights(counts, 0.0), torch.ones(3))
    balanced = balanced_weights(counts)
    torch.testing.assert_close(
        effective_number_weights(counts, 1 - 1e-9), balanced * 3 / balanced.sum(), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("beta", [-0.1, 1.0, float("nan")])
def test_other_betas_are_refused(beta):
    with pytest.raises(MisconfigurationError, match=r"`beta` must be 0 or more and below 1, got"):
        effective_number_weights([1, 2], beta)


def test_inverse_square_roots():
    weights = inverse_square_root_weights([7403, 5405, 1097])
    np.testing.assert_allclose((weights[2] / weights[0]).item(), (7403 / 1097) ** 0.5, rtol=1e-6)
    assert weights.sum() == pytest.approx(3)


@pytest.mark.parametrize("rule", [lambda counts: effective_number_weights(counts, 0.99), inverse_square_root_weights])
def test_an_absent_class_gets_the_largest_weight_by_every_rule(rule):
    weights = rule([60, 0, 30, 10])
    assert weights.isfinite().all()
    assert weights[1] == weights[3] == weights.max()


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1, 2], "one for each of the 3 classes"),
        ([1, 2, 0], "finite and above 0"),
        ([1, 2, float("nan")], "finite and above 0"),
        ([1, 2, -1], "finite and above 0"),
        ("heavy", "must be numbers"),
    ],
)
def test_other_weights_are_refused(weights, words):
    with pytest.raises(MisconfigurationError, match=rf"`weights` must .*{words}|`weights` {words}"):
        checked_weights(weights, 3)
