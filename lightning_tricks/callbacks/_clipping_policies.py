"""What sets the limit of gradient clipping: a fixed number, or the norms of past steps."""

import math
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional import NormMoments, percentile, remember_norm, zscore_limit

__all__ = ["ClippingPolicy", "FixedNorm", "Percentile", "ZScore", "positive"]


_LEAVE_OUT = "Leave GradientClipping out to train without clipping."


@runtime_checkable
class ClippingPolicy(Protocol):
    """Sets the limit of each optimizer step from its gradient norm.

    A policy that learns from past norms also has `state_dict()` and `load_state_dict(state)`, in plain types and
    tensors: `GradientClipping` saves and restores them. It must not let a norm that is not finite into its state.
    With several optimizers each has a copy of the policy as it was given.
    """

    def limit(self, norm: Tensor) -> float | Tensor:
        """The largest norm allowed in this step.

        Args:
            norm: this step's global 2-norm, fp32, zero-dimensional, on the device; reading its value would wait.

        Returns:
            A number above 0, or a zero-dimensional tensor on the device of `norm`.
        """


class FixedNorm:
    """Clips every step at the same norm.

    Args:
        limit: largest gradient norm allowed, above 0; 0.1 to 10 is usual, 1.0 for transformers.

    Raises:
        MisconfigurationError: if the limit is not a finite number above 0.

    Example:
        >>> from lightning_tricks.callbacks import FixedNorm
        >>> FixedNorm(1.0)
        FixedNorm(limit=1.0)

    References:
        Pascanu, Mikolov, Bengio: On the difficulty of training recurrent neural networks (ICML 2013).
    """

    def __init__(self, limit: float = 1.0) -> None:
        self._limit = positive(limit, "the limit of gradient clipping", _LEAVE_OUT)

    def limit(self, norm: Tensor) -> float | Tensor:  # config files match policies by this exact signature
        """The fixed limit, whatever the norm."""
        return self._limit

    def __repr__(self) -> str:
        return f"FixedNorm(limit={self._limit})"


class Percentile:
    """Clips at a percentile of the last norms, this step's among them (AutoClip).

    Where norms shrink or grow in the course of a training, the limit follows. Norms that are not finite, and the 0 of a
    step without gradients, are left out. The first `warmup` norms are clipped at `warmup_limit`, or not at all.

    Args:
        q: the percentile, above 0 and below 100: 95 clips about one step in twenty; the paper favours 10, which clips
            nine in ten.
        window: the number of norms to go by; the paper goes by all.
        warmup: the number of norms to see before the first limit; at least `100 / (100 - q)`, fewer than `window`.
        warmup_limit: the largest norm allowed during the warm-up; None: any.

    Raises:
        MisconfigurationError: if `q` is not above 0 and below 100, `warmup_limit` not above 0, or `warmup` or `window`
            too small.

    Example:
        >>> from lightning_tricks.callbacks import GradientClipping, Percentile
        >>> GradientClipping(Percentile(q=95, window=1000)).policy
        Percentile(q=95, window=1000, warmup=100, warmup_limit=None)

    References:
        Seetharaman, Wichern, Pardo, Le Roux: AutoClip: Adaptive Gradient Clipping for Source Separation Networks
        (MLSP 2020), arXiv:2007.14469.
    """

    def __init__(
        self, q: float = 95, *, window: int = 1000, warmup: int = 100, warmup_limit: float | None = None
    ) -> None:
        if isinstance(q, bool) or not isinstance(q, int | float) or not 0 < q < 100:
            raise MisconfigurationError(f"`q` must be a percentage above 0 and below 100, got {q!r}: 95 is usual.")
        self._q = q
        self._warmup = _count(warmup, "warmup", math.ceil(100 / (100 - q)), "a single outlier would set its own limit")
        self._window = _count(window, "window", self._warmup + 1, "the warm-up would never end")
        self._warmup_limit = _optional_limit(warmup_limit)
        self._norms = _empty(self._window)

    def limit(self, norm: Tensor) -> float | Tensor:  # config files match policies by this exact signature
        """The percentile of the last norms, once there are enough."""
        self._norms = remember_norm(self._norms.to(norm.device), norm)
        seen = (~self._norms.isnan()).sum()
        return torch.where(seen > self._warmup, percentile(self._norms, self._q), self._warmup_limit or math.inf)

    def state_dict(self) -> dict[str, Any]:
        """The last norms, oldest first."""
        return {"norms": self._norms.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the last norms; of a longer window, the latest."""
        norms = state["norms"][-self._window :].cpu()
        self._norms = torch.cat([_empty(self._window - len(norms)), norms])

    def __repr__(self) -> str:
        limit = self._warmup_limit
        return f"Percentile(q={self._q}, window={self._window}, warmup={self._warmup}, warmup_limit={limit})"


class ZScore:
    """Clips norms that are many standard deviations above their running mean (ZClip).

    A norm `z` deviations above the mean is a spike if `z` exceeds the threshold. It is brought to
    `mean + threshold ** 2 / z * deviation`: the higher the spike, the nearer to the mean. Norms enter the mean and the
    deviation as they are after clipping; those that are not finite, and the 0 of a step without gradients, do not. The
    first `warmup` norms are clipped at `warmup_limit`, or not at all.

    Args:
        threshold: the z-score above which a norm is a spike, above 0; 2 to 3 is usual.
        decay: of the running mean and variance, above 0 and below 1; 0.97 looks back over some thirty steps.
        warmup: the number of norms, 2 or more, whose plain mean and variance the averages start from.
        warmup_limit: the largest norm allowed during the warm-up; None: any.

    Raises:
        MisconfigurationError: if one of them is out of its range.

    Example:
        >>> from lightning_tricks.callbacks import GradientClipping, ZScore
        >>> GradientClipping(ZScore(2.5)).policy
        ZScore(threshold=2.5, decay=0.97, warmup=25, warmup_limit=None)

    References:
        Kumar, Owen, Chowdhury, Güra: ZClip: Adaptive Spike Mitigation for LLM Pre-Training (2025), arXiv:2504.02507.
    """

    def __init__(
        self, threshold: float = 2.5, *, decay: float = 0.97, warmup: int = 25, warmup_limit: float | None = None
    ) -> None:
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 < decay < 1:
            raise MisconfigurationError(f"`decay` must be above 0 and below 1, got {decay!r}: 0.97 is usual.")
        self._threshold = positive(threshold, "`threshold`", "2.5 standard deviations are usual.")
        self._decay = float(decay)
        self._warmup = _count(warmup, "warmup", 2, "one norm has no deviation")
        self._warmup_limit = _optional_limit(warmup_limit)
        self._moments = NormMoments.empty(torch.device("cpu"))

    def limit(self, norm: Tensor) -> float | Tensor:
        """The threshold for a usual norm, and less than that for a spike."""
        moments = NormMoments(*(value.to(norm.device) for value in self._moments))
        learning = moments.seen < self._warmup
        options = {"threshold": self._threshold, "decay": self._decay}
        limit, self._moments = zscore_limit(moments, norm, warmup=self._warmup, **options)
        return torch.where(learning, self._warmup_limit or math.inf, limit)

    def state_dict(self) -> dict[str, Any]:
        """The number of norms seen, their mean and their variance."""
        return {name: value.cpu() for name, value in self._moments._asdict().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the moments."""
        self._moments = NormMoments(state["seen"], state["mean"], state["variance"])

    def __repr__(self) -> str:
        options = f"decay={self._decay}, warmup={self._warmup}, warmup_limit={self._warmup_limit}"
        return f"ZScore(threshold={self._threshold}, {options})"


def positive(value: Any, name: str, remedy: str) -> float:
    """The value, if it is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise MisconfigurationError(f"{name} must be a finite number above 0, got {value!r}. {remedy}")
    return float(value)


def _optional_limit(value: Any) -> float | None:
    return None if value is None else positive(value, "`warmup_limit`", "None leaves the warm-up unclipped.")


def _count(value: Any, name: str, least: int, otherwise: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise MisconfigurationError(f"`{name}` must be a whole number, {least} or more, got {value!r}: {otherwise}.")
    return value


def _empty(size: int) -> Tensor:
    return torch.full((size,), torch.nan, dtype=torch.float32)
