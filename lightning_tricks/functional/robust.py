"""How unusual a number is among others, some of which may be outliers themselves."""

import torch
from torch import Tensor

__all__ = ["robust_zscore"]

_NORMAL = 1.4826  # of a normal distribution, the standard deviation over the median absolute deviation


def robust_zscore(values: Tensor, value: Tensor) -> Tensor:
    """How many standard deviations a number lies above the median, the deviation being told from the median one.

    Args:
        values: a vector of at least one number, all finite.
        value: a zero-dimensional tensor.

    Returns:
        `(value - median) / (1.4826 * median absolute deviation)`, zero-dimensional; 0 if that deviation is 0, where
        nothing can be said.

    Example:
        >>> import torch
        >>> from lightning_tricks.functional import robust_zscore
        >>> robust_zscore(torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0]), torch.tensor(9.0))
        tensor(4.0469)

    References:
        Hampel: The Influence Curve and its Role in Robust Estimation (JASA 1974).
    """
    median = values.quantile(0.5)
    deviation = _NORMAL * (values - median).abs().quantile(0.5)
    return torch.where(deviation > 0, (value - median) / deviation, torch.zeros_like(deviation))
