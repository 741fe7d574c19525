"""The factor by which clipping scales gradients."""

import torch
from torch import Tensor

__all__ = ["clip_coefficient"]


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
