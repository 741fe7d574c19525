"""Bottleneck adapters, and the fusion of trained ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional import path_matches
from lightning_tricks.layers import Block, Bottlenecks, Fusion
from lightning_tricks.layers.targets import is_linear, refuse_uncalled
from lightning_tricks.mixins._method import Method, require_targets

__all__ = ["AdapterFusion", "Bottleneck"]

# What ends the attention part and the feed-forward part of a layer, as architectures name it: BERT and its kin;
# DistilBERT; LLaMA and its kin; GPT-2; T5; torch.
_ENDS = [
    ("attention.output.dense", "*[0-9].output.dense"),
    ("out_lin", "lin2"),
    ("o_proj", "down_proj"),
    ("attn.c_proj", "mlp.c_proj"),
    ("SelfAttention.o", "wo"),
    ("self_attn", "linear2"),
]


@dataclass(frozen=True, kw_only=True)
class Bottleneck(Method):
    """Small networks with a narrow layer and a skip connection, put behind parts of each transformer layer.

    Each adds `scale * up(activation(down(h)))`, has `2 * d * width + width + d` parameters, and starts by adding
    nothing: `up` is zero, where the paper's is near zero. The papers train the layer norms too:
    `trainable=("LayerNorm",)`.

    Args:
        width: of the bottleneck, 1 or more; 8 to 64 in practice.
        targets: `"houlsby"`: behind attention and behind the feed-forward part; `"pfeiffer"`: behind the latter only;
            or the names of modules, as in `LoRA`.
        activation: `relu`, `gelu`, `silu` or `tanh`.
        parallel: read what the target reads, rather than what it gives. In the paper the target is the whole
            feed-forward module: `targets=("mlp",)`.
        scale: of what is added; 4 in the paper of parallel adapters, 1 in the others.

    Raises:
        MisconfigurationError: if an option is out of its range.

    Example:
        >>> from lightning_tricks.mixins import Bottleneck
        >>> Bottleneck(width=16, targets="pfeiffer").targets
        'pfeiffer'

    References:
        Houlsby et al.: Parameter-efficient transfer learning for NLP (ICML 2019).
        Pfeiffer et al.: AdapterFusion: Non-destructive task composition for transfer learning (EACL 2021).
        He et al.: Towards a unified view of parameter-efficient transfer learning (ICLR 2022).
    """

    width: int = 16
    targets: Sequence[str] = "houlsby"
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    parallel: bool = False
    scale: float = 1.0

    recorded: ClassVar[tuple[str, ...]] = ("width", "activation", "parallel", "scale")
    mergeable: ClassVar[bool] = False
    reason: ClassVar[str] = "it is nonlinear, so that no weight could hold it. Keep it beside the base."

    def __post_init__(self) -> None:
        if isinstance(self.width, bool) or not isinstance(self.width, int) or self.width < 1:
            raise MisconfigurationError(f"`width` must be a whole number of 1 or more, got {self.width!r}: try 16.")
        if self.activation not in ("relu", "gelu", "silu", "tanh"):
            raise MisconfigurationError(f"`activation` must be relu, gelu, silu or tanh, got {self.activation!r}.")
        if not self.scale > 0:
            raise MisconfigurationError(f"`scale` must be positive, got {self.scale!r}: try 1.")
        if self.targets not in ("houlsby", "pfeiffer"):
            object.__setattr__(self, "targets", require_targets(self.targets))

    def plan(self, module: nn.Module, name: str) -> dict[str, Any]:
        """The modules, with the widths of what they read and give.

        Raises:
            MisconfigurationError: if a target selects nothing, a module whose widths cannot be told, or one with an
                adapter of this name.
        """
        hosts, modules = self._hosts(module), dict(module.named_modules())
        plan = {}
        for path, host in hosts.items():
            refuse_uncalled(path, modules)
            held = getattr(host, "bottlenecks", None)
            if isinstance(held, Bottlenecks) and name in held.adapters:
                raise MisconfigurationError(f"`{path}` has an adapter {name!r} already: give this one another name.")
            plan[path] = (host, *_widths(path, host))
        return plan

    def attach(self, module: nn.Module, name: str, plan: dict[str, Any]) -> None:
        """Put a bottleneck at each."""
        options = Block(self.width, self.activation, self.parallel, self.scale)
        for host, inputs, outputs in plan.values():
            device = next(host.parameters()).device
            made = Bottlenecks.beside(host, inputs, outputs)
            made.add_adapter(name, options)
            made.to(device)

    def _hosts(self, module: nn.Module) -> dict[str, nn.Module]:
        if isinstance(self.targets, str):
            return _resolve(module, self.targets)
        found: dict[str, nn.Module] = {}
        for target in self.targets:
            chosen = _matching(module, target)
            if not chosen:
                raise MisconfigurationError(f"target {target!r} selects no module of {type(module).__name__}.")
            found |= chosen
        return found


@dataclass(frozen=True, kw_only=True)
class AdapterFusion(Method):
    """Attention over bottleneck adapters that are trained already: they stay frozen, and how they mix is learned.

    Adapt it to the module that holds them; it needs `3 * d * d` parameters at each place. The values start at the
    adapters' own changes.

    Args:
        adapters: the names of two or more bottleneck adapters.

    Raises:
        MisconfigurationError: if there are fewer than two.

    Example:
        >>> from lightning_tricks.mixins import AdapterFusion
        >>> AdapterFusion(adapters=("news", "reviews"))
        AdapterFusion(adapters=('news', 'reviews'))

    References:
        Pfeiffer et al.: AdapterFusion: Non-destructive task composition for transfer learning (EACL 2021).
    """

    adapters: Sequence[str]

    recorded: ClassVar[tuple[str, ...]] = ("adapters",)
    mergeable: ClassVar[bool] = False
    reason: ClassVar[str] = Bottleneck.reason

    def __post_init__(self) -> None:
        if isinstance(self.adapters, str) or len(set(self.adapters)) < 2:
            raise MisconfigurationError(f"`adapters` must be two or more names, got {self.adapters!r}.")
        object.__setattr__(self, "adapters", tuple(self.adapters))

    def plan(self, module: nn.Module, name: str) -> dict[str, Any]:
        """The places where all the adapters are.

        Raises:
            MisconfigurationError: if there is no such place.
        """
        places = {path: m for path, m in module.named_modules() if isinstance(m, Bottlenecks)}
        found = {path: m for path, m in places.items() if all(self._is_block(m, other) for other in self.adapters)}
        if not found:
            held = sorted({other for m in places.values() for other in m.adapters})
            raise MisconfigurationError(
                f"no module of {type(module).__name__} holds all the bottleneck adapters {list(self.adapters)}; there "
                f"are {', '.join(held) or 'none'}: adapt it with `Bottleneck` under these names first."
            )
        return found

    def attach(self, module: nn.Module, name: str, plan: dict[str, Any]) -> None:
        """Put a fusion at each."""
        for place in plan.values():
            place.add_adapter(name, Fusion(tuple(self.adapters)))

    @staticmethod
    def _is_block(place: Bottlenecks, name: str) -> bool:
        return isinstance(place.adapters.get(name), Block)


def _matching(module: nn.Module, pattern: str) -> dict[str, nn.Module]:
    return {
        path: m
        for path, m in module.named_modules()
        if path and path_matches(pattern, path) and not isinstance(m, Bottlenecks)
    }


def _resolve(module: nn.Module, placement: str) -> dict[str, nn.Module]:
    for attention, feed_forward in _ENDS:
        behind, after = _matching(module, attention), _matching(module, feed_forward)
        if behind and after:
            chosen = after if placement == "pfeiffer" else {**behind, **after}
            return {path: m for path, m in module.named_modules() if path in chosen}
    raise MisconfigurationError(
        f"where the attention and feed-forward parts of {type(module).__name__} end is not known: name the modules in "
        "`targets`, such as the last linear layer of each."
    )


def _widths(path: str, host: nn.Module) -> tuple[int, int]:
    if isinstance(host, nn.MultiheadAttention):
        return host.embed_dim, host.embed_dim
    linears: list[Any] = [m for m in host.modules() if is_linear(m)]
    if not linears:
        raise MisconfigurationError(
            f"`{path}`, a {type(host).__name__}, has no linear layer, from which the width of what it gives could be "
            "told: name one that has."
        )
    first, last = linears[0], linears[-1]
    return int(getattr(first, "in_features", 0) or first.nx), int(getattr(last, "out_features", 0) or last.nf)
