"""Finding the layers that an adapter is for."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional import is_glob, path_matches
from lightning_tricks.layers.adapted import AdaptedLayer
from lightning_tricks.layers.fused import ranges

__all__ = ["Target", "find_linears", "find_targets", "plain_type"]

# What heads are called that are made anew for a task; a language model's own head is pretrained.
HEADS = ("classifier", "score", "qa_outputs", "classification_head", "head")
_ADAPTABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)


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
            linear layer but a Hugging Face model's head and what its owner never calls; `attention` every linear layer
            inside a module whose class says Attention. After a colon, parts of a fused projection whose outputs are all
            of q, then all of k, then all of v: `c_attn:q,v`; or ranges of its outputs, `qkv_proj:0-1024,2048-3072`.

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
    modules = dict(module.named_modules())
    for target in targets:
        pattern, _, parts = target.partition(":")
        for name, layer in _select(module, pattern):
            found[name] = Target(layer)
            if parts:
                found[name] = Target(layer, _slices(name, found[name], parts, modules[name.rpartition(".")[0]]))
    for name in found:
        refuse_uncalled(name, modules)
        _refuse_subclass(name, modules[name])
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
    heads = _heads(module)
    attentions = [name for name, m in module.named_modules() if "Attention" in type(m).__name__]
    chosen = []
    for name, layer in module.named_modules():
        called = type(layer) is not nn.modules.linear.NonDynamicallyQuantizableLinear
        inside = pattern == "all-linear" or any(name.startswith(f"{outer}.") or not outer for outer in attentions)
        if is_linear(layer) and called and inside and id(layer) not in heads:
            chosen.append((name, layer))
    if not chosen:
        raise MisconfigurationError(
            f"{pattern!r} selects no layer of {type(module).__name__}: name the layers. {_candidates(module)}"
        )
    return chosen


def _heads(module: nn.Module) -> set[int]:
    """The layers of the heads of Hugging Face's models inside: a language model's, or the new ones for a task."""
    found = set()
    for model in module.modules():
        find: Any = getattr(model, "get_output_embeddings", None)
        if find is None:
            continue
        head = find()
        new = [child for name, child in model.named_children() if name in HEADS]
        found |= {id(layer) for top in ([head] if head is not None else new) for layer in top.modules()}
    return found


def _slices(name: str, target: Target, parts: str, owner: nn.Module) -> tuple[tuple[int, int], ...]:
    if not is_linear(target.layer):
        raise MisconfigurationError(f"`{name}` is a {type(target.layer).__name__}: only a linear layer has parts.")
    return ranges(name, target.sizes(), parts, owner)


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


def refuse_uncalled(name: str, modules: dict[str, nn.Module]) -> None:
    """Refuse a layer whose owner reads its weight without calling it.

    Raises:
        MisconfigurationError: if it is one.
    """
    owner, _, last = name.rpartition(".")
    if isinstance(modules[owner], nn.MultiheadAttention) and last == "out_proj":
        raise MisconfigurationError(
            f"`{name}` belongs to torch.nn.MultiheadAttention, which reads its weight without calling it: an adapter "
            "there would never be trained. Leave `out_proj` out of the targets; a glob can name the others."
        )


def _refuse_subclass(name: str, layer: nn.Module) -> None:
    if not (_is_adaptable(type(layer)) or isinstance(layer, AdaptedLayer)):
        raise MisconfigurationError(
            f"`{name}` is a {type(layer).__name__}, a subclass of torch.nn.{_base(layer)} with ways of its own: only "
            f"plain torch.nn.{_base(layer)} can be adapted. Leave it out of the targets."
        )


def _base(layer: nn.Module) -> str:
    return next(base.__name__ for base in type(layer).__mro__ if _is_adaptable(base))
