"""Rounding to eight and four bits: the definitions, and the errors that are known of them."""

import pytest
import torch

from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional import (
    dequantize_int4,
    dequantize_int8,
    quantize_int4,
    quantize_int8,
    quantize_nf4,
)

# As published with QLoRA (bitsandbytes' table).
PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def relative_rms(found, values):
    return float((found - values).norm() / values.norm())


def test_int8_uses_minus_127_to_127_and_errs_by_half_a_step():
    values = torch.randn(40, 100, generator=torch.Generator().manual_seed(0))
    codes, scales = quantize_int8(values)
    assert codes.abs().amax(1).tolist() == [127] * 40
    assert ((dequantize_int8(codes, scales) - values).abs() <= scales / 2 * 1.0001).all()


def test_int4_is_evenly_spaced_and_046_stands_for_042():
    codes, scales = quantize_int4(torch.tensor([0.42, 1.0, -1.0]))
    found = dequantize_int4(codes, scales)[0]
    assert f"{float(found):.4f}" == "0.4667"
    assert abs(float(found) - 0.42) == pytest.approx(0.0467, abs=1e-4)
    levels = dequantize_int4(torch.arange(16), torch.ones(1))
    torch.testing.assert_close(levels.diff(), torch.full((15,), 2 / 15))


def test_nf4s_levels_are_the_published_ones():
    values = torch.tensor(PUBLISHED).repeat(4)
    torch.testing.assert_close(quantize_nf4(values, double=False).dequantize(), values, rtol=0, atol=1e-6)


def test_each_value_gets_the_nearest_level():
    values = torch.linspace(-1, 1, 1001)
    levels = torch.tensor(PUBLISHED)
    nearest = levels[(values[:, None] - levels).abs().argmin(1)]
    torch.testing.assert_close(quantize_nf4(values, block=2000, double=False).dequantize(), nearest, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("double", "bits"), [(False, 4.5), (True, 4.127)])
def test_bits_and_errors_of_normal_weights(double, bits):
    values = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)) / 20
    rounded = quantize_nf4(values, double=double)
    assert rounded.bits == pytest.approx(bits, abs=2e-3)
    assert relative_rms(rounded.dequantize(), values) == pytest.approx(0.0915, abs=0.003)
    even = dequantize_int4(*quantize_int4(values.view(-1, 64))).view(512, 512)
    assert relative_rms(rounded.dequantize(), values) < relative_rms(even, values)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 130)])
@pytest.mark.parametrize("double", [False, True])
def test_any_shape_and_precision_comes_back(shape, double):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = quantize_nf4(values.bfloat16(), double=double).dequantize(torch.bfloat16)
    assert found.shape == values.shape
    assert found.dtype == torch.bfloat16
    if double is False:
        assert (found.float() - values).abs().max() <= 0.2 * values.abs().max()


def test_zeros_stay_zeros():
    zeros = torch.zeros(2, 64)
    assert not dequantize_int8(*quantize_int8(zeros)).any()
    assert not quantize_nf4(zeros).dequantize().any()


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_int4, quantize_nf4])
def test_what_cannot_be_rounded_is_refused(quantize):
    for value in (float("nan"), float("inf")):
        with pytest.raises(MisconfigurationError, match="NaN or infinite"):
            quantize(torch.tensor([1.0, value]))
    with pytest.raises(MisconfigurationError, match="nothing to round"):
        quantize(torch.empty(0, 3))


@pytest.mark.parametrize("block", [0, 1, 7])
def test_blocks_are_even(block):
    with pytest.raises(MisconfigurationError, match="`block` must be even"):
        quantize_nf4(torch.ones(8), block=block)
