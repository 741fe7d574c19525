"""What DeepSpeed's ZeRO holds: found by walking its optimizer, so that whatever it keeps is counted under some name."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_tricks.engines._capabilities import refusal
from lightning_tricks.engines._facts import within
from lightning_tricks.engines._live import Held, states_of

__all__ = ["held", "masters", "reduction", "uses_autocast"]

_MASTERS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")  # stages 1 and 2, and 3
_GRADIENTS = ("averaged_gradients", "all_grad_tensors", "grads_in_partition", "grad_partitions_flat_buffer")


def held(engine: Any, module: Any) -> Held:
    """The tensors of this rank. Under ZeRO-3 a parameter that is whole at the moment is a copy, the engine's own."""
    optimizer, parameters = engine.optimizer, list(module.parameters())
    gathered = [parameter.data for parameter in parameters if hasattr(parameter, "ds_tensor")]
    kept = [getattr(parameter, "ds_tensor", parameter) for parameter in parameters]
    owners = [*parameters, *masters(engine)]
    gradients = [owner.grad for owner in owners if owner.grad is not None]
    gradients += [owner.grad_accum for owner in parameters if getattr(owner, "grad_accum", None) is not None]
    for name in _GRADIENTS:
        gradients += within(getattr(optimizer, name, None), "deepspeed")
    rest: dict[str, Iterable[Tensor]] = {"gathered parameters": gathered}
    rest |= {name: within(value, "deepspeed") for name, value in getattr(optimizer, "__dict__", {}).items()}
    return Held(kept, masters(engine), gradients, _states(optimizer), module.buffers(), rest)


def masters(engine: Any) -> list[Tensor]:
    """The flat pieces that the optimizer updates. Without training, as in an evaluation, there are none."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "optimizer"):
        return []
    for name in _MASTERS:
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    import deepspeed

    raise refusal(
        "private", version=deepspeed.__version__, optimizer=type(optimizer).__name__, name="` nor `".join(_MASTERS)
    )


def reduction(engine: Any) -> tuple[torch.dtype, ...]:
    """The dtype in which gradients are summed."""
    dtype: torch.dtype = engine.communication_data_type
    return (dtype,) if hasattr(engine.optimizer, "optimizer") else ()


def uses_autocast(engine: Any) -> torch.dtype | None:
    """The dtype of DeepSpeed's own use of torch's autocast, where its configuration asks for that."""
    dtype: torch.dtype | None = engine.torch_autocast_dtype() if engine.torch_autocast_enabled() else None
    return dtype


def _states(optimizer: Any) -> list[Tensor]:
    return states_of([optimizer.optimizer]) if hasattr(optimizer, "optimizer") else []
