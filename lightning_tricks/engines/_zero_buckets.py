"""How much ZeRO reduces or gathers at once."""

from collections.abc import Sequence
from typing import Any, Literal

from torch.nn import Parameter

from lightning_tricks.engines._ranks import ranks
from lightning_tricks.engines._zero_config import Given

__all__ = ["size_buckets"]

_LARGEST = 200_000_000  # elements; Lightning's own
_SMALLEST = 2**22  # 16 MB in fp32: smaller models reduce everything at once
_UNIT = 256  # DeepSpeed wants a multiple of its alignment
_NAMES = ("reduce_bucket_size", "allgather_bucket_size")


def size_buckets(
    options: dict[str, Any], given: Given, trained: Sequence[Parameter], size: int | Literal["auto"], nvme: bool
) -> None:
    """Set the sizes that the user's configuration leaves free.

    Args:
        options: the section `zero_optimization` of DeepSpeed's configuration, changed in place.
        given: the user's configuration.
        trained: the parameters to train, divided already or not.
        size: elements; `"auto"` scales them to the model.
        nvme: whether parameters are swapped to a folder.
    """
    elements = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in trained]
    chosen = _scaled(sum(elements)) if size == "auto" else size
    chosen += -chosen % _UNIT
    options.update({name: chosen for name in _NAMES if given.at(f"zero_optimization.{name}") is None})
    if options["stage"] == 3 and given.at("zero_optimization.prefetch_bucket_size") is None:  # another name of it
        options.setdefault("stage3_prefetch_bucket_size", chosen)
    if nvme and not given.at("zero_optimization.offload_param.buffer_size"):
        options["offload_param"]["buffer_size"] = -(-max(elements) // ranks()[1])


def _scaled(elements: int) -> int:
    """An eighth of the model, within what is worth its memory and what DeepSpeed's indices hold."""
    return min(max(elements // 8, min(elements, _SMALLEST)), _LARGEST)
