"""Keeping the frozen weights of an adapter's targets in few bits (QLoRA)."""

from typing import Any, Literal, get_args

from torch import Tensor, nn

from lightning_tricks.engines import whole
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional import Packing, pack_weight
from lightning_tricks.layers import AdaptedLayer, PackedLinear, PackedWeight
from lightning_tricks.layers.targets import is_linear
from lightning_tricks.mixins._method import Method, layers_of

__all__ = ["Base", "install", "kept_as", "pack", "require_base"]

Base = Literal["nf4", "int8", "bf16"]
Packed = dict[str, tuple[nn.Module, Tensor, Packing]]


def require_base(base: Any, method: Method) -> None:
    """Only some methods leave the weights of their targets as they are.

    Raises:
        MisconfigurationError: if `base` is unknown, or the method is none of them.
    """
    if base is None:
        return
    if base not in get_args(Base):
        raise MisconfigurationError(f"`base` must be 'nf4', 'int8', 'bf16' or None, got {base!r}.")
    if not method.packs_base:
        raise MisconfigurationError(
            f"`base={base!r}` is for LoRA and DoRA, which compute with their targets' frozen weights themselves, not "
            f"for {type(method).__name__}: leave it out, or load the base in bf16."
        )


def pack(owner: nn.Module, module: nn.Module, plan: dict[str, Any], base: Base | None) -> Packed:
    """The targets' weights in few bits. Changes nothing. Collective if they are partitioned.

    Args:
        owner: the module with the adapters, in which a weight may be shared.
        module: the one that is being adapted.
        plan: the method's plan, by the targets' names.
        base: how they are to be kept; None: as they are.

    Raises:
        MisconfigurationError: if a target is no linear layer, or kept otherwise, or its weight is shared or not finite.
    """
    if base is None:
        return {}
    users = _users(owner)
    packed: Packed = {}
    for path in plan:
        layer = module.get_submodule(path)
        if isinstance(layer, PackedWeight) and layer.packing.kind == base:
            continue
        _require_packable(path, layer, base, users)
        packed[path] = (layer, *_packed(path, layer, base))
    return packed


def install(packed: Packed) -> None:
    """Put them in the weights' places."""
    for layer, values, packing in packed.values():
        _class(layer).of(layer, values, packing)


def kept_as(module: nn.Module, name: str) -> str:
    """How the base is kept beside an adapter, for a checkpoint's record."""
    kinds = {
        layer.packing.kind if isinstance(layer, PackedWeight) else "given" for layer in layers_of(module, name).values()
    }
    return ", ".join(sorted(kinds))


def _packed(path: str, layer: nn.Module, base: Base) -> tuple[Tensor, Packing]:
    weight: Any = layer.weight
    try:
        return pack_weight(_matrix(layer, whole(weight)), base)
    except MisconfigurationError as error:
        raise MisconfigurationError(f"the weight of `{path}` cannot be kept in {base}: {error}") from error


def _matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    return weight if isinstance(layer, nn.Linear) else weight.t()


def _class(layer: nn.Module) -> type[PackedWeight]:
    if isinstance(layer, nn.Linear):
        return PackedLinear
    from lightning_tricks.layers.lora_transposed import PackedTransposed

    return PackedTransposed


def _users(owner: nn.Module) -> dict[int, list[str]]:
    users: dict[int, list[str]] = {}
    for name, parameter in owner.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    return users


def _require_packable(path: str, layer: nn.Module, base: Base, users: dict[int, list[str]]) -> None:
    if not is_linear(layer):
        raise MisconfigurationError(
            f"`base={base!r}` keeps the weights of linear layers, and `{path}` is a {type(layer).__name__}: leave it "
            "out of the targets."
        )
    if isinstance(layer, AdaptedLayer):
        kept = layer.packing.kind if isinstance(layer, PackedWeight) else "as it was given"
        raise MisconfigurationError(
            f"`{path}` holds an adapter already, with its weight kept {kept}: adapters of one layer share one weight, "
            f"so name the same `base` for each, here {base!r}."
        )
    others = [name for name in users.get(id(layer.weight), []) if not name.endswith(f"{path}.weight")]
    if others:
        raise MisconfigurationError(
            f"the weight of `{path}` is that of `{others[0]}` too, which needs it as it is: leave `{path}` out of the "
            f"targets of `base={base!r}`, or untie the two before."
        )
