"""A matrix of weights in few bits, as the bytes of one tensor."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from lightning_tricks.functional.quantization import NF4, dequantize_int8, quantize_int8, quantize_nf4

__all__ = ["Packing", "PackingKind", "pack_weight"]

PackingKind = Literal["nf4", "int8", "bf16"]

_BLOCK = 64  # elements of NF4 that share a scale
_HAS_BITSANDBYTES = find_spec("bitsandbytes") is not None


@dataclass(frozen=True)
class Packing:
    """How a matrix lies in a tensor of bytes. Codes come first, then the scales, whose bytes no cast touches.

    Args:
        kind: `nf4`: 4-bit NormalFloat in blocks of 64, with double quantisation; `int8`: a scale for each row; `bf16`.
        shape: of the matrix.
    """

    kind: PackingKind
    shape: tuple[int, int]

    @property
    def elements(self) -> int:
        """Of the matrix."""
        return self.shape[0] * self.shape[1]

    def unpack(self, packed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix, each value rounded once to `dtype`: a new tensor, but from bf16 to bf16.

        Args:
            packed: what `pack_weight` gave, on any device. NF4 on a CUDA device is unpacked by bitsandbytes if that is
                installed, whose kernel is quicker there.
            dtype: of the result.

        Example:
            >>> import torch
            >>> from lightning_tricks.functional import pack_weight
            >>> packed, packing = pack_weight(torch.tensor([[1.0, -0.5], [0.25, 0.0]]), "int8")
            >>> packing.unpack(packed)
            tensor([[ 1.0000, -0.5039],
                    [ 0.2500,  0.0000]])
        """
        if self.kind == "bf16":
            return _view(packed, torch.bfloat16).view(self.shape).to(dtype)
        if self.kind == "int8":
            codes = packed[: self.elements].view(torch.int8).view(self.shape)
            return dequantize_int8(codes, _view(packed[self.elements :], torch.float32)[:, None]).to(dtype)
        rounded = self._nf4(packed)
        return by_bitsandbytes(rounded, dtype) if packed.is_cuda and _HAS_BITSANDBYTES else rounded.dequantize(dtype)

    def _nf4(self, packed: Tensor) -> NF4:
        blocks = -(-self.elements // _BLOCK)
        codes, rest = packed[: blocks * _BLOCK // 2], packed[blocks * _BLOCK // 2 :]
        scales, floats = rest[:blocks].view(torch.int8), _view(rest[blocks:], torch.float32)
        return NF4(codes, scales, self.shape, _BLOCK, (floats[:-1], floats[-1]))


def pack_weight(weight: Tensor, kind: PackingKind) -> tuple[Tensor, Packing]:
    """Round a matrix to few bits.

    Args:
        weight: finite, of shape (rows, columns).
        kind: as in `Packing`.

    Returns:
        A flat tensor of bytes (uint8), which casts to other precisions leave alone, and what unpacks it.

    Raises:
        MisconfigurationError: if a value is not finite, or there is none.

    Example:
        >>> import torch
        >>> from lightning_tricks.functional import pack_weight
        >>> packed, packing = pack_weight(torch.randn(64, 128), "nf4")
        >>> packed.dtype, 8 * packed.numel() / packing.elements  # bits an element
        (torch.uint8, 4.1328125)

    References:
        Dettmers, Pagnoni, Holtzman, Zettlemoyer: QLoRA: Efficient finetuning of quantized LLMs (NeurIPS 2023).
    """
    packing = Packing(kind, (weight.shape[0], weight.shape[1]))
    if kind == "bf16":
        return _bytes(weight.detach().bfloat16()).clone(), packing
    if kind == "int8":
        codes, scales = quantize_int8(weight)
        return torch.cat((_bytes(codes), _bytes(scales))), packing
    rounded = quantize_nf4(weight, block=_BLOCK, double=True)
    outer, mean = rounded.outer or (rounded.scales, rounded.scales)
    return torch.cat((rounded.packed, *map(_bytes, (rounded.scales, outer, mean)))), packing


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _view(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers; a copy of them where an engine has put them at a place where none may begin."""
    fits = not torch.compiler.is_compiling() and raw.storage_offset() % dtype.itemsize == 0  # a graph cannot ask
    return (raw if fits else raw.clone()).view(dtype)


def by_bitsandbytes(rounded: NF4, dtype: torch.dtype) -> Tensor:
    """The same values, by the kernel of bitsandbytes: the codes lie as it lays them."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = QuantState(
        absmax=rounded.block_scales(),
        shape=torch.Size(rounded.shape),
        dtype=dtype,
        blocksize=rounded.block,
        quant_type="nf4",
    )
    found: Tensor = dequantize_4bit(rounded.packed, state)
    return found
