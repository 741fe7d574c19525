"""Percentiles against numpy, z-scores against the paper's formulae in plain Python, and norms that are not finite."""

import math
import statistics

import numpy as np
import pytest
import torch

from lightning_tricks.functional import NormMoments, percentile, remember_norm, zscore_limit

CPU = torch.device("cpu")


def norms(count, seed=0):
    """Log-normal norms, with a spike of 50 to 1000 times now and then."""
    generator = np.random.default_rng(seed)
    usual = generator.lognormal(0.0, 0.5, count)
    return np.where(generator.random(count) < 0.05, usual * generator.uniform(50, 1000, count), usual)


@pytest.mark.parametrize("q", [0.5, 10, 50, 95, 99.9])
@pytest.mark.parametrize("count", [1, 2, 21, 1000])
def test_percentile_equals_numpy(q, count):
    values = norms(count).astype(np.float32)
    padded = torch.cat([torch.full((7,), math.nan), torch.from_numpy(values)])
    assert percentile(padded, q).item() == pytest.approx(np.percentile(values.astype(np.float64), q), rel=1e-6)


def test_a_value_at_the_percentile_is_given_as_it_is():
    values = torch.cat([torch.arange(1.0, 21.0), torch.tensor([1e30])])
    assert percentile(values, 95) == 20.0  # the 20th of 21: nothing of the outlier leaks in


def test_percentile_of_nothing():
    assert percentile(torch.full((4,), math.nan), 95).isnan()


def test_the_window_keeps_the_last_norms_in_order():
    window = torch.full((3,), math.nan)
    for norm in (1.0, 2.0, 3.0, 4.0):
        window = remember_norm(window, torch.tensor(norm))
    assert window.tolist() == [2.0, 3.0, 4.0]


@pytest.mark.parametrize("norm", [math.nan, math.inf, 0.0])
def test_what_is_no_norm_is_not_remembered(norm):
    window = torch.tensor([1.0, 2.0])
    assert torch.equal(remember_norm(window, torch.tensor(norm)), window)


def zclip(values, threshold, decay, warmup):
    """The paper's algorithm in float64: limits from the first step after the warm-up on."""
    mean, variance = statistics.fmean(values[:warmup]), statistics.pvariance(values[:warmup])
    for value in values[warmup:]:
        z = (value - mean) / math.sqrt(variance)
        allowed = mean + threshold**2 / z * math.sqrt(variance) if z > threshold else value
        yield allowed
        mean = decay * mean + (1 - decay) * allowed
        variance = decay * variance + (1 - decay) * (allowed - mean) ** 2


@pytest.mark.parametrize(("threshold", "decay", "warmup"), [(2.5, 0.97, 25), (1.0, 0.5, 2), (3.0, 0.999, 100)])
def test_zscore_equals_the_paper(threshold, decay, warmup):
    values = norms(300, seed=1)
    options = {"threshold": threshold, "decay": decay, "warmup": warmup}
    moments, allowed = NormMoments.empty(CPU), []
    for value in torch.from_numpy(values):
        limit, moments = zscore_limit(moments, value, **options)
        allowed.append(min(value.item(), limit.item()))
    assert allowed[:warmup] == values[:warmup].tolist()
    wanted = list(zclip(values.tolist(), **options))
    assert allowed[warmup:] == pytest.approx(wanted, rel=1e-9)
    assert sum(a < v for a, v in zip(wanted, values[warmup:], strict=True)) > 5, "nothing was clipped"


def settled():
    moments = NormMoments.empty(CPU)
    for value in (0.8, 1.0, 1.2):
        _, moments = zscore_limit(moments, torch.tensor(value), threshold=2.5, decay=0.97, warmup=3)
    return moments


@pytest.mark.parametrize("norm", [math.nan, math.inf, 0.0])
def test_what_is_no_norm_changes_no_moments(norm):
    before = settled()
    limit, after = zscore_limit(before, torch.tensor(norm), threshold=2.5, decay=0.97, warmup=3)
    assert before == after
    assert 1.0 < limit < 2.0


def test_the_largest_norms_do_not_overflow():
    moments = NormMoments.empty(CPU)
    for value in (1e37, 3e38, 1e38, 2e38):
        limit, moments = zscore_limit(moments, torch.tensor(value), threshold=1.0, decay=0.9, warmup=3)
    assert all(value.isfinite() for value in (limit, *moments))


def test_norms_that_are_all_equal():
    moments = NormMoments.empty(CPU)
    for value in (1.0, 1.0, 1.0, 1.0, 1000.0):
        limit, moments = zscore_limit(moments, torch.tensor(value), threshold=2.5, decay=0.97, warmup=3)
    assert limit == 1.0
    assert moments.variance == 0.0
