"""What a ZeRO optimizer does with its gradients in the coming step: read before it, and steered within it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_tricks.engines._capabilities import refusal
from lightning_tricks.engines._ranks import sum_over_ranks
from lightning_tricks.engines._zero_parts import Edit, Part, is_offloaded, paired, parts, piece
from lightning_tricks.engines._zero_silence import silence, whole_pieces

__all__ = ["StepGradients"]


_SCALE = ("custom_loss_scaler", "external_loss_scale")  # attributes: a scale that overrules the optimizer's own


class StepGradients:
    """Reads a ZeRO optimizer's norm before its step, lets that step reuse it, and clips or drops that step alone.

    DeepSpeed asks for the norm once within `step()`, and drops a step whose norm is not finite. This takes the place
    of the method that it asks. Where DeepSpeed has found non-finite gradients before, it drops the step by itself and
    does not ask.

    Args:
        engine: the DeepSpeed engine.
        stage: 1, 2 or 3.
    """

    def __init__(self, engine: Any, stage: int) -> None:
        self.engine = engine
        self._optimizer = engine.optimizer
        self._stage = stage
        method = "_get_norm_groups" if stage == 3 else "scaled_global_norm"
        self._compute = _private(self._optimizer, method)
        self._update_scale = _private(self._optimizer, "_update_scale")
        _refuse_steps_without_a_norm(self._optimizer)
        self._unscale = _private(self._optimizer, "unscale_and_clip_grads")
        for name in _SCALE:
            _private(self._optimizer, name)
        setattr(self._optimizer, method, self._within_step)
        self._optimizer.unscale_and_clip_grads = self._unscaled
        self._optimizer._update_scale = self._after_norm
        self._step_piece = _private(self._optimizer, "_optimizer_step")
        self._optimizer._optimizer_step = self._step_unless_left_out
        self._known: tuple[int, Any] = (-1, None)
        self._limit: tuple[int, float] = (-1, 0.0)
        self._factor: tuple[int, float] = (-1, 1.0)
        self._edits: tuple[int, list[Edit]] = (-1, [])
        self._left_out: tuple[int, set[int]] = (-1, set())
        self._vetoed = -1
        self._restore: dict[str, Any] | None = None

    def norm(self) -> Tensor:
        """The unscaled global norm; not a number where DeepSpeed marks a non-finite one by -1."""
        result = self._compute()
        self._known = (self.engine.global_steps, result)
        if self._stage == 3:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            result = combine_grad_norm_groups(result)
        scaled = torch.as_tensor(result).float().reshape(())
        return torch.where(scaled < 0, torch.nan, scaled) / self.divisor()

    def group_norms(self, groups: list[list[Tensor]], device: torch.device) -> Tensor:
        """The unscaled norm of each group of parameters, in one reduction."""
        parts = self._local_norms()
        found = [[parts[id(parameter)] for parameter in group if id(parameter) in parts] for group in groups]
        none = torch.zeros((), dtype=torch.float64, device=device)
        squares = [torch.stack(group).double().square().sum().to(device) if group else none for group in found]
        return (sum_over_ranks(torch.stack(squares), device).sqrt() / self.divisor()).float()

    def _local_norms(self) -> dict[int, Tensor]:
        """id(parameter) -> the scaled norm of the part of its gradient that this rank holds."""
        optimizer = self._optimizer
        held = optimizer.fp16_groups if self._stage == 3 else optimizer.params_in_partition
        if is_offloaded(optimizer, self._stage):
            known = optimizer.norm_for_param_grads
            keys = {id(parameter): optimizer.get_param_id(parameter) for group in held for parameter in group}
            return {own: torch.as_tensor(known[key]).float() for own, key in keys.items() if key in known}
        pairs = [
            pair for index, group in enumerate(held) for pair in paired(group, optimizer.averaged_gradients[index])
        ]
        if not pairs:
            return {}
        norms = torch._foreach_norm([gradient for _, gradient in pairs], 2, dtype=torch.float32)
        return {id(parameter): norm for (parameter, _), norm in zip(pairs, norms, strict=True)}

    def parts(self) -> list[Part]:
        """This rank's stretches of the gradients."""
        return parts(self._optimizer, self._stage)

    def edit(self, edit: Edit) -> None:
        """Let the coming step, and only that one, change each flat piece of unscaled fp32 gradients in place."""
        step = self.engine.global_steps
        self._edits = (step, [*(self._edits[1] if self._edits[0] == step else []), edit])

    def _unscaled(self, gradients: Any, total_norm: Any) -> None:
        """DeepSpeed's last act before it steps a piece; stage 3 names its number, the others give the piece itself."""
        with self._divided():
            self._unscale(gradients, total_norm)
        step, edits = self._edits
        if step == self.engine.global_steps:
            index, flat = piece(self._optimizer, self._stage, gradients)
            for edit in edits:
                edit(index, flat)

    def clip(self, limit: float) -> None:
        """Let the coming step clip at `limit`, and only that one."""
        self._limit = (self.engine.global_steps, limit)

    def scale(self, factor: float) -> None:
        """Let the coming step multiply gradients by `factor`, before it clips them."""
        self._factor = (self.engine.global_steps, self._present_factor() * factor)

    def _present_factor(self) -> float:
        return self._factor[1] if self._factor[0] == self.engine.global_steps else 1.0

    def divisor(self) -> float:
        """What the gradients held are divided by in the coming step."""
        return float(self._optimizer.loss_scale) / self._present_factor()

    @contextmanager
    def _divided(self) -> Iterator[None]:
        """The step divides its fp32 gradients by the loss scale, and clips: it is given one that holds the factor."""
        kept = {name: getattr(self._optimizer, name) for name in _SCALE}
        self._optimizer.custom_loss_scaler, self._optimizer.external_loss_scale = True, self.divisor()
        try:
            yield
        finally:
            for name, value in kept.items():
                setattr(self._optimizer, name, value)

    def leave_out(self, parameters: list[Tensor]) -> None:
        """Let the coming step, and only that one, pass by the flat pieces that these parameters make up."""
        step = self.engine.global_steps
        earlier = self._left_out[1] if self._left_out[0] == step else set()
        self._left_out = (step, earlier | whole_pieces(self._optimizer, self._stage, parameters))
        silence(self._optimizer, self._stage, parameters)

    def _step_unless_left_out(self, piece: int) -> None:
        step, left_out = self._left_out
        if step != self.engine.global_steps or piece not in left_out:
            self._step_piece(piece)

    def veto(self) -> None:
        """Let the coming step be dropped, and only that one."""
        self._vetoed = self.engine.global_steps

    def _within_step(self, *args: Any, **kwargs: Any) -> Any:
        step = self.engine.global_steps
        self._optimizer.clip_grad = self._limit[1] if self._limit[0] == step else self.engine.gradient_clipping()
        norm = self._known[1] if self._known[0] == step else self._compute(*args, **kwargs)
        return self._infinite(norm) if self._vetoed == step else norm

    def _infinite(self, norm: Any) -> Any:
        """The norm of a step to drop. ZeRO-1 and 2 honour it in bf16 only while they check gradients for overflow."""
        self._restore = {}
        if hasattr(self._optimizer, "check_grad_overflow"):
            self._restore["check_grad_overflow"] = self._optimizer.check_grad_overflow
            self._optimizer.check_grad_overflow = True
        if self._stage == 3:
            return [torch.full_like(torch.as_tensor(group), torch.inf) for group in norm]
        return torch.full_like(torch.as_tensor(norm), torch.inf)

    def _after_norm(self, overflow: bool) -> None:
        """DeepSpeed's next act: the loss scale follows the gradients, and a veto says nothing about those."""
        if self._restore is None:
            self._update_scale(overflow)
            return
        for name, value in self._restore.items():
            setattr(self._optimizer, name, value)
        self._restore = None


def _private(optimizer: Any, name: str) -> Any:
    if not hasattr(optimizer, name):
        import deepspeed

        raise refusal("private", version=deepspeed.__version__, optimizer=type(optimizer).__name__, name=name)
    return getattr(optimizer, name)


def _refuse_steps_without_a_norm(optimizer: Any) -> None:
    if not getattr(optimizer, "compute_grad_norm", True):
        raise refusal("no_norm")
