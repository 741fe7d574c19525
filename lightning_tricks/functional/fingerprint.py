"""Fingerprints by which a checkpoint recognises the weights it was trained on."""

import zlib

import torch
from torch import Tensor

__all__ = ["fingerprint", "same_fingerprint"]

# Weights are trained at one precision and loaded at another: each is also known by its narrower roundings.
_NARROWER = {
    torch.float64: (torch.float64, torch.float32),
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
}


def fingerprint(tensor: Tensor) -> dict[str, str]:
    """Shape and CRC-32 of a tensor's bytes, at its own precision and rounded to the narrower ones.

    Args:
        tensor: any tensor, on any device.

    Returns:
        `"shape"`, and for each precision its CRC-32 in hexadecimal: plain strings, safe in any file.

    Example:
        >>> import torch
        >>> from lightning_tricks.functional import fingerprint
        >>> fingerprint(torch.ones(2, 3, dtype=torch.bfloat16))
        {'shape': '2x3', 'bfloat16': 'c857da59'}
    """
    values = tensor.detach().cpu()
    precisions = _NARROWER.get(values.dtype, (values.dtype,))
    checksums = {str(dtype).removeprefix("torch."): _checksum(values.to(dtype)) for dtype in precisions}
    return {"shape": "x".join(map(str, values.shape)), **checksums}


def _checksum(values: Tensor) -> str:
    raw = values.contiguous().reshape(-1).view(torch.uint8)
    return f"{zlib.crc32(raw.numpy().data):08x}"


def same_fingerprint(first: dict[str, str], second: dict[str, str]) -> bool:
    """Whether two fingerprints can be of the same weights, kept at the same precision or not.

    Args:
        first: a fingerprint.
        second: another.

    Returns:
        True if the shapes agree, the two have a precision in common, and agree on all that they have in common.

    Example:
        >>> import torch
        >>> from lightning_tricks.functional import fingerprint, same_fingerprint
        >>> weights = torch.linspace(0, 1, 5)
        >>> same_fingerprint(fingerprint(weights), fingerprint(weights.bfloat16()))
        True
        >>> same_fingerprint(fingerprint(weights), fingerprint(weights + 0.1))
        False
    """
    common = first.keys() & second.keys()
    return len(common) > 1 and all(first[key] == second[key] for key in common)
