"""One parameter's full value, however it is laid out."""

from typing import Any

from torch import Tensor

from lightning_tricks.errors import UnsupportedError

__all__ = ["whole"]


def whole(parameter: Tensor) -> Tensor:
    """The full value of a plain, FSDP2-sharded (DTensor) or ZeRO-partitioned parameter, detached.

    Collective for the sharded ones: call it on every rank, in the same order. Under ZeRO a trained parameter comes
    from its fp32 master copy. A plain parameter comes as it is, without a copy.

    Args:
        parameter: a parameter or buffer of the module in training.

    Raises:
        UnsupportedError: for a parameter that FSDP1 has flattened.

    Example:
        >>> import torch
        >>> whole(torch.nn.Parameter(torch.ones(2)))
        tensor([1., 1.])
    """
    if getattr(parameter, "_fsdp_flattened", False):
        raise UnsupportedError(
            "Reading one parameter whole",
            "fsdp1",
            "a piece of a flat parameter does not say what it is a piece of",
            "use `engine_of(trainer).named_full_weights()`, or `strategy='fsdp2'`",
        )
    plain: Any = parameter.detach()
    if hasattr(plain, "full_tensor"):
        full: Tensor = plain.full_tensor()
        return full
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        from lightning_tricks.engines._deepspeed import full_value

        return full_value(parameter)
    return parameter.detach()
