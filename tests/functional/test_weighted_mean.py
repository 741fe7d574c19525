"""The weighted mean, against NumPy in double precision."""

import numpy as np
import pytest
import torch

from lightning_tricks.functional import weighted_mean


def some(count, dtype, seed=0):
    return list(torch.randn(count, 5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [[1.0] * 4, [0.5, 0.0, 3.0, 1.0]])
def test_is_the_weighted_mean_rounded_once(dtype, weights):
    tensors = some(4, dtype)
    expected = np.average(np.stack([tensor.double().numpy() for tensor in tensors]), axis=0, weights=weights)
    mean = weighted_mean(iter(tensors), weights)
    assert mean.dtype == dtype
    # Half precision: the true mean rounded; fp32: its own rounding of four additions.
    rounding = 0 if dtype in (torch.bfloat16, torch.float16) else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(mean, torch.from_numpy(expected).to(dtype), rtol=rounding, atol=rounding)


def test_the_tensors_are_left_alone():
    tensors = some(3, torch.float32)
    before = [tensor.clone() for tensor in tensors]
    weighted_mean(tensors, [1, 2, 3])
    assert all(map(torch.equal, tensors, before))


def test_many_are_summed_in_double():
    tiny = [torch.tensor([1.0]), *[torch.tensor([2.0**-25])] * 255]
    assert weighted_mean(tiny, [1.0] * 256).item() == torch.tensor((1 + 255 * 2.0**-25) / 256).item()
    assert weighted_mean(tiny[:64], [1.0] * 64).item() == 1 / 64  # what single precision makes of it


def test_half_precision_does_not_overflow():
    assert weighted_mean([torch.tensor([60000.0], dtype=torch.float16)] * 4, [1.0] * 4).item() == 60000


def test_one_at_a_time():
    alive = []

    def tensors():
        for place in range(3):
            alive.append(place)
            yield torch.ones(1)

    weighted_mean(tensors(), [1, 1, 1])
    assert alive == [0, 1, 2]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_as_many_weights_as_tensors(count):
    with pytest.raises(ValueError, match=r"zip\(\)"):
        weighted_mean(some(2, torch.float32), [1.0] * count)


def test_nothing_has_no_mean():
    with pytest.raises(ValueError, match="nothing"):
        weighted_mean([], [])
