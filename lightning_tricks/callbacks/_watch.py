"""One metric that early stopping watches: what counts as an improvement, and how long ago the last one was."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_tricks.callbacks._monitor import Mode, checked_mode
from lightning_tricks.callbacks._patience import Clock
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional import is_improvement

__all__ = ["Point", "Tracker", "Watch", "watches"]

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


def watches(
    monitor: str | Watch | Sequence[str | Watch],
    *,
    mode: Mode,
    min_delta: float,
    smoothing: float,
    baseline: float | None,
) -> list[Watch]:
    """What `EarlyStopping` watches: each name with the options beside it, each `Watch` as it is.

    Raises:
        MisconfigurationError: for no metric, one twice, or options that none of them would heed.
    """
    given = [monitor] if isinstance(monitor, str | Watch) else list(monitor or [])
    names = [each.monitor if isinstance(each, Watch) else each for each in given]
    if not given or len(set(names)) < len(names):
        raise MisconfigurationError(
            f"EarlyStopping's `monitor` must name a metric, or several, each once, got {monitor!r}."
        )
    single = {"smoothing": (smoothing, 0.0), "baseline": (baseline, None)}
    others = {"mode": (mode, "auto"), "min_delta": (min_delta, 0.0)}
    named = sum(isinstance(each, str) for each in given)
    unheeded = (single if len(given) > 1 or not named else {}) | (others if not named else {})
    for option, (value, default) in unheeded.items():
        if value != default:
            raise MisconfigurationError(
                f"EarlyStopping's `{option}`, got {value!r}, is for a metric given by its name"
                f"{' alone' if option in single else ''}: pass it to `Watch(..., {option}={value!r})`."
            )
    own = (smoothing, baseline) if len(given) == 1 else (0.0, None)
    return [
        each if isinstance(each, Watch) else Watch(each, mode, min_delta, smoothing=own[0], baseline=own[1])
        for each in given
    ]


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
        self.now = self.since = Clock()  # of the last value, and of the last improvement
        self.improves = False  # by its last value: then nothing is stopped, whatever the baseline
        self.points: list[Point] = []
        self._sum = self._weight = 0.0

    def see(self, value: float, now: Clock) -> bool:
        """Take in a value; whether it is the best so far."""
        self.now = now._replace(validations=self.now.validations + 1)  # those without a value do not count
        judged = self._smoothed(value)
        self.points.append((now.steps, value, judged))
        # With smoothing the past goes on being judged, but not at a value that is none.
        self.improves = math.isfinite(value) and self._better(judged, self.best)
        if not self.improves:
            return False
        self.best, self.best_step = judged, now.steps
        if self.watch.baseline is None or self._better(judged, self.watch.baseline):
            self.since = self.now
        return True

    def elapsed(self) -> Clock:
        """How long it has not improved, at its last value."""
        return self.now.since(self.since)

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
        state["now"] = list(self.now)
        past = {"points": [list(point) for point in self.points], "ema": [self._sum, self._weight]}
        return {**state, **past, "improves": self.improves}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.best, self.best_step, self.since = state["best"], state["best_step"], Clock(*state["since"])
        self.now = Clock(*state["now"])
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
