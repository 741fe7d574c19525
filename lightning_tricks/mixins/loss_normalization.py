"""Losses divided by what they are sums over: of the whole optimizer step, on all ranks, however ragged."""

from typing import Any, ClassVar

from torch import Tensor

from lightning_tricks.engines import Rule, Trick
from lightning_tricks.mixins._normalizes_losses import DIVIDED_TWICE, NormalizesLosses
from lightning_tricks.mixins._order import require_before_lightning_module

__all__ = ["LossNormalizationMixin"]

_BY_HAND = Rule(
    when=lambda now, _: {} if not now.module.automatic_optimization else None,
    verdict="refused",
    words="{trick} counts the micro-batches of a step, and under manual optimisation nobody knows which those are",
    remedy="use automatic optimisation, or divide the sums yourself",
)


class LossNormalizationMixin(NormalizesLosses):
    """Losses that are true means: of all tokens, say, of all micro-batches and ranks of an optimizer step.

    Name it before `LightningModule` among the base classes, and let `training_step` return `self.normalized_loss(...)`.
    The gradient of each optimizer step is that of one big batch, also in a window that the end of an epoch cuts short.

    Example:
        >>> import lightning as L
        >>> import torch
        >>> from lightning_tricks.functional import per_token
        >>> from lightning_tricks.mixins import LossNormalizationMixin
        >>> class Classifier(LossNormalizationMixin, L.LightningModule):
        ...     def loss(self, losses, mask):
        ...         return self.normalized_loss(*per_token(losses, mask))
        >>> Classifier().loss(torch.tensor([[1.0, 2.0], [6.0, 0.0]]), torch.tensor([[1, 1], [1, 0]]))
        tensor(3.)

    References:
        Ott, Edunov, Grangier, Auli: Scaling Neural Machine Translation (WMT 2018), which sums gradients and divides by
        the tokens of the whole step.
    """

    trick: ClassVar[Trick] = Trick(
        jobs=("normalise losses",),
        needs=("scale_gradients", "sum_over_ranks", "veto_step"),
        rules=(_BY_HAND, DIVIDED_TWICE),
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        require_before_lightning_module(cls, LossNormalizationMixin)

    def normalized_loss(self, sum_of_losses: Tensor, count: int | float | Tensor) -> Tensor:
        """The mean over the whole optimizer step: the sums of all its micro-batches and ranks, over all their counts.

        In training its value is the mean of the step's micro-batches so far, the same on every rank: logged in
        `training_step`, with or without `sync_dist`, each optimizer step's true mean. Its gradient is right once the
        step is complete. Elsewhere it is the mean of the batch over the ranks, and without a Trainer of the batch.

        Call it in the training step once, on every rank alike, and return it or a multiple of it. A rank or a
        micro-batch with a count of 0 adds nothing; where all have, the step is skipped, with a warning the first time.

        Args:
            sum_of_losses: what this rank's batch adds up to, zero-dimensional, floating, with a gradient.
            count: what it is a sum over, 0 or more: tokens, sequences, samples, or weights.

        Returns:
            The loss, fp32, zero-dimensional.

        Raises:
            MisconfigurationError: if the sum is not one floating number, or has no gradient in training, or the count
                is not one number; or, under accumulation, if it is called twice in a training step or its result is
                mixed with another loss.
            DataError: on every rank, if a count is negative or not finite: at once on the CPU, elsewhere before the
                step, so that nothing waits for the device.
        """
        return self._normalized(sum_of_losses, count)
