"""robust_zscore against scipy's median absolute deviation."""

import numpy as np
import pytest
import torch

from lightning_tricks.functional import robust_zscore


@pytest.mark.parametrize("size", [1, 8, 9, 100])
def test_equals_scipys(size):
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(size).standard_cauchy(size)
    deviation = stats.median_abs_deviation(values, scale="normal")
    wanted = (7.0 - np.median(values)) / deviation if deviation else 0.0
    found = robust_zscore(torch.from_numpy(values), torch.tensor(7.0, dtype=torch.float64))
    assert float(found) == pytest.approx(wanted, rel=1e-4)


def test_nothing_can_be_said_of_what_never_varies():
    assert robust_zscore(torch.ones(9), torch.tensor(5.0)) == 0
