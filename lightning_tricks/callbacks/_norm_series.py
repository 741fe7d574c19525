"""The gradient norms of one optimizer's steps: their quantiles, and a bounded history to draw."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_tricks.functional import QuantileSketch

__all__ = ["NormSeries", "Suggestion"]

POINTS = 2048  # of the history; beyond it neighbours share one, the larger norm
SKIPS = 1000  # of the skipped steps that are kept, the latest
PENDING = 64  # norms that wait on the device
ENOUGH = 100  # norms from which a 95th percentile is read


@dataclass(frozen=True)
class Suggestion:
    """A limit for gradient clipping, and what it rests on.

    Args:
        limit: the 95th percentile of the norms; None if there are too few.
        count: how many norms there were.
        reason: the same in words.
    """

    limit: float | None
    count: int
    reason: str


class NormSeries:
    """Norms, limits and skipped steps; what is on the device stays there until `PENDING` have come together."""

    def __init__(self) -> None:
        self.sketch = QuantileSketch()
        self.seen = 0
        self.limited = 0
        self.clipped = 0
        self.points: list[tuple[int, float, float]] = []
        self.skipped: list[int] = []
        self._waiting: list[tuple[int, Tensor, Tensor, bool]] = []

    def add(self, step: int, norm: Tensor, limit: Tensor | None, applied: bool) -> None:
        """One step's norm, and the limit in force. Waits for nothing, but at every 64th."""
        missing = torch.full_like(norm, torch.nan) if limit is None else limit.to(norm)
        self._waiting.append((step, norm, missing, applied))
        if len(self._waiting) >= PENDING:
            self.settle()

    def settle(self) -> None:
        """Fetch what waits on the device, in one go."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        both = torch.stack([torch.stack([norm, limit]) for _, norm, limit, _ in waiting]).cpu()
        good = both[:, 0].isfinite() & torch.tensor([applied for *_, applied in waiting])
        self.sketch.add(both[good, 0])
        for (step, *_), (norm, limit), taken in zip(waiting, both.tolist(), good.tolist(), strict=True):
            self._note(step, norm, limit, taken)

    def _note(self, step: int, norm: float, limit: float, taken: bool) -> None:
        if not taken:
            self.skipped = [*self.skipped, step][-SKIPS:]
            return
        if limit == limit:  # a limit was in force
            self.limited += 1
            self.clipped += norm > limit
        self.points.append((step, norm, limit))
        if len(self.points) > POINTS:
            pairs = zip(self.points[::2], self.points[1::2], strict=False)
            rest = self.points[len(self.points) // 2 * 2 :]
            self.points = [max(pair, key=lambda point: point[1]) for pair in pairs] + rest

    def suggestion(self) -> Suggestion:
        """The 95th percentile, if there are enough norms for one."""
        self.settle()
        count = self.sketch.count
        if count < ENOUGH:
            reason = f"{count} gradient norms are too few to suggest a limit: {ENOUGH} are needed"
            return Suggestion(None, count, reason)
        low, limit = self.sketch.quantiles([0.05, 0.95]).tolist()
        reason = (
            f"{limit:.3g} is the 95th percentile of {count} gradient norms, whose usual range is {low:.3g} to"
            f" {limit:.3g}"
        )
        return Suggestion(limit, count, reason)

    def state_dict(self) -> dict[str, Any]:
        """All of it, in plain types and tensors."""
        self.settle()
        names = ("seen", "limited", "clipped")
        lists = {"points": list(self.points), "skipped": list(self.skipped)}
        return {**{name: getattr(self, name) for name in names}, **lists, "sketch": self.sketch.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._waiting = []
        self.seen, self.limited, self.clipped = state["seen"], state["limited"], state["clipped"]
        self.points = [(step, norm, limit) for step, norm, limit in state["points"]]
        self.skipped = list(state["skipped"])
        self.sketch.load_state_dict(state["sketch"])
