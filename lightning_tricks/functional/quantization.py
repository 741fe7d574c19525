"""Rounding of weights to few bits: eight, four evenly spaced, four as normal numbers are spread (NF4)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_tricks.errors import MisconfigurationError

__all__ = ["NF4", "dequantize_int4", "dequantize_int8", "quantize_int4", "quantize_int8", "quantize_nf4"]

_SCALES = 256  # scales that share a scale of their own, under double quantisation
_TAIL = 0.9677083  # QLoRA's last quantile, midway between those that would give infinite levels


def quantize_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round to whole numbers from -127 to 127, scaled so that the largest magnitude of a row gets 127.

    Args:
        values: finite, of shape (..., columns).

    Returns:
        int8 of the same shape, and the scales, of shape (..., 1), in fp32: `values` is about their product.

    Example:
        >>> import torch
        >>> from lightning_tricks.functional import quantize_int8
        >>> quantize_int8(torch.tensor([[0.5, -1.0, 0.0]]))
        (tensor([[  64, -127,    0]], dtype=torch.int8), tensor([[0.0079]]))
    """
    exact = _finite(values).float()
    scales = exact.abs().amax(-1, keepdim=True) / 127
    return (exact / _not_zero(scales)).round().to(torch.int8), scales


def dequantize_int8(codes: Tensor, scales: Tensor) -> Tensor:
    """The values that `quantize_int8` stands for, in fp32.

    Example:
        >>> import torch
        >>> from lightning_tricks.functional import dequantize_int8
        >>> dequantize_int8(torch.tensor([[64, -127]], dtype=torch.int8), torch.tensor([[1 / 127]]))
        tensor([[ 0.5039, -1.0000]])
    """
    return codes.float().mul_(scales)


def quantize_int4(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round to 16 evenly spaced levels from -1 to 1, scaled by the largest magnitude of each row.

    There is no level for zero: those next to it are -1/15 and 1/15.

    Args:
        values: finite, of shape (..., columns).

    Returns:
        Codes from 0 to 15 (uint8) of the same shape, and the scales, of shape (..., 1), in fp32.

    Example:
        >>> import torch
        >>> from lightning_tricks.functional import dequantize_int4, quantize_int4
        >>> dequantize_int4(*quantize_int4(torch.tensor([[0.42, 1.0, -1.0]])))
        tensor([[ 0.4667,  1.0000, -1.0000]])
    """
    exact = _finite(values).float()
    scales = exact.abs().amax(-1, keepdim=True)
    return ((exact / _not_zero(scales) + 1) * 7.5).round().clamp(0, 15).to(torch.uint8), scales


def dequantize_int4(codes: Tensor, scales: Tensor) -> Tensor:
    """The values that `quantize_int4` stands for, in fp32.

    Example:
        >>> import torch
        >>> from lightning_tricks.functional import dequantize_int4
        >>> dequantize_int4(torch.tensor([[11, 15]]), torch.tensor([[1.0]]))
        tensor([[0.4667, 1.0000]])
    """
    return (codes.float() / 7.5 - 1) * scales


@dataclass(frozen=True)
class NF4:
    """A tensor in 4-bit NormalFloat: two codes a byte, and a scale for each block.

    Args:
        packed: uint8; the even elements' codes in the upper half of each byte.
        scales: of the blocks: fp32, or int8 under double quantisation.
        shape: of the tensor.
        block: elements that share a scale.
        outer: the scales' own scales, one for 256 of them, and their mean; None without double quantisation.
    """

    packed: Tensor
    scales: Tensor
    shape: tuple[int, ...]
    block: int
    outer: tuple[Tensor, Tensor] | None

    @property
    def bits(self) -> float:
        """Bits an element, scales included."""
        kept = [self.packed, self.scales, *(self.outer or ())]
        return 8 * float(sum(tensor.nbytes for tensor in kept)) / math.prod(self.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values that it stands for, in fp32 and then rounded once to `dtype`."""
        values = _levels_of(self.packed).view(-1, self.block).mul_(self.block_scales()[:, None])
        return values.view(-1)[: math.prod(self.shape)].view(self.shape).to(dtype)

    def block_scales(self) -> Tensor:
        """The scale of each block, in fp32."""
        if self.outer is None:
            return self.scales
        scales, mean = self.outer
        return self.scales.float() * scales.repeat_interleave(_SCALES)[: self.scales.numel()] + mean


def quantize_nf4(values: Tensor, *, block: int = 64, double: bool = True) -> NF4:
    """Round to the 16 levels of NF4, each as likely as the others for normally distributed values.

    Args:
        values: finite, of any shape.
        block: elements that share a scale, their largest magnitude; even.
        double: round the scales too, less their mean, to int8 with a scale for 256 of them.

    Raises:
        MisconfigurationError: if there is nothing to round, a value is not finite, or `block` is odd.

    Example:
        >>> import torch
        >>> from lightning_tricks.functional import quantize_nf4
        >>> rounded = quantize_nf4(torch.tensor([0.0, 1.0, -1.0, 0.5]), block=4, double=False)
        >>> rounded.dequantize()
        tensor([ 0.0000,  1.0000, -1.0000,  0.4407])

    References:
        Dettmers, Pagnoni, Holtzman, Zettlemoyer: QLoRA: Efficient finetuning of quantized LLMs (NeurIPS 2023).
    """
    if block < 2 or block % 2:
        raise MisconfigurationError(f"`block` must be even and 2 or more, got {block}: try 64.")
    flat = _finite(values).float().reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    scales = padded.abs().amax(1)
    rounded, outer = _quantized_scales(scales) if double else (scales, None)
    made = NF4(torch.empty(0), rounded, tuple(values.shape), block, outer)
    normal = padded / _not_zero(made.block_scales())[:, None]  # by the scale that it will be multiplied by
    codes = torch.bucketize(normal, _BOUNDARIES.to(normal.device)).to(torch.uint8).view(-1)
    return NF4(codes[0::2] * 16 + codes[1::2], rounded, tuple(values.shape), block, outer)


def _quantized_scales(scales: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    mean = scales.mean()
    padded = torch.nn.functional.pad(scales - mean, (0, -scales.numel() % _SCALES)).view(-1, _SCALES)
    codes, outer = quantize_int8(padded)
    return codes.view(-1)[: scales.numel()].clone(), (outer.view(-1), mean)


def _levels() -> Tensor:
    """Quantiles of the normal distribution, eight below zero, zero, and seven above; the last ones are -1 and 1."""
    positive = torch.special.ndtri(torch.linspace(_TAIL, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(_TAIL, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat((negative, torch.zeros(1, dtype=torch.float64), positive)).sort().values
    return (levels / levels.abs().max()).float()


_LEVELS = _levels()
_LISTED = tuple(_LEVELS.tolist())
_BOUNDARIES = (_LEVELS[1:] + _LEVELS[:-1]) / 2
_BYTES = torch.arange(256)
# For each byte, its two levels side by side, as one number of eight bytes: to look one up is to copy it.
_PAIRS = torch.stack((_LEVELS[_BYTES // 16], _LEVELS[_BYTES % 16]), dim=1).view(torch.int64).view(-1)


def _levels_of(packed: Tensor) -> Tensor:
    """The levels that bytes stand for, two for each, in fp32: a new tensor, without the blocks' scales."""
    if torch.compiler.is_compiling():  # which makes one loop of this, and cannot look eight bytes up
        levels = torch.tensor(_LISTED, device=packed.device)
        codes = torch.stack((packed >> 4, packed & 15), dim=-1)
        return levels[codes.int()].view(-1)
    return _PAIRS.to(packed.device).index_select(0, packed.int()).view(torch.float32)


def _finite(values: Tensor) -> Tensor:
    if not values.numel():
        raise MisconfigurationError(f"there is nothing to round in a tensor of shape {list(values.shape)}.")
    if not bool(values.isfinite().all()):
        raise MisconfigurationError("a value that is NaN or infinite cannot be rounded: look for it with `isfinite()`.")
    return values.detach()


def _not_zero(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, torch.ones_like(scales), scales)
