"""The repeated blocks of a module: what is sharded, or computed again, one by one."""

from collections import Counter
from collections.abc import Iterator, Sequence

from torch import nn

from lightning_tricks.errors import MisconfigurationError

__all__ = ["find_blocks", "outermost"]


def find_blocks(module: nn.Module, names: Sequence[str] = ()) -> list[nn.Module]:
    """The blocks to shard one by one, none inside another, none sharing a parameter with the rest."""
    wanted = set(names) or {
        name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()
    }
    found = [part for part in module.modules() if _class_name(part) in wanted and part is not module]
    missing = set(names) - {_class_name(part) for part in found}
    if missing:
        present = sorted({type(part).__name__ for part in module.modules()} - {type(module).__name__})
        raise MisconfigurationError(
            f"`shard` names {sorted(missing)[0]!r}, which {type(module).__name__} does not contain. It contains: "
            f"{', '.join(present)}."
        )
    return [block for block in outermost(found or list(_repeated(module))) if _owns_its_parameters(block, module)]


def _class_name(part: nn.Module) -> str:
    """The class's own name, also of a part that FSDP2 has sharded, to which it gave a class of its making."""
    kind, *bases = type(part).__mro__
    return bases[1].__name__ if bases[0].__name__ == "FSDPModule" else kind.__name__


def _repeated(module: nn.Module) -> Iterator[nn.Module]:
    for part in module.modules():
        if isinstance(part, nn.ModuleList):
            classes = Counter(type(item) for item in part)
            yield from (item for item in part if classes[type(item)] >= 2 and any(True for _ in item.parameters()))


def outermost(blocks: list[nn.Module]) -> list[nn.Module]:
    """Those that lie in none of the others, each once."""
    inner = {id(part) for block in blocks for part in block.modules() if part is not block}
    return [block for block in dict.fromkeys(blocks) if id(block) not in inner]


def _owns_its_parameters(block: nn.Module, module: nn.Module) -> bool:
    """Whether no module outside the block holds one of its parameters: tied weights belong to the common parent."""
    inside = {id(part) for part in block.modules()}
    own = {id(parameter) for parameter in block.parameters()}
    outside = (part for part in module.modules() if id(part) not in inside)
    return not any(id(p) in own for part in outside for p in part.parameters(recurse=False))
