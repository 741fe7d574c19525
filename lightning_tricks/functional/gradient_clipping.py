"""The factors by which clipping scales gradients."""

import torch
from torch import Tensor

__all__ = ["clip_coefficient", "unit_coefficients"]


def clip_coefficient(norm: Tensor, limit: float | Tensor) -> Tensor:
    """The factor that brings gradients of this norm down to the limit: `min(1, limit / norm)`.

    A norm that is zero or not finite gives 1: scaling by `limit / inf` would wipe out the finite gradients and turn
    the infinite ones into NaN. Nothing waits for the device.

    Args:
        norm: global 2-norm of the gradients, zero-dimensional.
        limit: the largest norm allowed, above 0; a number or a zero-dimensional tensor on the device of `norm`.

    Returns:
        A zero-dimensional tensor in (0, 1], on the device of `norm`.

    Example:
        >>> import torch
        >>> from lightning_tricks.functional import clip_coefficient
        >>> clip_coefficient(torch.tensor(4.0), limit=1.0)
        tensor(0.2500)
        >>> clip_coefficient(torch.tensor(float("inf")), limit=1.0)
        tensor(1.)

    References:
        Pascanu, Mikolov, Bengio: On the difficulty of training recurrent neural networks (ICML 2013).
    """
    usable = torch.isfinite(norm) & (norm > 0)
    ratio = limit / torch.where(usable, norm, torch.ones_like(norm))
    return torch.where(usable, ratio.clamp(max=1.0), torch.ones_like(norm))


def unit_coefficients(weight_norms: Tensor, gradient_norms: Tensor, *, ratio: float, floor: float = 1e-3) -> Tensor:
    """The factors of adaptive gradient clipping: each unit's `min(1, ratio * max(weight norm, floor) / gradient norm)`.

    A gradient norm that is zero, or one of both that is not finite, gives 1. Nothing waits for the device.

    Args:
        weight_norms: 2-norms of the units' weights, of any shape.
        gradient_norms: 2-norms of their gradients, of the same shape.
        ratio: the largest ratio of the two allowed, above 0.
        floor: what a weight norm counts as at least, so that units that start at zero can learn.

    Returns:
        A tensor in (0, 1] of the same shape.

    Example:
        >>> import torch
        >>> from lightning_tricks.functional import unit_coefficients
        >>> unit_coefficients(torch.tensor([2.0, 0.0, 2.0]), torch.tensor([4.0, 1.0, 0.01]), ratio=0.01)
        tensor([5.0000e-03, 1.0000e-05, 1.0000e+00])

    References:
        Brock, De, Smith, Simonyan: High-Performance Large-Scale Image Recognition Without Normalization (ICML 2021).
    """
    largest = ratio * weight_norms.clamp(min=floor)
    usable = torch.isfinite(gradient_norms) & torch.isfinite(largest) & (gradient_norms > largest)
    return torch.where(usable, largest / gradient_norms, torch.ones_like(gradient_norms))
