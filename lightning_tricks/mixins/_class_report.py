"""What weighing did for each class: its recall at the first validation of a fit, or before it, and at the last."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["ClassRecalls", "ClassRow", "table"]


@dataclass(frozen=True)
class ClassRow:
    """One class of the report.

    Args:
        count: examples in the training set.
        weight: of each of them.
        before: recall at the first whole validation of the fit; NaN without an example of the class. It is before
            training if the sanity check is of all validation data.
        after: recall at the last one.
    """

    count: int
    weight: float
    before: float
    after: float


class ClassRecalls:
    """Counts, validation by validation, how many targets of each class there were and how many were found."""

    def __init__(self) -> None:
        self.first: list[float] | None = None
        self.last: list[float] | None = None
        self.untrained = False  # whether the first was before training
        self._now: Tensor | None = None

    def add(self, logits: Tensor, targets: Tensor, classes: int, ignore_index: int, labels: bool) -> None:
        """Count a batch in, without waiting for the device.

        Args:
            logits: of shape (N, K, ...) for classes, (N, K) for labels.
            targets: of shape (N, ...), or (N, K).
            classes: K.
            ignore_index: the target that counts for nothing.
            labels: whether targets are K labels that hold or not; their recall is of those that hold.
        """
        if labels:
            held = targets == 1
            found, seen = (held & (logits > 0)).sum(0), held.sum(0)
        else:
            valid = targets != ignore_index
            chosen = torch.where(valid, targets, classes).flatten()  # one class more, for what is to be ignored
            hit = (logits.argmax(1) == targets).flatten()
            seen = torch.zeros(classes + 1, device=targets.device).index_add_(0, chosen, torch.ones_like(hit).float())
            found = torch.zeros_like(seen).index_add_(0, chosen, hit.float())
            found, seen = found[:classes], seen[:classes]
        both = torch.stack([found, seen]).double()
        self._now = both if self._now is None else self._now + both

    def close(
        self,
        classes: int,
        sum_over_ranks: Callable[[Tensor], Tensor],
        device: torch.device,
        keep: bool,
        untrained: bool = False,
    ) -> None:
        """End a validation. Collective.

        Args:
            classes: K.
            sum_over_ranks: adds up over all ranks.
            device: of the zeros of a rank that had no batch.
            keep: whether it was a whole one, of a fit.
            untrained: whether that fit has yet to begin.
        """
        now = torch.zeros(2, classes, dtype=torch.float64, device=device) if self._now is None else self._now
        self._now = None
        found, seen = sum_over_ranks(now)
        if not keep or not seen.any():
            return
        recalls = [float(recall) for recall in found / seen]
        if self.first is None:
            self.first, self.untrained = recalls, untrained
        self.last = recalls

    def state(self) -> list[Any]:
        """What a checkpoint keeps."""
        return [self.first, self.last, self.untrained]

    def load(self, state: list[Any]) -> None:
        """Take it over. Older checkpoints do not say whether the first was before training: it was not."""
        self.first, self.last, *rest = state
        self.untrained = bool(rest and rest[0])


def table(rows: list[ClassRow], untrained: bool = False) -> str:
    """The report, as lines of text.

    Args:
        rows: one for each class.
        untrained: whether the first recalls are from before training, which the heading then says.

    Example:
        >>> from lightning_tricks.mixins._class_report import ClassRow, table
        >>> print(table([ClassRow(90, 0.5, 1.0, 0.97), ClassRow(10, 5.0, 0.0, 0.8)]))
        class    count  weight  recall first  last
            0       90    0.50          1.00  0.97
            1       10    5.00          0.00  0.80
    """
    heading = "recall before after" if untrained else "recall first  last"
    lines = [f"class    count  weight  {heading}"]
    lines += [
        f"{index:5d} {row.count:8d} {row.weight:7.2f} {row.before:13.2f} {row.after:5.2f}"
        for index, row in enumerate(rows)
    ]
    return "\n".join(lines)
