"""What past gradient norms say about the next one: percentiles of a window, and z-scores of running averages.

All of it stays on the device of its tensors and waits for nothing. A norm that is not finite, or is 0 because a step
had no gradient, leaves the statistics as they are.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["NormMoments", "percentile", "remember_norm", "zscore_limit"]


def remember_norm(window: Tensor, norm: Tensor) -> Tensor:
    """The last norms, with this one at the end and the oldest dropped. What is empty is NaN.

    Args:
        window: the last norms, oldest first; a vector, filled with NaN to begin with.
        norm: a zero-dimensional tensor on the same device. If it is 0 or not finite, the window stays as it is.

    Returns:
        A new vector, as long.

    Example:
        >>> import torch
        >>> from lightning_tricks.functional import remember_norm
        >>> window = torch.tensor([float("nan"), 1.0, 3.0])
        >>> remember_norm(window, torch.tensor(2.0))
        tensor([1., 3., 2.])
        >>> remember_norm(window, torch.tensor(float("inf")))
        tensor([nan, 1., 3.])
    """
    longer = torch.cat([window[1:], norm.to(window.dtype).reshape(1)])
    return torch.where(_is_usable(norm), longer, window)


def percentile(values: Tensor, q: float) -> Tensor:
    """The q-th percentile of the values that are numbers, as numpy's: between two of them, in proportion.

    Args:
        values: a vector; NaN is left out.
        q: between 0 and 100.

    Returns:
        A zero-dimensional tensor on the same device; NaN if there are no values.

    Example:
        >>> import torch
        >>> from lightning_tricks.functional import percentile
        >>> percentile(torch.tensor([float("nan"), 1.0, 4.0, 2.0]), 75)
        tensor(3.)
    """
    ordered = values.sort().values.to(_wide(values.device))  # NaN comes last
    last = (~values.isnan()).sum() - 1
    position = (last.to(ordered.dtype) * (q / 100)).clamp(min=0)
    below = position.floor().long()
    above = torch.minimum(below + 1, last.clamp(min=0))
    # gather: an index that is a tensor without dimensions would be read back from the device
    low, high = ordered.gather(0, torch.stack([below, above])).unbind()
    return (low + (high - low) * (position - below)).to(values.dtype)


class NormMoments(NamedTuple):
    """Running mean and variance of the norms, as tensors without dimensions.

    Args:
        seen: the number of norms.
        mean: their mean.
        variance: their variance.
    """

    seen: Tensor
    mean: Tensor
    variance: Tensor

    @classmethod
    def empty(cls, device: torch.device) -> "NormMoments":
        """Of no norms; in double precision, in which the square of no fp32 norm overflows."""
        zero = torch.zeros((), dtype=_wide(device), device=device)
        return cls(zero, zero, zero)


def zscore_limit(
    moments: NormMoments, norm: Tensor, *, threshold: float, decay: float, warmup: int
) -> tuple[Tensor, NormMoments]:
    """The largest norm allowed by ZClip, and the moments with this norm, clipped, taken in.

    A norm `z` standard deviations above the mean is a spike if `z` exceeds the threshold, and is then brought to
    `mean + threshold ** 2 / z * deviation`: the higher the spike, the nearer to the mean. The first `warmup` norms make
    plain mean and variance; later ones enter exponential averages.

    Args:
        moments: of the norms before; `NormMoments.empty(device)` before the first.
        norm: a zero-dimensional tensor on the same device. If it is 0 or not finite, the moments stay as they are.
        threshold: the z-score from which a norm is a spike, above 0.
        decay: of the averages, in (0, 1).
        warmup: the number of norms before the first limit.

    Returns:
        The limit, infinite during the warm-up, as a zero-dimensional tensor of the norm's dtype; and the new moments.

    Example:
        >>> import torch
        >>> from lightning_tricks.functional import NormMoments, zscore_limit
        >>> moments = NormMoments(*torch.tensor([25.0, 1.0, 0.04], dtype=torch.float64))
        >>> options = {"threshold": 2.5, "decay": 0.97, "warmup": 25}
        >>> zscore_limit(moments, torch.tensor(1.1), **options)[0]  # nothing unusual: mean + 2.5 deviations
        tensor(1.5000)
        >>> zscore_limit(moments, torch.tensor(2.0), **options)[0]  # z = 5: mean + 1.25 deviations
        tensor(1.2500)

    References:
        Kumar, Owen, Chowdhury, Güra: ZClip: Adaptive Spike Mitigation for LLM Pre-Training (2025), arXiv:2504.02507.
    """
    seen, mean, variance = moments
    usable, value = _is_usable(norm), norm.to(mean.dtype)
    learning = seen < warmup
    highest = mean + threshold * variance.sqrt()
    reduced = mean + threshold**2 * variance / (value - mean)
    limit = torch.where(learning, torch.inf, torch.where(usable & (value > highest), reduced, highest))
    new = _averaged(moments, torch.minimum(value, limit), torch.where(learning, seen / (seen + 1), decay), learning)
    kept = (torch.where(usable, after, before) for after, before in zip(new, moments, strict=True))
    return limit.to(norm.dtype), NormMoments(*kept)


def _averaged(moments: NormMoments, value: Tensor, decay: Tensor, learning: Tensor) -> NormMoments:
    """With a decay of (n - 1) / n, the plain mean and variance of n values (Welford)."""
    seen, mean, variance = moments
    new = decay * mean + (1 - decay) * value
    first = torch.where(learning, value - mean, value - new)  # the averages of ZClip take the new mean twice
    return NormMoments(seen + 1, new, decay * variance + (1 - decay) * first * (value - new))


def _is_usable(norm: Tensor) -> Tensor:
    return torch.isfinite(norm) & (norm > 0)


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no double precision
