"""Compare the outcomes of two fits: nested dicts and lists whose leaves are tensors, numbers and other plain values."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["differences"]


def differences(found: Any, wanted: Any, tolerance: float, place: str = "") -> Iterator[str]:
    """One line for each leaf that differs.

    Args:
        found: an outcome.
        wanted: the outcome it should equal.
        tolerance: largest deviation of floating-point leaves, relative to the largest value of the wanted tensor;
            0 wants the same bits. Everything else must be equal.
        place: where in the outcome this is, for the message.

    Example:
        >>> from tests.conformance.compare import differences
        >>> list(differences({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0, 2.5])}, tolerance=0.1))
        ["['w'] is off by 0.2 of its largest value, 2.5; allowed: 0.1"]
    """
    if isinstance(wanted, float) and isinstance(found, float):
        found, wanted = torch.tensor(found, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64)
    if isinstance(wanted, dict) and isinstance(found, dict) and found.keys() == wanted.keys():
        for key, value in wanted.items():
            yield from differences(found[key], value, tolerance, f"{place}[{key!r}]")
    elif isinstance(wanted, list) and isinstance(found, list) and len(found) == len(wanted):
        for index, value in enumerate(wanted):
            yield from differences(found[index], value, tolerance, f"{place}[{index}]")
    elif isinstance(wanted, Tensor) and isinstance(found, Tensor):
        yield from _tensor_differences(found, wanted, tolerance, place)
    elif found != wanted:
        yield f"{place} is {_brief(found)}, not {_brief(wanted)}"


def _tensor_differences(found: Tensor, wanted: Tensor, tolerance: float, place: str) -> Iterator[str]:
    if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
        yield f"{place} is {found.dtype} {list(found.shape)}, not {wanted.dtype} {list(wanted.shape)}"
    elif tolerance == 0 or not wanted.is_floating_point():
        if not torch.equal(found, wanted):
            yield f"{place} is not equal in every bit, but off by {_deviation(found, wanted):.2g} of its largest value"
    elif not _deviation(found, wanted) <= tolerance:  # also when it is NaN
        largest = wanted.abs().max().item()
        yield (
            f"{place} is off by {_deviation(found, wanted):.2g} of its largest value, {largest:.3g};"
            f" allowed: {tolerance:g}"
        )


def _deviation(found: Tensor, wanted: Tensor) -> float:
    if torch.equal(found, wanted):
        return 0.0
    found, wanted = found.double(), wanted.double()
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def _brief(value: Any) -> str:
    return repr(sorted(value)) if isinstance(value, dict) else repr(value)
