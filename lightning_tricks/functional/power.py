"""Yeo and Johnson's power transform: its values, its inverse, and the power that suits a sample."""

import torch
from torch import Tensor

__all__ = ["best_power", "power_inverse", "power_transform"]

GOLDEN = 0.6180339887498949
ROUNDS = 60
NEAR = 1e-6  # of the two powers whose formula is a logarithm


def power_transform(values: Tensor, power: Tensor) -> Tensor:
    """Yeo-Johnson's transform.

    Args:
        values: of any shape that broadcasts with `power`.
        power: 1 leaves values as they are; 0 is the logarithm of what is positive.

    Example:
        >>> power_transform(torch.tensor([0.0, 3.0, -3.0]), torch.tensor(1.0)).tolist()
        [0.0, 3.0, -3.0]

    References:
        Yeo, Johnson: A New Family of Power Transformations to Improve Normality or Symmetry (Biometrika 2000).
    """
    above = _box_cox(values.clamp(min=0), power)
    below = -_box_cox((-values).clamp(min=0), 2 - power)
    return torch.where(values >= 0, above, below).where(~values.isnan(), values)


def power_inverse(values: Tensor, power: Tensor) -> Tensor:
    """The inverse of `power_transform`.

    Example:
        >>> power = torch.tensor(0.5)
        >>> [round(v, 5) for v in power_inverse(power_transform(torch.tensor([4.0, -2.0]), power), power).tolist()]
        [4.0, -2.0]
    """
    above = _box_cox_inverse(values.clamp(min=0), power)
    below = -_box_cox_inverse((-values).clamp(min=0), 2 - power)
    return torch.where(values >= 0, above, below).where(~values.isnan(), values)


def best_power(values: Tensor, low: float = -5.0, high: float = 5.0) -> Tensor:
    """The power under which each column is likeliest to be normal, by golden-section search.

    Args:
        values: float64 of shape (rows, features), finite.
        low: of the powers looked at.
        high: likewise.

    Example:
        >>> values = torch.linspace(-3, 3, 201, dtype=torch.float64)[:, None].exp()
        >>> round(float(best_power(values)), 1)
        -0.6
    """
    left = torch.full(values.shape[1:], low, dtype=values.dtype)
    right = torch.full(values.shape[1:], high, dtype=values.dtype)
    for _ in range(ROUNDS):
        first, second = right - GOLDEN * (right - left), left + GOLDEN * (right - left)
        better = _log_likelihood(values, first) > _log_likelihood(values, second)
        left, right = torch.where(better, left, first), torch.where(better, second, right)
    return (left + right) / 2


def _box_cox(values: Tensor, power: Tensor) -> Tensor:
    logs = values.log1p()
    small = power.abs() < NEAR
    return torch.where(small, logs, torch.expm1(power * logs) / power.where(~small, torch.ones_like(power)))


def _box_cox_inverse(values: Tensor, power: Tensor) -> Tensor:
    small = power.abs() < NEAR
    # Beyond the transform's range, which a model's output may reach, the inverse is infinite.
    inner = torch.log1p((power * values).clamp(min=-1))
    return torch.expm1(torch.where(small, values, inner / power.where(~small, torch.ones_like(power))))


def _log_likelihood(values: Tensor, power: Tensor) -> Tensor:
    variance = power_transform(values, power).var(0, correction=0)
    tiny = torch.finfo(values.dtype).tiny
    jacobian = (values.sign() * values.abs().log1p()).mean(0)
    return -variance.clamp(min=tiny).log() / 2 + (power - 1) * jacobian
