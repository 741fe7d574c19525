"""A model's layers from top to bottom: found by its repeated blocks, or given by the names of parameters."""

from collections.abc import Iterator, Mapping, Sequence

from lightning.pytorch import LightningModule
from torch import nn

from lightning_tricks.callbacks._selection import none_selected, plain_name, selected
from lightning_tricks.engines import find_blocks
from lightning_tricks.errors import MisconfigurationError

__all__ = ["Order", "find_layers", "ids_by_layer"]

Order = Sequence[str | Sequence[str]]
TOP, BOTTOM = "above the blocks", "below the blocks"


def find_layers(module: LightningModule, order: Order | None) -> dict[str, list[str]]:
    """The names of each layer's trained parameters, tied ones under each of their names.

    Args:
        module: the module, with all of its parameters.
        order: prefixes or patterns from top to bottom, each alone or several for one layer; None: by blocks.

    Raises:
        MisconfigurationError: if a parameter lies in no layer or in two, a pattern selects none, or there is one layer.
    """
    trained = {plain_name(name): id(own) for name, own in _named(module) if own.requires_grad}
    layers = _by_blocks(module, trained) if order is None else _by_patterns(module, order, trained)
    if len(layers) < 2:
        raise MisconfigurationError(
            f"{type(module).__name__} has {len(layers)} layer(s) of trained parameters, so that there is nothing to"
            " unfreeze: name its layers from top to bottom, `order=['head', 'encoder.1', 'encoder.0']`."
        )
    _refuse_ties(layers, trained)
    return layers


def ids_by_layer(module: LightningModule, layers: Mapping[str, Sequence[str]]) -> dict[int, int]:
    """id(parameter) -> the number of its layer, 0 being the top."""
    named = {plain_name(name): id(own) for name, own in _named(module)}
    return {named[name]: depth for depth, names in enumerate(layers.values()) for name in names}


def _named(module: LightningModule) -> Iterator[tuple[str, nn.Parameter]]:
    yield from module.named_parameters(remove_duplicate=False)


def _by_blocks(module: LightningModule, trained: Mapping[str, int]) -> dict[str, list[str]]:
    """Each block a layer, with what is registered between it and the next; what comes before and after, one each."""
    blocks = {id(block) for block in find_blocks(module)}
    names = [plain_name(f"{name}.")[:-1] for name, part in module.named_modules() if id(part) in blocks]
    if not names:
        raise MisconfigurationError(
            f"{type(module).__name__} has no repeated blocks, such as the items of a ModuleList: name its layers from"
            " top to bottom, `order=['head', 'encoder.1', 'encoder.0']`."
        )
    found: dict[str, list[str]] = {layer: [] for layer in (BOTTOM, *names, TOP)}
    place, ahead = BOTTOM, set(names)
    for name, _ in _named(module):
        inside = next((block for block in names if plain_name(name).startswith(f"{block}.")), None)
        place = inside or (place if ahead else TOP)
        ahead.discard(place)
        found[place] += [plain_name(name)] * (plain_name(name) in trained)
    return {layer: found[layer] for layer in reversed(found) if found[layer]}


def _by_patterns(module: LightningModule, order: Order, trained: Mapping[str, int]) -> dict[str, list[str]]:
    layers: dict[str, list[str]] = {}
    owners: dict[str, str] = {}
    for given in order:
        patterns = [given] if isinstance(given, str) else list(given)
        layer = ", ".join(patterns)
        if layer in layers:
            raise MisconfigurationError(f"`order` names the layer `{layer}` twice: leave one of them out.")
        layers[layer] = []
        for pattern in patterns:
            names = selected(pattern, trained)
            if not names:
                raise none_selected("`order` of LayerwiseUnfreezing:", pattern, module, list(trained))
            for name in names:
                if owners.setdefault(name, layer) != layer:
                    raise MisconfigurationError(
                        f"`{name}` is in two layers of `order`, `{owners[name]}` and `{layer}`: let one of them select"
                        " it."
                    )
            layers[layer] += [name for name in names if name not in layers[layer]]
    _refuse_rest(module, trained, owners)
    return layers


def _refuse_rest(module: LightningModule, trained: Mapping[str, int], owners: Mapping[str, str]) -> None:
    held = {trained[name] for name in owners}
    for name, own in trained.items():
        if own not in held:
            raise MisconfigurationError(
                f"`{name}` of {type(module).__name__} is in no layer of `order`: add it to one,"
                " `order=[['head', 'pooler'], ...]`, or call `requires_grad_(False)` on it."
            )


def _refuse_ties(layers: Mapping[str, Sequence[str]], trained: Mapping[str, int]) -> None:
    owners: dict[int, tuple[str, str]] = {}
    for layer, names in layers.items():
        for name in names:
            first, other = owners.setdefault(trained[name], (layer, name))
            if first != layer:
                raise MisconfigurationError(
                    f"`{other}` and `{name}` are one parameter, tied, and lie in two layers, `{first}` and `{layer}`:"
                    " put both into one layer, `order=[['head', 'embedding'], ...]`."
                )
