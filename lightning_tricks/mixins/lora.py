"""Low-rank adaptation of any module inside a LightningModule."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional import path_matches
from lightning_tricks.layers import (
    LoRAConv1d,
    LoRAConv2d,
    LoRAEmbedding,
    LoRALinear,
    LowRank,
    LowRankLayer,
    Target,
    find_targets,
)
from lightning_tricks.layers.targets import plain_type
from lightning_tricks.mixins._adapter_trick import trick_named
from lightning_tricks.mixins._method import Method, refuse_other_adapters, require_targets
from lightning_tricks.mixins._order import require_before_lightning_module
from lightning_tricks.mixins.adapter import AdapterMixin

__all__ = ["LoRA", "LoRAMixin"]

_LAYERS: dict[type, type[LowRankLayer]] = {
    nn.Linear: LoRALinear,
    nn.Embedding: LoRAEmbedding,
    nn.Conv1d: LoRAConv1d,
    nn.Conv2d: LoRAConv2d,
}


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Low-rank updates of chosen layers: linear ones (Hugging Face's Conv1D too), embeddings, convolutions.

    Args:
        rank: rank of the update, 1 or more; 4 to 64 in practice. A linear layer gets `rank * (in + out)` parameters.
            Or several, by patterns as in `targets`, of which the first that fits a layer counts:
            `{"query": 16, "*": 4}`.
        alpha: the update is scaled by `alpha / rank`; above 0; often `rank` to `2 * rank`. Or several by patterns.
        targets: the layers, by the last part of their name (`query`), several parts (`self.query`), or a glob
            (`layer.[0-3].*.query`; `*` alone is every linear layer); `"all-linear"`; `"attention"`. Parts of a fused
            projection stand behind a colon: `c_attn:q,v`.
        dropout: probability of dropping an input of the update, in [0, 1); 0 to 0.1 in practice. Linear layers round
            it to a multiple of 1/256.
        rslora: scale by `alpha / sqrt(rank)`, which keeps updates of high rank (64 or more) from fading.
        init: how the first factor starts: `kaiming`; `gaussian`; `pissa`, both factors at the weight's principal part.
        plus: LoRA+: how many times the learning rate of A that of B is, 1 or more, often 16. `parameter_groups` has it.

    Raises:
        MisconfigurationError: if an option is out of its range.

    Example:
        >>> from lightning_tricks.mixins import LoRA
        >>> LoRA(rank=4, alpha=8, targets=("query", "key", "value")).targets
        ('query', 'key', 'value')

    References:
        Hu et al.: LoRA: Low-rank adaptation of large language models (ICLR 2022).
        Kalajdzievski: A rank stabilization scaling factor for fine-tuning with LoRA (2023).
        Hayou, Ghosh, Yu: LoRA+: Efficient low rank adaptation of large models (ICML 2024).
        Meng, Wang, Zhang: PiSSA: Principal singular values and singular vectors adaptation (NeurIPS 2024).
    """

    rank: int | Mapping[str, int] = 8
    alpha: float | Mapping[str, float] = 16.0
    targets: Sequence[str] = ("query", "value")
    dropout: float = 0.0
    rslora: bool = False
    init: Literal["kaiming", "gaussian", "pissa"] = "kaiming"
    plus: float | None = None

    recorded: ClassVar[tuple[str, ...]] = ("rank", "alpha", "rslora", "init")
    decomposed: ClassVar[bool] = False
    packs_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_ranks(self.rank)
        for alpha in self.alpha.values() if isinstance(self.alpha, Mapping) else (self.alpha,):
            if not (math.isfinite(alpha) and alpha > 0):
                raise MisconfigurationError(f"`alpha` must be positive and finite, got {alpha!r}: try twice the rank.")
        if not 0 <= self.dropout < 1:
            raise MisconfigurationError(f"`dropout` must be in [0, 1), got {self.dropout!r}: try 0 or 0.05.")
        if self.init not in ("kaiming", "gaussian", "pissa"):
            raise MisconfigurationError(f"`init` must be kaiming, gaussian or pissa, got {self.init!r}.")
        if self.plus is not None and not (math.isfinite(self.plus) and self.plus >= 1):
            raise MisconfigurationError(f"`plus` must be 1 or more, got {self.plus!r}: try 16.")
        object.__setattr__(self, "targets", require_targets(self.targets))

    def plan(self, module: nn.Module, name: str) -> dict[str, Any]:
        """The layers with their options.

        Raises:
            MisconfigurationError: if a target, a rank's pattern or a rank does not fit.
        """
        targets = find_targets(module, self.targets)
        refuse_other_adapters(targets, name, LowRankLayer)
        plan = {path: (target, self._options(path, target)) for path, target in targets.items()}
        for option, values in (("rank", self.rank), ("alpha", self.alpha)):
            for pattern in values if isinstance(values, Mapping) else ():
                if not any(path_matches(pattern, path) for path in plan):
                    raise MisconfigurationError(
                        f"the {option}'s pattern {pattern!r} fits none of the targets: they are {', '.join(plan)}."
                    )
        return plan

    def attach(self, module: nn.Module, name: str, plan: dict[str, Any]) -> None:
        """Turn the layers into ones with low-rank adapters, and add one to each."""
        for target, options in plan.values():
            layer_class(target.layer).convert(target.layer).add_adapter(name, options)

    def shapes(self, plan: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """Of the factors, and of the lengths of rows. Of whole layers: peft's format knows no parts."""
        found: dict[str, tuple[int, ...]] = {}
        for path, (target, options) in plan.items():
            outputs, inputs = target.sizes()
            table = isinstance(target.layer, nn.Embedding)
            found[f"{path}.lora_A"] = (inputs, options.rank) if table else (options.rank, inputs)
            found[f"{path}.lora_B"] = (options.rank, outputs)
            if self.decomposed:
                found[f"{path}.lora_magnitude"] = (outputs,)
        return found

    def options_by_layer(self) -> dict[str, Any]:
        """The rank and scale of each."""
        return {
            path: LowRank(int(_value("rank", self.rank, path)), _value("alpha", self.alpha, path), rslora=self.rslora)
            for path in self.targets
        }

    def _options(self, path: str, target: Target) -> LowRank:
        _refuse_layer(path, target.layer, self.init, self.decomposed)
        rank, alpha = int(_value("rank", self.rank, path)), float(_value("alpha", self.alpha, path))
        outputs, inputs = target.sizes()
        outputs = min([outputs, *(stop - start for start, stop in target.slices)])
        if rank > min(outputs, inputs):
            raise MisconfigurationError(
                f"`rank` {rank} is above the smaller side of `{path}`, which is {outputs} x {inputs}: an update of "
                f"that rank has more parameters than it can use. Use at most {min(outputs, inputs)}."
            )
        return LowRank(rank, alpha, self.dropout, self.rslora, self.init, target.slices, decomposed=self.decomposed)


def _value(option: str, values: float | Mapping[str, float], path: str) -> float:
    """What an option is for one layer: the first pattern that fits counts."""
    if not isinstance(values, Mapping):
        return values
    for pattern, value in values.items():
        if path_matches(pattern, path):
            return value
    raise MisconfigurationError(
        f"`{option}` says nothing of `{path}`: add a pattern that fits, such as '*', to {dict(values)}."
    )


def require_ranks(rank: Any) -> None:
    """One rank, or several by pattern.

    Raises:
        MisconfigurationError: if one is not a whole number of 1 or more.
    """
    ranks = list(rank.values()) if isinstance(rank, Mapping) else [rank]
    for value in ranks:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise MisconfigurationError(f"`rank` must be a whole number of 1 or more, got {value!r}: try 8.")
    if not ranks:
        raise MisconfigurationError("`rank` must hold at least one pattern, got {}: try 8.")


def layer_class(layer: nn.Module) -> type[LowRankLayer]:
    """What a layer becomes."""
    kind = plain_type(layer)
    if kind in _LAYERS:
        return _LAYERS[kind]
    from lightning_tricks.layers.lora_transposed import LoRATransposed

    return LoRATransposed


def _refuse_layer(path: str, layer: nn.Module, init: str, decomposed: bool) -> None:
    if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.sparse):
        raise MisconfigurationError(
            f"`{path}` has `max_norm` or `sparse`, with which looking up changes the table or its gradient: leave it "
            "out of the targets."
        )
    if isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.groups != 1:
        raise MisconfigurationError(
            f"`{path}` is a convolution in {layer.groups} groups, whose weight is no matrix of low rank: leave it out "
            "of the targets."
        )
    linear = not isinstance(layer, nn.Embedding | nn.Conv1d | nn.Conv2d)
    if not linear and (decomposed or init == "pissa"):
        what = "DoRA" if decomposed else "`init='pissa'`"
        raise MisconfigurationError(f"{what} is for linear layers, and `{path}` is a {type(layer).__name__}.")


class LoRAMixin(AdapterMixin):
    """Fine-tune a LightningModule's encoder, or any module of it, through low-rank adapters.

    It is `AdapterMixin` whose `adapt` takes `LoRA()` when no method is named.

    Example:
        >>> import lightning as L
        >>> import torch
        >>> from lightning_tricks.mixins import LoRA, LoRAMixin
        >>> class Classifier(LoRAMixin, L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.encoder = torch.nn.ModuleDict({"query": torch.nn.Linear(4, 4), "out": torch.nn.Linear(4, 4)})
        ...         self.head = torch.nn.Linear(4, 2)
        ...         self.adapt(self.encoder, LoRA(rank=2, alpha=4, targets=("query",)))
        >>> list(Classifier().state_dict())
        ['encoder.query.lora_A', 'encoder.query.lora_B', 'head.weight', 'head.bias']

    References:
        Hu et al.: LoRA: Low-rank adaptation of large language models (ICLR 2022).
    """

    default_method: ClassVar[type[Method] | None] = LoRA
    trick = trick_named("LoRAMixin")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        require_before_lightning_module(cls, LoRAMixin)
        super().__init_subclass__(**kwargs)
