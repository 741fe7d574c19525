"""Averages of weights over time: their arithmetic, and the memory that it takes."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_tricks.functional import averaging
from lightning_tricks.functional.averaging import ema_decay, lerp_


class Casts(TorchDispatchMode):
    """The most elements that are alive at once in casts."""

    def __init__(self):
        super().__init__()
        self.now = self.most = self.lerps = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.now += result.numel()
            self.most = max(self.most, self.now)
            weakref.finalize(result, self.gone, result.numel())
        self.lerps += "lerp" in str(func)
        return result

    def gone(self, count):
        self.now -= count


def some(dtype, sizes=(700, 300, 600, 2500, 0, 1)):
    generator = torch.Generator().manual_seed(len(sizes))
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_each_average_moves_by_its_weight(dtype, monkeypatch):
    monkeypatch.setattr(averaging, "_CAST", 1000)
    averages, values = some(torch.float32), some(dtype, (700, 300, 600, 2500, 0, 1)[::-1])[::-1]
    before = [average.double() for average in averages]
    lerp_(averages, values, 0.3)
    for old, new, value in zip(before, averages, values, strict=True):
        torch.testing.assert_close(new.double(), old + 0.3 * (value.double() - old), rtol=1e-6, atol=1e-6)


def test_low_precision_is_cast_a_few_tensors_at_a_time(monkeypatch):
    monkeypatch.setattr(averaging, "_CAST", 1000)
    averages, values = some(torch.float32), some(torch.bfloat16)
    with Casts() as casts:
        lerp_(averages, values, 0.3)
    assert (casts.most, casts.now) == (2500, 0)  # the largest tensor: 700 + 300, 600, 2500, 0 + 1
    assert casts.lerps == 4
    averages, values = some(torch.float32, [400] * 100), some(torch.bfloat16, [400] * 100)
    with Casts() as casts:
        lerp_(averages, values, 0.3)
    assert casts.most == 800


def test_fp32_is_one_call_without_a_copy(monkeypatch):
    monkeypatch.setattr(averaging, "_CAST", 1000)
    with Casts() as casts:
        lerp_(some(torch.float32), some(torch.float32), 0.3)
    assert (casts.most, casts.lerps) == (0, 1)
    lerp_([], [], 0.3)


@pytest.mark.parametrize("gamma", [1.0, 9.0, 25.0])
def test_the_warm_up_is_timms_of_power_1(gamma):
    """timm: decay = min(decay, 1 - (1 + step / gamma) ** -power), where the first update is step 1."""
    for update in range(1, 400):
        step = update + 1
        expected = min(0.99, 1 - (1 + step / gamma) ** -1.0)
        assert ema_decay(update, 0.99, warmup=1 + gamma) == pytest.approx(expected, abs=1e-12)
