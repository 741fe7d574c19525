"""The parts of fused projections: which outputs are queries, keys and values."""

from itertools import pairwise
from typing import Any

from torch import nn

from lightning_tricks.errors import MisconfigurationError

__all__ = ["ranges"]

_PARTS = {"q": 0, "k": 1, "v": 2}  # three equal parts, in this order
# What the classes' names begin with whose q, k and v lie side by side for each head, or each group of heads.
_INTERLEAVED = (
    "Bloom",
    "CodeGen",
    "DisentangledSelfAttention",
    "Falcon",
    "GPTBigCode",
    "GPTNeoX",
    "MiniMax",
    "Persimmon",
)


def ranges(name: str, sizes: tuple[int, int], parts: str, owner: nn.Module) -> tuple[tuple[int, int], ...]:
    """The ranges of outputs that `parts` names, in order.

    Args:
        name: of the layer.
        sizes: its numbers of outputs and inputs.
        parts: q, k, v, or ranges, with commas between.
        owner: the module around it, whose class or configuration may say how the outputs lie.

    Raises:
        MisconfigurationError: if ranges overlap or leave the layer, or a letter does not stand for one third.

    Example:
        >>> from torch import nn
        >>> from lightning_tricks.layers.fused import ranges
        >>> ranges("qkv", (6, 2), "q,v", nn.Module()), ranges("qkv", (8, 4), "0-4,6-8", nn.Module())
        (((0, 2), (4, 6)), ((0, 4), (6, 8)))
    """
    found = tuple(sorted(_range(name, sizes, part.strip(), owner) for part in parts.split(",")))
    overlap = any(before[1] > after[0] for before, after in pairwise(found))
    if overlap or any(not 0 <= start < stop <= sizes[0] for start, stop in found):
        raise MisconfigurationError(f"the parts {parts!r} of `{name}` overlap, or leave its {sizes[0]} outputs.")
    return found


def _range(name: str, sizes: tuple[int, int], part: str, owner: nn.Module) -> tuple[int, int]:
    if part in _PARTS:
        _require_thirds(name, sizes, owner)
        third = sizes[0] // 3
        return third * _PARTS[part], third * (_PARTS[part] + 1)
    start, dash, stop = part.partition("-")
    if not (dash and start.isdigit() and stop.isdigit()):
        raise MisconfigurationError(f"{part!r} is no part of `{name}`: write q, k or v, or a range, as in `0-1024`.")
    return int(start), int(stop)


def _require_thirds(name: str, sizes: tuple[int, int], owner: nn.Module) -> None:
    """Ranges are the user's own knowledge; letters must be right."""
    kind, config = type(owner).__name__, getattr(owner, "config", None)
    if kind.startswith(_INTERLEAVED):
        raise MisconfigurationError(
            f"`{name}` is of a {kind}, which keeps q, k and v of each head side by side: letters cannot name them. "
            "Adapt the whole layer, or write ranges, as in `0-1024`."
        )
    queries, keys = _heads(config)
    if keys is not None and keys != queries:
        raise MisconfigurationError(
            f"`{name}` is of a {kind} with {queries} heads of q and {keys} of k and v, which are not equal parts: "
            "write ranges, as in `0-1024`."
        )
    if sizes[0] != 3 * sizes[1]:
        raise MisconfigurationError(
            f"`{name}` has {sizes[0]} outputs and {sizes[1]} inputs, so that q, k and v are not told to be three equal "
            "parts: write ranges, as in `0-1024`."
        )


def _heads(config: Any) -> tuple[int | None, int | None]:
    queries = getattr(config, "num_attention_heads", None)
    return queries, 1 if getattr(config, "multi_query", False) else getattr(config, "num_key_value_heads", None)
