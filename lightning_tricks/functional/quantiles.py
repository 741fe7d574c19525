"""Quantiles of a stream of numbers, from a bounded part of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["QuantileSketch"]

SIZE = 1024  # values on each level


class QuantileSketch:
    """Keeps a stream's quantiles in a few kilobytes: deterministic, mergeable.

    Level i holds values that stand for 2^i each. A full level is sorted, and every second value moves up, by turns the
    odd and the even ones. The error of a rank is below log2(n / 1024) / 1024 of n, 1% at a million values; a level
    takes 4 KiB, so that a million values take 44 KiB, and twice as many 4 KiB more; twice that where fp64 is kept.

    Example:
        >>> sketch = QuantileSketch()
        >>> sketch.add(torch.arange(101.0))
        >>> sketch.count, sketch.quantiles([0.05, 0.5, 0.95]).tolist()
        (101, [5.0, 50.0, 95.0])

    References:
        Manku, Rajagopalan, Lindsay: Approximate Medians and other Quantiles in One Pass (SIGMOD 1998).
    """

    def __init__(self) -> None:
        self.count = 0
        self._levels: list[Tensor] = [torch.empty(0)]
        self._turns: list[int] = [0]

    def add(self, values: Tensor) -> None:
        """Take in values, which must be finite: of any shape, on the CPU; fp64 and whole numbers are kept as fp64."""
        # In fp32 times in seconds would be two minutes apart.
        exact = torch.float64 if values.dtype == torch.float64 or not values.is_floating_point() else torch.float32
        flat = values.detach().to(exact).flatten()
        self.count += flat.numel()
        for start in range(0, flat.numel(), SIZE):
            self._put(0, flat[start : start + SIZE])

    def merge(self, other: "QuantileSketch") -> None:
        """Take in another sketch's values."""
        self.count += other.count
        for level, values in enumerate(other._levels):
            self._put(level, values)

    def quantiles(self, q: Sequence[float]) -> Tensor:
        """The values below which these shares of the stream lie; not numbers while it is empty.

        Args:
            q: shares, from 0 to 1.
        """
        if self.count == 0:
            return torch.full((len(q),), torch.nan)
        values, order = torch.cat(self._levels).sort()
        sizes = torch.tensor([level.numel() for level in self._levels])
        weights = (2 ** torch.arange(len(sizes))).repeat_interleave(sizes)[order]
        middles = weights.cumsum(0).double() - (weights + 1) / 2  # the middle rank of those a value stands for
        wanted = torch.tensor(q, dtype=torch.float64) * (self.count - 1)
        return values[torch.searchsorted(middles, wanted).clamp(max=len(values) - 1)]

    def state_dict(self) -> dict[str, Any]:
        """All of it, in plain types and tensors."""
        return {"count": self.count, "levels": [level.clone() for level in self._levels], "turns": list(self._turns)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`, bit for bit."""
        self.count = state["count"]
        self._levels = [level.clone() for level in state["levels"]]
        self._turns = list(state["turns"])

    def _put(self, level: int, values: Tensor) -> None:
        if level == len(self._levels):
            self._levels.append(torch.empty(0))
            self._turns.append(0)
        held = torch.cat([self._levels[level], values])
        if len(held) <= SIZE:
            self._levels[level] = held
            return
        even = len(held) // 2 * 2
        moving, self._levels[level] = held[:even].sort().values, held[even:].clone()
        turn, self._turns[level] = self._turns[level], 1 - self._turns[level]
        self._put(level + 1, moving[turn::2].clone())
