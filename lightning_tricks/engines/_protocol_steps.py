"""What a trick may ask of the engine about the optimizer step under way: its gradients, and whether it is taken."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["StepEngine"]


class StepEngine(Protocol):
    """The part of `Engine` that belongs to a step: live, in `on_before_optimizer_step` unless a method says else."""

    def is_optimizer_step(self) -> bool:
        """Whether this `on_before_optimizer_step` precedes a real step, not just another micro-batch. Free."""

    def gradient_norm(self, optimizer: Optimizer) -> Tensor:
        """Global 2-norm of this step's gradients: fp32, zero-dimensional, unscaled, the same on every rank.

        Live, inside `on_before_optimizer_step` of a real step. Collective. Computed once a step however many tricks
        ask; it waits for nothing. Not finite when a gradient is not.
        """

    def gradient_norms(self, optimizer: Optimizer, groups: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
        """The 2-norms of groups of this step's gradients, for logging: fp32, unscaled, the same on every rank.

        A group is a list of parameter names, as `named_parameters()` gives them for the plain module. A parameter
        without a gradient, or one that `optimizer` does not train, counts as zero. After a veto of this step, and
        where a gradient is not finite, a norm is not a number or infinite.

        Live, inside `on_before_optimizer_step` of a real step. Collective, with the same groups on every rank. Costs
        one pass over this rank's gradients and one reduction of a number for each group; computed at every call.
        On the torch engines a preceding `clip_gradient_norm` has scaled the gradients: ask before it.

        Raises:
            MisconfigurationError: if a name is no parameter of the module.
        """

    def clip_gradient_norm(self, optimizer: Optimizer, limit: float | Tensor) -> None:
        """Scale this step's gradients by `min(1, limit / norm)`; leave them alone if the norm is not finite.

        Live, inside `on_before_optimizer_step` of a real step, after `claim_gradient_clipping`. Collective.
        """

    def clip_gradient_value(self, optimizer: Optimizer, limit: float, names: Sequence[str] | None = None) -> Tensor:
        """Bring each element of this step's gradients into `[-limit, limit]`; an infinite one too, but not NaN.

        Live, inside `on_before_optimizer_step` of a real step, after `claim_gradient_clipping`. Collective. Costs two
        passes over this rank's gradients and, on sharded engines, one reduction of a number; waits for nothing. Under
        ZeRO the step itself clips, when it has its fp32 gradients; one whose norm is not finite it drops.

        Args:
            optimizer: whose step follows.
            limit: the largest absolute value allowed, above 0.
            names: the parameters, as `named_parameters()` gives them for the plain module; None: all.

        Returns:
            Whether an element was outside, on any rank: 1 or 0, fp32, zero-dimensional, the same on every rank.

        Raises:
            MisconfigurationError: if a name is no parameter of the module.
        """

    def clip_gradient_units(
        self, optimizer: Optimizer, ratio: float, floor: float, names: Sequence[str] | None = None
    ) -> Tensor:
        """Scale each unit's gradient to `ratio * max(norm of its weights, floor)`, if its norm is above that.

        A unit is an index of a weight's first dimension; a vector or a number is one. Weights are the masters. A unit
        whose gradient or weights are not finite stays as it is.

        Live, inside `on_before_optimizer_step` of a real step, after `claim_gradient_clipping`. Collective. Costs a
        pass over this rank's weights and two over its gradients and, on sharded engines, one reduction of two numbers
        for each unit; waits for nothing. Under ZeRO the step itself clips, when it has its fp32 gradients.

        Args:
            optimizer: whose step follows.
            ratio: of the norms, above 0.
            floor: what the norm of a unit's weights counts as at least, above 0.
            names: the parameters, as `named_parameters()` gives them for the plain module; None: all.

        Returns:
            The share of units that were scaled: fp32, zero-dimensional, the same on every rank.

        Raises:
            MisconfigurationError: if a name is no parameter of the module.
        """

    def scale_gradient_groups(
        self, optimizer: Optimizer, factors: Mapping[str, Tensor], groups: Mapping[str, Sequence[str]]
    ) -> None:
        """Multiply the gradients of groups of parameters, each by its factor.

        Live, inside `on_before_optimizer_step` of a real step, after `claim_gradient_clipping`. On every rank, with the
        same factors. Costs one pass over this rank's gradients; waits for nothing. Under ZeRO the step itself does it,
        when it has its fp32 gradients. A norm that is asked for later in this step is that before.

        Args:
            optimizer: whose step follows. Parameters of another one stay as they are.
            factors: a zero-dimensional tensor for each group that is to change.
            groups: a list of parameter names for each group, as in `gradient_norms`.

        Raises:
            MisconfigurationError: if a name is no parameter of the module.
        """

    def scale_gradients(self, optimizer: Optimizer, factor: float) -> None:
        """Multiply this step's gradients by `factor`, on all ranks alike. Norms and clipping go by the product.

        For what is known only once a window is complete, such as how many tokens it held. Twice in a step multiplies.

        Live, inside `on_before_optimizer_step` of a real step, before anything is clipped in it. Collective: the same
        factor on every rank. Costs one pass over this rank's gradients, which ZeRO does in
        fp32 within its step.

        Raises:
            MisconfigurationError: if `factor` is not a finite number above 0.
        """

    def leave_out(self, optimizer: Optimizer, names: Sequence[str]) -> None:
        """Leave parameters out of this step: weights, moments and step counts stay, and no norm holds their gradients.

        So weight decay does not move them either, and an optimizer's bias correction begins with their first step. An
        optimizer must leave parameters without a gradient alone, as all of torch's do. Twice in a step adds up.

        Live, inside `on_before_optimizer_step` of a real step, before anyone asks for a norm in it. On every rank, with
        the same names. Communicates nothing. Costs a walk over the names; under ZeRO a pass over their gradients.

        Args:
            optimizer: whose step follows. Parameters of another one stay as they are.
            names: the parameters, as `named_parameters()` gives them for the plain module.

        Raises:
            MisconfigurationError: if a name is no parameter of the module, a norm has been given in this step, or,
                under ZeRO, the names are a part of what is stepped in one piece: a parameter group.
        """

    def awaits_gradients(self) -> bool:
        """Whether a parameter that required a gradient when the fit was set up must require one in each backward pass.

        Where it need not, as on one device, a trick can spare the computation of gradients that it would `leave_out`.

        Live. Free.
        """

    def veto_step(self, optimizer: Optimizer) -> None:
        """Drop this optimizer step: weights, moments and step counts stay as if it had not been, bit for bit.

        The whole accumulation window is dropped and the next one starts clean. The loss scale of fp16 and its count of
        good steps stay too, unless the scaler itself found a gradient that is not finite: then it backs off.
        `trainer.global_step` advances, and so does a learning-rate schedule that Lightning steps: neither is the
        engine's. An optimizer must leave parameters without a gradient alone, as all of torch's do.

        Live, inside `on_before_optimizer_step` of a real step. Collective: on all ranks or on none, so decide by a
        value that is the same on all, as `gradient_norm` is. Costs that norm, if nobody asked for it, and nothing
        else; under fp16 on the torch engines it waits for the loss scale.
        """

    def was_step_applied(self) -> bool:
        """Whether the last optimizer step changed the weights: not if it was vetoed, nor if a loss scaler skipped it.

        Live, after a real step, in `on_train_batch_end` or later; the same on every rank. Free. Where Lightning
        accumulates, a micro-batch leaves the answer of the step before. False before the first step. The engine
        must exist before the step: get it in `setup()`.
        """

    def scales_loss(self) -> bool:
        """Whether fp16 scales the loss, so that a step whose scaled gradients overflow is dropped by the engine itself.

        Live. Free. Such a step has a `gradient_norm` that is not finite, and says nothing about its batch.
        """

    def unscaled_loss(self, loss: Tensor) -> Tensor:
        """The loss that `on_before_backward` is given, without the scale of fp16.

        Live, in `on_before_backward`, on any rank. Nothing waits for the device. Lightning's scaler multiplies the loss
        before that hook, DeepSpeed's after it.
        """
