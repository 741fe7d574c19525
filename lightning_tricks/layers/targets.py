"""Finding the layers that an adapter is for."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional import is_glob, path_matches
from lightning_tricks.layers.adapted import AdaptedLayer

__all__ = ["Target", "find_linears", "find_targets", "plain_type"]

_ADAPTABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)
_PARTS = {"q": 0, "k": 1, "v": 2}  # of a fused projection: three equal parts, in this order


@dataclass(frozen=True)
class Target:
    """A layer to adapt.

    Args:
        layer: the layer.
        slices: the ranges of its outputs that are meant; empty: all of them.
    """

    layer: nn.Module
    slices: tuple[tuple[int, int], ...] = ()

    def sizes(self) -> tuple[int, int]:
        """The numbers of outputs and inputs of its weight, seen as a matrix."""
        layer = self.layer
        if isinstance(layer, nn.Embedding):
            return layer.embedding_dim, layer.num_embeddings
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            return layer.out_channels, layer.in_channels * math.prod(layer.kernel_size)
        outputs = int(getattr(layer, "out_features", 0) or getattr(layer, "nf", 0))
        return outputs, int(getattr(layer, "in_features", 0) or getattr(layer, "nx", 0))


def find_targets(module: nn.Module, targets: Sequence[str]) -> dict[str, Target]:
    """The layers inside `module` that `targets` select, by name.

    Args:
        module: the module to look in.
        targets: patterns over the dotted names inside `module`: the last name (`query`), several names
            (`self.query`), or a glob (`layer.[0-3].*.query`; `*` alone is every linear layer). `all-linear` is every
            linear layer but an output embedding and what its owner never calls; `attention` every linear layer inside
            a module whose class says Attention. After a colon, parts of a fused projection: `c_attn:q,v`, or ranges
            of its outputs, `qkv_proj:0-1024,2048-3072`.

    Returns:
        The layers in the module's order, each once.

    Raises:
        MisconfigurationError: if a target selects nothing, or something that cannot be adapted, or a layer that its
            owner never calls; the message lists the names that could be meant.

    Example:
        >>> from torch import nn
        >>> from lightning_tricks.layers import find_targets
        >>> net = nn.ModuleDict({"qkv": nn.Linear(2, 6), "norm": nn.LayerNorm(2)})
        >>> find_targets(net, ["qkv:q,v"])["qkv"].slices
        ((0, 2), (4, 6))
    """
    found: dict[str, Target] = {}
    for target in targets:
        pattern, _, parts = target.partition(":")
        for name, layer in _select(module, pattern):
            found[name] = Target(layer, _slices(name, layer, parts) if parts else ())
    modules = dict(module.named_modules())
    for name in found:
        _refuse_uncalled(name, modules)
    return {name: found[name] for name in modules if name in found}


def find_linears(module: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """`find_targets`, where only linear layers will do.

    Raises:
        MisconfigurationError: as there, and if a target selects another layer.

    Example:
        >>> from torch import nn
        >>> from lightning_tricks.layers import find_linears
        >>> net = nn.ModuleDict({"query": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
        >>> list(find_linears(net, ["query"]))
        ['query']
    """
    chosen: dict[str, nn.Linear] = {}
    for name, target in find_targets(module, targets).items():
        if not isinstance(target.layer, nn.Linear):
            raise MisconfigurationError(
                f"the targets {list(targets)} select `{name}`, a {type(target.layer).__name__}, but only "
                f"torch.nn.Linear can be adapted here: name linear layers. {_candidates(module)}"
            )
        chosen[name] = target.layer
    return chosen


def plain_type(layer: nn.Module) -> type:
    """The type of a layer, or what it was before it got adapters."""
    kind = type(layer)
    if isinstance(layer, AdaptedLayer):
        return next(base for base in kind.__mro__ if _is_adaptable(base))
    return kind


def _is_adaptable(kind: type) -> bool:
    return kind in _ADAPTABLE or _is_transposed(kind)


def _is_transposed(kind: type) -> bool:
    """Hugging Face's Conv1D, known by name: transformers may be absent."""
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is a linear one, adapted or not."""
    return isinstance(layer, nn.Linear) or _is_transposed(plain_type(layer) if _adaptable(layer) else type(layer))


def _adaptable(layer: nn.Module) -> bool:
    return isinstance(layer, _ADAPTABLE) or any(map(_is_transposed, type(layer).__mro__))


def _select(module: nn.Module, pattern: str) -> Iterator[tuple[str, nn.Module]]:
    if pattern in ("all-linear", "attention"):
        yield from _resolve(module, pattern)
        return
    named = [(name, m) for name, m in module.named_modules() if name and path_matches(pattern, name)]
    chosen = [(name, m) for name, m in named if _adaptable(m)]
    if is_glob(pattern):  # a glob means linear layers, where there are some
        chosen = [(name, m) for name, m in chosen if is_linear(m)] or chosen
    others = [(name, m) for name, m in named if not _adaptable(m)]
    if others and not (chosen and is_glob(pattern)):
        name, other = others[0]
        raise MisconfigurationError(
            f"target {pattern!r} selects `{name}`, a {type(other).__name__}, but only torch.nn.Linear, Embedding, "
            f"Conv1d, Conv2d and Hugging Face's Conv1D can be adapted: name such layers. {_candidates(module)}"
        )
    if not chosen:
        raise MisconfigurationError(
            f"target {pattern!r} selects no layer of {type(module).__name__}. {_candidates(module)}"
        )
    yield from chosen


def _resolve(module: nn.Module, pattern: str) -> list[tuple[str, nn.Module]]:
    find_head: Any = getattr(module, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    attentions = [name for name, m in module.named_modules() if "Attention" in type(m).__name__]
    chosen = []
    for name, layer in module.named_modules():
        called = type(layer) is not nn.modules.linear.NonDynamicallyQuantizableLinear
        inside = pattern == "all-linear" or any(name.startswith(f"{outer}.") or not outer for outer in attentions)
        if is_linear(layer) and called and inside and layer is not head:
            chosen.append((name, layer))
    if not chosen:
        raise MisconfigurationError(
            f"{pattern!r} selects no layer of {type(module).__name__}: name the layers. {_candidates(module)}"
        )
    return chosen


def _slices(name: str, layer: nn.Module, parts: str) -> tuple[tuple[int, int], ...]:
    if not is_linear(layer):
        raise MisconfigurationError(f"`{name}` is a {type(layer).__name__}: only a linear layer has parts.")
    outputs = int(getattr(layer, "out_features", 0) or getattr(layer, "nf", 0))
    found = tuple(sorted(_range(name, part.strip(), outputs) for part in parts.split(",")))
    overlap = any(before[1] > after[0] for before, after in pairwise(found))
    if overlap or any(not 0 <= start < stop <= outputs for start, stop in found):
        raise MisconfigurationError(f"the parts {parts!r} of `{name}` overlap, or leave its {outputs} outputs.")
    return found


def _range(name: str, part: str, outputs: int) -> tuple[int, int]:
    if part in _PARTS:
        if outputs % 3:
            raise MisconfigurationError(
                f"`{name}` has {outputs} outputs, which are not three equal parts: write ranges, as in `0-1024`."
            )
        return outputs // 3 * _PARTS[part], outputs // 3 * (_PARTS[part] + 1)
    start, dash, stop = part.partition("-")
    if not (dash and start.isdigit() and stop.isdigit()):
        raise MisconfigurationError(f"{part!r} is no part of `{name}`: write q, k or v, or a range, as in `0-1024`.")
    return int(start), int(stop)


def _candidates(module: nn.Module) -> str:
    named = [(name.rpartition(".")[2], m) for name, m in module.named_modules() if name]
    if linear := [name for name, m in named if isinstance(m, nn.Linear)]:
        return f"Its linear layers are: {grouped(linear)}."
    if others := [name for name, m in named if _adaptable(m)]:
        return f"The layers that can be adapted are: {grouped(others)}."
    return "It holds no torch.nn.Linear: pass the module that does."


def grouped(names: Iterable[str]) -> str:
    """Names with how often each occurs, in order of appearance: `query (6), key (6)`."""
    return ", ".join(f"{name} ({count})" for name, count in Counter(names).items())


def _refuse_uncalled(name: str, modules: dict[str, nn.Module]) -> None:
    owner, _, last = name.rpartition(".")
    if isinstance(modules[owner], nn.MultiheadAttention) and last == "out_proj":
        raise MisconfigurationError(
            f"`{name}` belongs to torch.nn.MultiheadAttention, which reads its weight without calling it: an adapter "
            "there would never be trained. Leave `out_proj` out of the targets; a glob can name the others."
        )
    layer = modules[name]
    if not (_is_adaptable(type(layer)) or isinstance(layer, AdaptedLayer)):
        raise MisconfigurationError(
            f"`{name}` is a {type(layer).__name__}, a subclass of torch.nn.{_base(layer)} with ways of its own: only "
            f"plain torch.nn.{_base(layer)} can be adapted. Leave it out of the targets."
        )


def _base(layer: nn.Module) -> str:
    return next(base.__name__ for base in type(layer).__mro__ if _is_adaptable(base))
