"""One metric that early stopping watches: what counts as an improvement, and how long ago the last one was."""

import math
from dataclasses import dataclass
from typing import Any

from lightning_tricks.callbacks._monitor import Mode, checked_mode
from lightning_tricks.callbacks._patience import Clock
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional import is_improvement

__all__ = ["Point", "Tracker", "Watch"]

Point = tuple[int, float, float]  # optimizer step, value, smoothed value


@dataclass(frozen=True)
class Watch:
    """A metric for `EarlyStopping` to watch, and when it counts as improved.

    Args:
        monitor: the metric, as `validation_step` logs it.
        mode: `min` if lower is better, `max` if higher is, `auto` to tell it from the metric's name.
        min_delta: smallest change that counts as an improvement, 0 or more: in the metric's unit, or with `relative`
            as a share of the best value.
        relative: whether `min_delta` is a share.
        smoothing: weight of the past in an exponential moving average (free of bias at its start) that is judged
            instead of the value, in [0, 1); 0: none, 0.6 to 0.9 for noisy metrics.
        baseline: only values better than this one start the count of patience anew; nothing stops on an improvement.
        target: stop as soon as this value is reached.

    Raises:
        MisconfigurationError: for an option out of range.

    Example:
        >>> from lightning_tricks.callbacks import Watch
        >>> Watch("val/loss", min_delta=0.01, relative=True, smoothing=0.6).monitor
        'val/loss'
    """

    monitor: str
    mode: Mode = "auto"
    min_delta: float = 0.0
    relative: bool = False
    smoothing: float = 0.0
    baseline: float | None = None
    target: float | None = None

    def __post_init__(self) -> None:
        checked_mode("EarlyStopping", self.monitor, self.mode)
        if not math.isfinite(self.min_delta) or self.min_delta < 0:
            raise MisconfigurationError(
                f"EarlyStopping's `min_delta` must be a finite number, 0 or more, got {self.min_delta!r}. The "
                "direction comes from `mode`, not from its sign."
            )
        if not 0 <= self.smoothing < 1:
            raise MisconfigurationError(
                f"`Watch`'s `smoothing` must be at least 0 and below 1, got {self.smoothing!r}. 0.6 is a good start."
            )
        for name in ("baseline", "target"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise MisconfigurationError(f"`Watch`'s `{name}` must be a finite number or null, got {value!r}.")


class Tracker:
    """What has become of a watched metric.

    Args:
        watch: the metric and its rules.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.mode = checked_mode("EarlyStopping", watch.monitor, watch.mode)
        self.best: float | None = None
        self.best_step: int | None = None
        self.since = Clock()
        self.improves = False  # by its last value: then nothing is stopped, whatever the baseline
        self.points: list[Point] = []
        self._sum = self._weight = 0.0

    def see(self, value: float, now: Clock) -> bool:
        """Take in a value; whether it is the best so far."""
        judged = self._smoothed(value)
        self.points.append((now.steps, value, judged))
        # With smoothing the past goes on being judged, but not at a value that is none.
        self.improves = math.isfinite(value) and self._better(judged, self.best)
        if not self.improves:
            return False
        self.best, self.best_step = judged, now.steps
        if self.watch.baseline is None or self._better(judged, self.watch.baseline):
            self.since = now
        return True

    def reached(self) -> bool:
        """Whether the last value is as good as the target."""
        target, last = self.watch.target, self.points[-1][2] if self.points else math.nan
        return target is not None and (last <= target if self.mode == "min" else last >= target)

    def forget_best(self) -> None:
        """The next value will be the best so far."""
        self.best = self.best_step = None

    def state_dict(self) -> dict[str, Any]:
        """In plain types."""
        state: dict[str, Any] = {"best": self.best, "best_step": self.best_step, "since": list(self.since)}
        past = {"points": [list(point) for point in self.points], "ema": [self._sum, self._weight]}
        return {**state, **past, "improves": self.improves}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.best, self.best_step, self.since = state["best"], state["best_step"], Clock(*state["since"])
        self.points = [(step, value, judged) for step, value, judged in state["points"]]
        self._sum, self._weight = state["ema"]
        self.improves = state["improves"]

    def _smoothed(self, value: float) -> float:
        past = self.watch.smoothing
        if not past:
            return value
        if math.isfinite(value):
            self._sum = past * self._sum + (1 - past) * value
            self._weight = past * self._weight + (1 - past)
        return self._sum / self._weight if self._weight else value

    def _better(self, value: float, reference: float | None) -> bool:
        scale = abs(reference) if self.watch.relative and reference is not None else 1.0
        return is_improvement(value, reference, mode=self.mode, min_delta=self.watch.min_delta * scale)
