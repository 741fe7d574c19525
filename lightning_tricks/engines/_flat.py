"""Where parameters lie in FSDP1's flat parameters: what torch keeps to itself is touched here only."""

import contextlib
import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_tricks.engines._capabilities import refusal
from lightning_tricks.engines._ranks import ranks

__all__ = [
    "PRIVATE",
    "Place",
    "gathered",
    "handles",
    "own_state_keys",
    "places",
    "plain_name",
    "private",
    "reshard",
    "units",
]

PRIVATE = {
    "unit": ("_handle", "_state_dict_hooks", "_state_dict_pre_hooks", "mixed_precision"),
    "handle": (
        "_fwd_bwd_param_dtype",
        "_reduce_dtype",
        "flat_param",
        "needs_unshard",
        "post_reshard",
        "process_group",
        "reshard",
        "uses_sharded_strategy",
    ),
    "flat_param": ("_contiguities", "_params", "_shapes", "_shard_param_infos"),
}
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


class Place(NamedTuple):
    """What one parameter is, whole, and where in it this rank's stretch begins.

    Args:
        shape: of the whole.
        start: in the flattened (row-major) whole; 0 where this rank holds nothing of it.
        group: the ranks whose stretches make up the whole; None where each rank holds it whole.
    """

    shape: tuple[int, ...]
    start: int
    group: Any


def private(owner: Any, name: str) -> Any:
    """An attribute that torch may move."""
    if not hasattr(owner, name):
        raise refusal("private_fsdp1", version=torch.__version__, name=name)
    return getattr(owner, name)


def units(root: nn.Module) -> list[Any]:
    """The FSDP modules in a model, itself included."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    found: list[Any] = FullyShardedDataParallel.fsdp_modules(root)
    return found


def handles(root: nn.Module) -> list[Any]:
    """Those of the flat parameters; a unit without parameters of its own has none."""
    found = [private(unit, "_handle") for unit in units(root)]
    return [handle for handle in found if handle is not None]


def places(root: nn.Module) -> dict[int, Place]:
    """id(parameter) -> its place, for each parameter that lies in a flat one."""
    found = {}
    for handle in handles(root):
        flat = private(handle, "flat_param")
        originals, shapes, infos = (private(flat, name) for name in ("_params", "_shapes", "_shard_param_infos"))
        if originals is None:
            raise refusal("flat_parameters")
        group = _sharing(handle)
        for parameter, shape, info, dense in zip(originals, shapes, infos, private(flat, "_contiguities"), strict=True):
            if not dense and group is not None:
                raise refusal("strided", shape=list(shape))
            found[id(parameter)] = Place(tuple(shape), private(info, "intra_param_start_idx") or 0, group)
    return found


def _sharing(handle: Any) -> Any:
    """The ranks that a flat parameter is cut over; None if it is not cut."""
    group = private(handle, "process_group")
    if private(handle, "uses_sharded_strategy"):
        return group
    if group.size() < ranks()[1]:
        raise refusal("copies_of_one")
    return None


def reshard(root: nn.Module) -> None:
    """Free what is gathered: an evaluation leaves the root whole, and the next forward pass would compute with that."""
    for handle in handles(root):
        flat = private(handle, "flat_param")
        ready = private(handle, "uses_sharded_strategy") and hasattr(flat, "_full_param_padded")  # not before a forward
        if ready and not private(handle, "needs_unshard")():
            private(handle, "reshard")(True)
            private(handle, "post_reshard")()
            handle._prefetched = False


def gathered(part: Tensor, place: Place, device: torch.device) -> Tensor:
    """The whole that the ranks' parts make up: bytes added to zeros, so that no bit changes. Collective."""
    if place.group is None:
        return part.detach().reshape(place.shape)
    width = part.element_size()
    whole = torch.zeros(math.prod(place.shape) * width, dtype=torch.uint8, device=device)
    own = part.detach().reshape(-1).to(device)
    if own.numel():
        whole[place.start * width :][: own.nbytes] = own.view(torch.uint8)
    torch.distributed.all_reduce(whole, group=place.group)
    return whole.view(part.dtype).view(place.shape)


def own_state_keys(module: nn.Module) -> list[str]:
    """The names in a module's state dict, its own hooks heeded, without gathering anything."""
    with contextlib.ExitStack() as stack:
        for unit in units(module):
            stack.enter_context(_without_state_hooks(unit))
        return [plain_name(key) for key in module.state_dict()]


def plain_name(name: str) -> str:
    """A parameter's name without what FSDP1 and recomputation put into it.

    Example:
        >>> plain_name("blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.norm.weight")
        'blocks.0.norm.weight'
    """
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


@contextlib.contextmanager
def _without_state_hooks(unit: Any) -> Iterator[None]:
    """FSDP1's own hooks gather the unit."""
    names = ("_state_dict_hooks", "_state_dict_pre_hooks")
    kept = {name: private(unit, name) for name in names}
    for name in names:
        setattr(unit, name, OrderedDict())
    try:
        yield
    finally:
        for name, hooks in kept.items():
            setattr(unit, name, hooks)
