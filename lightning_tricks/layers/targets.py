"""Finding the linear layers that an adapter is for."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional import is_glob, path_matches

__all__ = ["find_linears"]


def find_linears(module: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers inside `module` that `targets` select, by name.

    Args:
        module: the module to look in.
        targets: patterns over the dotted names inside `module`: the last name (`query`), several names
            (`self.query`), or a glob (`layer.[0-3].*.query`; `*` alone is every linear layer).

    Returns:
        The layers in the module's order, each once.

    Raises:
        MisconfigurationError: if a target selects nothing, or something that is not a plain `nn.Linear`, or a layer
            that its owner never calls; the message lists the names that could be meant.

    Example:
        >>> from torch import nn
        >>> from lightning_tricks.layers import find_linears
        >>> net = nn.ModuleDict({"query": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
        >>> list(find_linears(net, ["query"]))
        ['query']
    """
    chosen = {name: layer for target in targets for name, layer in _select(module, target)}
    owners = dict(module.named_modules())
    for name in chosen:
        _refuse_uncalled(name, owners)
    return {name: chosen[name] for name in owners if name in chosen}


def _select(module: nn.Module, target: str) -> Iterator[tuple[str, nn.Linear]]:
    named = [(name, m) for name, m in module.named_modules() if name and path_matches(target, name)]
    linears = [(name, m) for name, m in named if isinstance(m, nn.Linear)]
    others = [(name, m) for name, m in named if not isinstance(m, nn.Linear)]
    if others and not (linears and is_glob(target)):
        name, other = others[0]
        raise MisconfigurationError(
            f"target {target!r} selects `{name}`, a {type(other).__name__}, but only torch.nn.Linear can be adapted: "
            f"name linear layers. {_candidates(module)}"
        )
    if not linears:
        raise MisconfigurationError(
            f"target {target!r} selects no layer of {type(module).__name__}. {_candidates(module)}"
        )
    yield from linears


def _candidates(module: nn.Module) -> str:
    names = [name.rpartition(".")[2] for name, m in module.named_modules() if name and isinstance(m, nn.Linear)]
    if not names:
        return "It holds no torch.nn.Linear: pass the module that does."
    return f"Its linear layers are: {grouped(names)}."


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
    if type(modules[name]) is not nn.Linear:
        raise MisconfigurationError(
            f"`{name}` is a {type(modules[name]).__name__}, a subclass of torch.nn.Linear with ways of its own: only "
            "plain torch.nn.Linear can be adapted. Leave it out of the targets."
        )
