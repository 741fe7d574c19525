"""An optimizer's parameter groups cut along a model's layers, each with its own learning rate; schedules follow."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightning.pytorch import LightningModule
from torch.optim import Optimizer

from lightning_tricks.errors import MisconfigurationError

__all__ = ["LAYER", "rearrange", "split_by_layer"]

LAYER = "layer"  # the option of a parameter group that says which layer it is of, 0 being the top
# What belongs to each group: a group's own options, and a schedule's lists with an item for each group.
_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
_SCALED_LISTS = ("_last_lr", "base_lrs", "max_lrs")
_COPIED_LISTS = ("lr_lambdas", "min_lrs", "base_momentums", "max_momentums")
_TORCHS = ("torch.optim.lr_scheduler", "torch.optim.swa_utils")


def rearrange(module: LightningModule, change: Callable[[Any], None]) -> Callable[[], None]:
    """Let `change` see what the module's `configure_optimizers` returns, on every engine, until the way back is taken.

    Returns:
        The way back, which may be taken twice.
    """
    own = vars(module).get("configure_optimizers")
    configure = module.configure_optimizers

    @functools.wraps(configure)
    def configured() -> Any:
        result = configure()
        change(result)
        return result

    vars(module)["configure_optimizers"] = configured

    def back() -> None:
        if vars(module).get("configure_optimizers") is configured:
            vars(module).pop("configure_optimizers")
            if own is not None:
                vars(module)["configure_optimizers"] = own

    return back


def split_by_layer(configured: Any, layers: Mapping[int, int], factor: float) -> None:
    """Cut the groups of every optimizer in what `configure_optimizers` returned, and let its schedules follow.

    A group keeps its options in each of its parts. Its learning rate is divided by `factor` for every layer below the
    top. Parameters that are in no layer, frozen ones, stay with the first part of their group; no part is empty.

    Args:
        configured: what the module returned.
        layers: id(parameter) -> the number of its layer, 0 being the top.
        factor: 1 or more.

    Raises:
        MisconfigurationError: if a schedule is not torch's own, and its optimizer's groups had to be cut.
    """
    found = list(_inside(configured))
    for optimizer in {id(one): one for one in found if isinstance(one, Optimizer)}.values():
        if any(LAYER in group for group in optimizer.param_groups):
            continue  # cut already: the module returns the same optimizer again
        before, origins = len(optimizer.param_groups), _split(optimizer, layers, factor)
        for schedule in found:
            if not isinstance(schedule, Optimizer) and getattr(schedule, "optimizer", None) is optimizer:
                _follow(schedule, before, origins)


def _inside(given: Any) -> Iterator[Any]:
    """Every optimizer and schedule, each once."""
    known: set[int] = set()
    rest = [given]
    while rest:
        one = rest.pop(0)
        if isinstance(one, Mapping):
            rest += one.values()
        elif isinstance(one, list | tuple):
            rest += one
        elif id(one) not in known:
            known.add(id(one))
            rest += [getattr(one, "scheduler", None)] if hasattr(one, "scheduler") else []  # Lightning's own config
            yield one


def _split(optimizer: Optimizer, layers: Mapping[int, int], factor: float) -> list[tuple[int, float]]:
    """For each new group, the number of the one that it was cut from, and its share of the learning rate."""
    groups, origins = [], []
    for number, group in enumerate(optimizer.param_groups):
        for depth, places in _places(group["params"], layers).items():
            share = factor**-depth
            part = {name: value * share if name in _RATES else value for name, value in group.items()}
            for name in {"params", "param_names"} & part.keys():
                part[name] = [group[name][place] for place in places]
            groups.append({**part, LAYER: depth} if depth >= 0 else group)
            origins.append((number, share if depth >= 0 else 1.0))
    optimizer.param_groups[:] = groups
    return origins


def _places(parameters: list[Any], layers: Mapping[int, int]) -> dict[int, list[int]]:
    """The places in a group of each layer's parameters; of none, -1, only if there is no other."""
    depths = [layers.get(id(parameter), -1) for parameter in parameters]
    first = min((depth for depth in depths if depth >= 0), default=-1)
    found: dict[int, list[int]] = {}
    for place, depth in enumerate(depths):
        found.setdefault(first if depth < 0 else depth, []).append(place)
    return dict(sorted(found.items()))


def _follow(schedule: Any, before: int, origins: list[tuple[int, float]]) -> None:
    """Give a schedule an item for each new group, in every list that has one for each."""
    whole = [number for number, _ in origins] == list(range(before)) and all(share == 1 for _, share in origins)
    if not whole and type(schedule).__module__ not in _TORCHS:
        raise MisconfigurationError(
            f"LayerwiseUnfreezing gives each layer a parameter group of its own, and cannot tell a"
            f" {type(schedule).__name__} so, which is not torch's own: use one of torch.optim.lr_scheduler, or the"
            " callback LearningRateSchedule."
        )
    for name in (*_SCALED_LISTS, *_COPIED_LISTS):
        values = vars(schedule).get(name)
        if isinstance(values, list) and len(values) == before:
            scaled = name in _SCALED_LISTS
            vars(schedule)[name] = [values[number] * share if scaled else values[number] for number, share in origins]
    for part in getattr(schedule, "_schedulers", ()):  # of a SequentialLR or ChainedScheduler
        _follow(part, before, origins)
