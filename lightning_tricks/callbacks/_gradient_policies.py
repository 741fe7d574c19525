"""Policies of gradient clipping that act on parts of the gradients, and not on their norm."""

from collections.abc import Sequence
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor
from torch.optim import Optimizer

from lightning_tricks.callbacks._clipping_policies import positive
from lightning_tricks.engines import Engine
from lightning_tricks.errors import MisconfigurationError

__all__ = ["GradientPolicy", "UnitwiseAdaptive", "Value"]

_LEAVE_OUT = "Leave GradientClipping out to train without clipping."


@runtime_checkable
class GradientPolicy(Protocol):
    """Changes the gradients of each optimizer step itself, through the engine.

    A policy that some engine cannot follow exactly names the methods it calls in `needs`, so that a fit is refused
    before its first step. One that leaves parameters out names them in `exclude`.
    """

    def apply(self, engine: Engine, optimizer: Optimizer, names: Sequence[str]) -> Tensor:
        """Clip the gradients of these parameters. Called on every rank.

        Args:
            engine: what to do it with; its methods work on every strategy, and wait for nothing.
            optimizer: whose step follows.
            names: the parameters.

        Returns:
            How much was clipped, from 0 to 1, as a zero-dimensional tensor; it is logged.
        """


class Value:
    """Clips each element of the gradients, and not their norm: the direction of the step changes.

    Elements that are infinite are brought to the limit as well; NaN stays NaN. ZeRO drops such a step by itself.

    Args:
        limit: the largest absolute value allowed, above 0; 0.1 to 1 is usual.

    Raises:
        MisconfigurationError: if the limit is not a finite number above 0.

    Example:
        >>> from lightning_tricks.callbacks import GradientClipping, Value
        >>> GradientClipping(Value(0.5)).policy
        Value(limit=0.5)

    References:
        Graves: Generating Sequences With Recurrent Neural Networks (2013), arXiv:1308.0850.
    """

    needs: ClassVar[tuple[str, ...]] = ("clip_gradient_value",)

    def __init__(self, limit: float = 0.5) -> None:
        self.largest = positive(limit, "the limit of gradient clipping", _LEAVE_OUT)

    def apply(self, engine: Engine, optimizer: Optimizer, names: Sequence[str]) -> Tensor:
        """Clamp them; 1 if an element was outside, else 0."""
        return engine.clip_gradient_value(optimizer, self.largest, names)

    def __repr__(self) -> str:
        return f"Value(limit={self.largest})"


class UnitwiseAdaptive:
    """Clips the gradient of each unit to a share of its weights' norm (AGC).

    A unit is what an index of a weight's first dimension stands for: an output of a linear layer or a convolution, a
    token of an embedding. A bias, a gain or any other vector is one unit. Its gradient is brought to
    `ratio * max(norm of its weights, 0.001)`, if it is above that: the floor lets weights that start at zero learn.

    Args:
        ratio: the largest ratio of gradient norm to weight norm, above 0; 0.01 to 0.16 is usual, less for
            larger batches.
        exclude: parameters to leave alone: prefixes of their names (`head`) or patterns (`*.bias`). The paper leaves
            out the last linear layer.

    Raises:
        MisconfigurationError: if the ratio is not a finite number above 0, or a name in `exclude` selects nothing.

    Example:
        >>> from lightning_tricks.callbacks import GradientClipping, UnitwiseAdaptive
        >>> GradientClipping(UnitwiseAdaptive(0.01, exclude=["head"])).policy
        UnitwiseAdaptive(ratio=0.01, exclude=('head',))

    References:
        Brock, De, Smith, Simonyan: High-Performance Large-Scale Image Recognition Without Normalization (ICML 2021),
        arXiv:2102.06171.
    """

    needs: ClassVar[tuple[str, ...]] = ("clip_gradient_units",)
    floor: ClassVar[float] = 1e-3

    def __init__(self, ratio: float = 0.01, *, exclude: Sequence[str] = ()) -> None:
        if isinstance(exclude, str):
            raise MisconfigurationError(f"`exclude` must be a list of names, got {exclude!r}: pass [{exclude!r}].")
        self.ratio = positive(ratio, "`ratio`", "0.01 is usual.")
        self.exclude = tuple(exclude)

    def apply(self, engine: Engine, optimizer: Optimizer, names: Sequence[str]) -> Tensor:
        """Scale their units; the share of units that were."""
        return engine.clip_gradient_units(optimizer, self.ratio, self.floor, names)

    def __repr__(self) -> str:
        return f"UnitwiseAdaptive(ratio={self.ratio}, exclude={self.exclude})"
