"""The sketch against numpy's quantiles of all values."""

import io

import numpy as np
import pytest
import torch

from lightning_tricks.functional import QuantileSketch

SHARES = [0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0]
GENERATOR = torch.Generator().manual_seed(0)
STREAMS = {
    "log-normal": torch.randn(1_000_000, generator=GENERATOR).exp(),
    "rising": torch.arange(1_000_000.0),
    "falling": torch.arange(1_000_000.0).flip(0),
    "a trend with a narrow spread": 1 + 1e-4 * torch.rand(1_000_000, generator=GENERATOR),
    "back and forth": torch.arange(1_000_000.0).view(1000, 1000).T.flatten(),
}


def sketch_of(values, step=700):
    sketch = QuantileSketch()
    for part in values.split(step):
        sketch.add(part)
    return sketch


def rank_errors(sketch, values):
    """How far, as shares of the stream, the sketch's quantiles lie from where they should."""
    ordered = np.sort(values.numpy())
    found = sketch.quantiles(SHARES).numpy()
    low, high = (np.searchsorted(ordered, found, side=side) / len(ordered) for side in ("left", "right"))
    wanted = np.array(SHARES)
    return np.maximum(0, np.maximum(low - wanted, wanted - high))


@pytest.mark.parametrize("name", STREAMS)
def test_a_million_values(name):
    sketch = sketch_of(STREAMS[name])
    assert sketch.count == 1_000_000
    assert rank_errors(sketch, STREAMS[name]).max() < 0.01
    buffer = io.BytesIO()
    torch.save(sketch.state_dict(), buffer)
    assert buffer.tell() <= 64 * 1024


def test_few_values_are_exact():
    values = torch.randn(1001, generator=GENERATOR)
    expected = np.quantile(values.numpy(), SHARES, method="higher")
    assert np.array_equal(sketch_of(values, 10).quantiles(SHARES).numpy(), expected)


def test_merged_as_one():
    values = STREAMS["log-normal"]
    first, second = sketch_of(values[:300_000]), sketch_of(values[300_000:])
    first.merge(second)
    assert first.count == 1_000_000
    assert rank_errors(first, values).max() < 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_times_in_seconds_stay_apart(dtype):
    """fp32 knows only every 128th of them."""
    values = 1_700_000_000 + torch.randint(0, 3600, (5000,), generator=GENERATOR)
    parts = [sketch_of(part.to(dtype)) for part in values.split(2500)]
    parts[0].merge(parts[1])
    assert rank_errors(parts[0], values).max() < 0.01
    assert len(parts[0].quantiles(np.linspace(0, 1, 200).tolist()).unique()) > 150


def test_resumed_bit_for_bit():
    values = STREAMS["log-normal"][:20_000]
    whole, resumed = sketch_of(values), QuantileSketch()
    resumed.load_state_dict(sketch_of(values[:7_000]).state_dict())
    for part in values[7_000:].split(700):
        resumed.add(part)
    one, other = whole.state_dict(), resumed.state_dict()
    assert (one["count"], one["turns"]) == (other["count"], other["turns"])
    assert all(map(torch.equal, one["levels"], other["levels"]))


def test_an_empty_one_knows_nothing():
    assert QuantileSketch().quantiles([0.5]).isnan().all()
