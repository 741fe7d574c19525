"""Training the biases alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional import path_matches
from lightning_tricks.mixins._method import Method, require_targets

__all__ = ["BitFit"]


@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """Train the base's own biases, and nothing else of it.

    There is nothing to merge, and nothing to switch off: a module has one BitFit and no other adapter.

    Args:
        targets: of which modules, by name or glob as in `LoRA`; `("*",)` is all of them, layer norms included. In the
            paper's smaller variant: `("query", "intermediate.dense")`.

    Raises:
        MisconfigurationError: if there is no name.

    Example:
        >>> from lightning_tricks.mixins import BitFit
        >>> BitFit(targets=("query",))
        BitFit(targets=('query',))

    References:
        Ben Zaken, Goldberg, Ravfogel: BitFit: Simple parameter-efficient fine-tuning for transformer-based masked
        language-models (ACL 2022).
    """

    targets: Sequence[str] = ("*",)

    recorded: ClassVar[tuple[str, ...]] = ("targets",)
    mergeable: ClassVar[bool] = False
    switchable: ClassVar[bool] = False
    in_base: ClassVar[bool] = True
    reason: ClassVar[str] = "it trains the base's own biases. Load the base again for the values before."

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", require_targets(self.targets))

    def plan(self, module: nn.Module, name: str) -> dict[str, Any]:
        """The biases, by name.

        Raises:
            MisconfigurationError: if a target has none.
        """
        biases = {path: p for path, p in module.named_parameters() if "bias" in path.rpartition(".")[2]}
        found: dict[str, Any] = {}
        for pattern in self.targets:
            chosen = {path: p for path, p in biases.items() if path_matches(pattern, path.rpartition(".")[0])}
            if not chosen and pattern != "*":
                raise MisconfigurationError(
                    f"target {pattern!r} selects no module of {type(module).__name__} with a bias: try ('*',)."
                )
            found |= chosen or biases
        if not found:
            raise MisconfigurationError(f"{type(module).__name__} holds no bias that BitFit could train: use LoRA.")
        return found

    def attach(self, module: nn.Module, name: str, plan: dict[str, Any]) -> None:
        """Train them."""
        for parameter in plan.values():
            parameter.requires_grad_(True)
