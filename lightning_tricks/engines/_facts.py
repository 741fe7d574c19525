"""What an engine holds and computes in, as data, and how bytes are counted: each storage once, where it lies."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Bytes", "Ledger", "Memory", "Precisions", "by_elements", "short", "size", "within"]

_SHORT = {torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Bytes:
    """Bytes that one rank has allocated.

    Args:
        device: on the device that trains.
        host: in the host's memory, where that is not the device that trains.

    Example:
        >>> print(Bytes(2_000_000, host=500_000))
        2.0 MB and 500.0 kB on the host
    """

    device: int
    host: int = 0

    @property
    def total(self) -> int:
        """Both together."""
        return self.device + self.host

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(self.device + other.device, self.host + other.host)

    def __str__(self) -> str:
        parts = [size(self.device)] * bool(self.device) + [f"{size(self.host)} on the host"] * bool(self.host)
        return " and ".join(parts) or "none"


@dataclass(frozen=True)
class Memory:
    """What one rank has allocated at the moment of asking, each storage counted once, under the first that fits.

    Args:
        parameters: as the rank keeps them between steps: whole, or its part.
        masters: full-precision copies that the optimizer updates; nothing where it updates the parameters themselves.
        gradients: `None` while there are none.
        optimizer: the optimizer's state, moments mostly; `None` before its first step.
        buffers: the module's buffers.
        engine: what the engine keeps for itself, such as buckets, by the engine's own names.
    """

    parameters: Bytes
    masters: Bytes
    gradients: Bytes | None
    optimizer: Bytes | None
    buffers: Bytes
    engine: Mapping[str, Bytes] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def total(self) -> Bytes:
        """All of it."""
        known = [self.parameters, self.masters, self.gradients, self.optimizer, self.buffers, *self.engine.values()]
        return sum((part for part in known if part is not None), Bytes(0))

    def words(self) -> dict[str, str]:
        """Each entry, readably; what the engine keeps for itself by name, if it is a hundredth of all or more.

        Example:
            >>> Memory(Bytes(4000), Bytes(0), None, None, Bytes(8), {"buckets": Bytes(4000)}).words()["engine"]
            '4.0 kB (buckets)'
        """
        engine = sum(self.engine.values(), Bytes(0))
        named = sorted((name for name, part in self.engine.items() if part.total * 100 >= self.total.total > 0))
        return {
            "parameters": str(self.parameters),
            "masters": str(self.masters),
            "gradients": str(self.gradients or "none at present"),
            "optimizer state": str(self.optimizer or "none before the first step"),
            "buffers": str(self.buffers),
            "engine": f"{engine} ({', '.join(named)})" if named else str(engine),
        }


@dataclass(frozen=True)
class Precisions:
    """The dtypes in force; where there are several, the one of most elements comes first.

    Args:
        parameters: as the rank keeps them.
        masters: of the copies that the optimizer updates; empty where it updates the parameters themselves.
        compute: what a matrix product of two parameters comes out as in the forward pass.
        reduction: in which gradients are summed over the ranks; empty where nothing is summed, and `None` where a
            communication hook decides that the suite does not know.
        batch: what happens to the tensors of a batch.
    """

    parameters: tuple[torch.dtype, ...]
    masters: tuple[torch.dtype, ...]
    compute: tuple[torch.dtype, ...]
    reduction: tuple[torch.dtype, ...] | None
    batch: str

    def words(self) -> dict[str, str]:
        """Each entry, readably.

        Example:
            >>> fp32, bf16 = (torch.float32,), (torch.bfloat16,)
            >>> Precisions(bf16, fp32, bf16, (), "left as it is").words()["masters"]
            'fp32'
        """
        return {
            "parameters": short(self.parameters),
            "masters": short(self.masters) or "the parameters themselves",
            "compute": short(self.compute),
            "reduction": "its communication hook's" if self.reduction is None else short(self.reduction) or "none",
            "batch": self.batch,
        }


class Ledger:
    """Counts the storages of tensors, none of them twice.

    Args:
        device: the device that trains; what lies in the host's memory is told apart, unless that is the CPU itself.

    Example:
        >>> whole = torch.zeros(8)
        >>> ledger = Ledger(torch.device("cpu"))
        >>> ledger.count([whole[:2]]).device, ledger.count([whole]).device
        (32, 0)
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seen: set[tuple[torch.device, int]] = set()

    def count(self, tensors: Iterable[Tensor]) -> Bytes:
        """The bytes of the storages that have not been counted yet."""
        found = {"device": 0, "host": 0}
        for tensor in map(_local, tensors):
            storage = tensor.untyped_storage()
            key = (tensor.device, storage.data_ptr())
            if tensor.device.type != "meta" and storage.nbytes() and key not in self._seen:
                self._seen.add(key)
                found["device" if tensor.device.type == self._device.type else "host"] += storage.nbytes()
        return Bytes(**found)


def _local(tensor: Any) -> Tensor:
    with torch.no_grad():
        local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def within(value: Any, package: str, _known: set[int] | None = None) -> Iterator[Tensor]:
    """The tensors in `value`: through containers and objects of `package`, but not through modules and optimizers.

    Example:
        >>> [tensor.numel() for tensor in within({"a": [torch.zeros(2)], "b": (torch.zeros(3), 1)}, "deepspeed")]
        [2, 3]
    """
    known = set() if _known is None else _known
    if id(value) in known or isinstance(value, nn.Module | torch.optim.Optimizer):
        return
    known.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    items: Iterable[Any] = ()
    if isinstance(value, Mapping):
        items = list(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        items = list(value)
    elif type(value).__module__.startswith(package):
        items = list(getattr(value, "__dict__", {}).values())
    for item in items:
        yield from within(item, package, known)


def by_elements(counted: Iterable[tuple[torch.dtype, int]]) -> tuple[torch.dtype, ...]:
    """The dtypes, the one of most elements first.

    Example:
        >>> by_elements([(torch.float32, 1), (torch.bfloat16, 5), (torch.float32, 2)])
        (torch.bfloat16, torch.float32)
    """
    elements: dict[torch.dtype, int] = {}
    for dtype, count in counted:
        elements[dtype] = elements.get(dtype, 0) + count
    return tuple(sorted(elements, key=lambda dtype: (-elements[dtype], str(dtype))))


def short(dtypes: torch.dtype | Iterable[torch.dtype]) -> str:
    """How dtypes are written.

    Example:
        >>> short([torch.bfloat16, torch.float32]), short(torch.int8)
        ('bf16 and fp32', 'int8')
    """
    each = [dtypes] if isinstance(dtypes, torch.dtype) else dtypes
    return " and ".join(_SHORT.get(dtype, str(dtype).removeprefix("torch.")) for dtype in each)


def size(count: int) -> str:
    """Bytes in the unit that suits them, by thousands.

    Example:
        >>> size(12), size(12_345), size(12_345_678), size(12_345_678_901)
        ('12 B', '12.3 kB', '12.3 MB', '12.3 GB')
    """
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"
