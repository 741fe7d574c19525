"""Bottleneck adapters behind or beside any module, and their fusion."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.layers.adapted import AdaptedLayer

__all__ = ["Block", "Bottlenecks", "Fusion"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
_INPUTS = ("hidden_states", "input", "x", "query")  # what modules call it that they read, called by keywords
ATTRIBUTE = "bottlenecks"  # under which a module holds its adapters


@dataclass(frozen=True)
class Block:
    """The options of one bottleneck adapter at one module.

    Args:
        width: of the bottleneck.
        activation: between its two projections.
        parallel: whether it reads the module's inputs rather than its outputs.
        scale: of what it adds.
    """

    width: int
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    parallel: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class Fusion:
    """The options of a fusion at one module.

    Args:
        names: the bottleneck adapters that it attends to.
    """

    names: tuple[str, ...]


class Bottlenecks(AdaptedLayer):
    """The bottleneck adapters of one module: each adds `scale * up(activation(down(h)))` to the module's output.

    `h` is that output, or the module's input for a parallel adapter. `up` starts at zero: a new adapter adds nothing.
    A fusion adds the mean of its adapters' changes, weighted by attention from the output to them.

    Args:
        inputs: width of what the module reads.
        outputs: width of what it gives.

    Example:
        >>> import torch
        >>> from lightning_tricks.layers import Block, Bottlenecks
        >>> layer = torch.nn.Linear(6, 4)
        >>> Bottlenecks.beside(layer, 6, 4).add_adapter("default", Block(width=2))
        >>> layer(torch.ones(3, 6)).shape
        torch.Size([3, 4])
        >>> [name for name, _ in layer.named_parameters()][2:]
        ['bottlenecks.down', 'bottlenecks.down_bias', 'bottlenecks.up', 'bottlenecks.up_bias']
    """

    kinds = ("down", "down_bias", "up", "up_bias", "query", "key", "value")

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self._begin()
        self.inputs, self.outputs = inputs, outputs

    @classmethod
    def beside(cls, host: nn.Module, inputs: int, outputs: int) -> "Bottlenecks":
        """Those of a module, which gets them if it has none."""
        present = getattr(host, ATTRIBUTE, None)
        if isinstance(present, cls):
            return present
        made = cls(inputs, outputs)
        host.add_module(ATTRIBUTE, made)
        host.register_forward_hook(_apply, with_kwargs=True)
        return made

    def _create(self, name: str, options: Block | Fusion) -> None:
        device = next((p.device for p in self.parameters()), None)
        if isinstance(options, Fusion):
            for kind in ("query", "key"):
                self.set_own(kind, name, nn.Parameter(torch.empty(self.outputs, self.outputs, device=device)))
                nn.init.normal_(self.own(kind, name), std=0.02)
            self.set_own("value", name, nn.Parameter(torch.eye(self.outputs, device=device)))
            return
        read = self.inputs if options.parallel else self.outputs
        down = torch.empty(options.width, read, device=device)
        nn.init.kaiming_uniform_(down, a=5**0.5)
        self.set_own("down", name, nn.Parameter(down))
        self.set_own("down_bias", name, nn.Parameter(torch.zeros(options.width, device=device)))
        self.set_own("up", name, nn.Parameter(torch.zeros(self.outputs, options.width, device=device)))
        self.set_own("up_bias", name, nn.Parameter(torch.zeros(self.outputs, device=device)))

    def check_weights(self, weights: Mapping[str, float]) -> None:
        """A fusion weighs adapters by itself.

        Raises:
            MisconfigurationError: if one is combined with another adapter, or weighted.
        """
        here = {name: weight for name, weight in weights.items() if name in self.adapters}
        if any(isinstance(self.adapters[name], Fusion) for name in here) and list(here.values()) != [1.0]:
            raise MisconfigurationError(
                f"a fusion weighs its adapters by itself: it cannot be weighted or combined, as in {here}. Activate it "
                "alone, with weight 1."
            )

    def merged_values(self) -> dict[str, Tensor]:
        """There is no weight that could hold a nonlinear adapter; the method refuses before it comes to this."""
        raise MisconfigurationError("a bottleneck adapter is nonlinear and cannot be merged: keep it beside the base.")

    def reads_inputs(self) -> bool:
        """Whether an active adapter, or one that is fused, is parallel to the module."""
        active = [self.adapters[name] for name in self.active]
        fused = [self.adapters[name] for options in active if isinstance(options, Fusion) for name in options.names]
        return any(isinstance(options, Block) and options.parallel for options in active + fused)

    def forward(self, x: Tensor | None, out: Tensor) -> Tensor:
        """The module's output with the active adapters.

        Args:
            x: what the module read, of shape (..., inputs); None if no adapter needs it.
            out: what it gave, of shape (..., outputs).
        """
        total = out
        for name, weight in self.active.items():
            options = self.adapters[name]
            change = self._fused(name, options, x, out) if isinstance(options, Fusion) else self._change(name, x, out)
            total = total + weight * change
        return total

    def _change(self, name: str, x: Tensor | None, out: Tensor) -> Tensor:
        options = self.adapters[name]
        read: Any = x if options.parallel else out
        parts = (self.own(kind, name).to(read.dtype) for kind in ("down", "down_bias", "up", "up_bias"))
        down, down_bias, up, up_bias = parts
        inner = _ACTIVATIONS[options.activation](F.linear(read, down, down_bias))
        change: Tensor = F.linear(inner, up, up_bias) * options.scale
        return change.to(out.dtype)

    def _fused(self, name: str, options: Fusion, x: Tensor | None, out: Tensor) -> Tensor:
        changes = torch.stack([self._change(other, x, out) for other in options.names], dim=-2)
        query, key, value = (self.own(kind, name).to(out.dtype) for kind in ("query", "key", "value"))
        scores = (F.linear(changes, key) * F.linear(out, query).unsqueeze(-2)).sum(-1, keepdim=True)
        fused: Tensor = (scores.softmax(-2) * F.linear(changes, value)).sum(-2)
        return fused.to(out.dtype)


def _apply(host: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], out: Any) -> Any:
    """The hook of a module with bottleneck adapters. Attention gives several things, of which the first is meant."""
    adapters: Bottlenecks = getattr(host, ATTRIBUTE)
    x = arguments[0] if arguments else next((named[key] for key in _INPUTS if key in named), None)
    if x is None and adapters.reads_inputs():
        raise MisconfigurationError(
            f"a parallel adapter reads what its {type(host).__name__} reads, which was called with "
            f"{', '.join(named) or 'nothing'}: call it with its input first, or name a module within it."
        )
    if isinstance(out, tuple):
        return (adapters(x, out[0]), *out[1:])
    return adapters(x, out)
