"""Low-rank adaptation of any module inside a LightningModule."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_tricks.engines import Trick
from lightning_tricks.errors import CheckpointError, MisconfigurationError
from lightning_tricks.functional import path_matches
from lightning_tricks.layers import LoRALinear, find_linears, leave_fast_path
from lightning_tricks.mixins._frozen_base import FrozenBase
from lightning_tricks.mixins._order import require_before_lightning_module

__all__ = ["LoRA", "LoRAMixin"]

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Base
else:
    _Base = object


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """How `LoRAMixin.adapt` adapts: which linear layers, and with what update.

    Args:
        rank: rank of the update, 1 or more; 4 to 64 in practice. A layer gets `rank * (in + out)` parameters.
        alpha: the update is scaled by `alpha / rank`; above 0; often `rank` to `2 * rank`.
        targets: the layers, by the last part of their name (`query`), several parts (`self.query`), or a glob
            (`layer.[0-3].*.query`; `*` alone is every linear layer).
        dropout: probability of dropping an input of the update, in [0, 1); 0 to 0.1 in practice.

    Raises:
        MisconfigurationError: if an option is out of its range.

    Example:
        >>> from lightning_tricks.mixins import LoRA
        >>> LoRA(rank=4, alpha=8, targets=("query", "key", "value"))
        LoRA(rank=4, alpha=8, targets=('query', 'key', 'value'), dropout=0.0)

    References:
        Hu et al.: LoRA: Low-rank adaptation of large language models (ICLR 2022).
    """

    rank: int = 8
    alpha: float = 16.0
    targets: Sequence[str] = ("query", "value")
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise MisconfigurationError(f"`rank` must be a whole number of 1 or more, got {self.rank!r}: try 8.")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise MisconfigurationError(f"`alpha` must be positive and finite, got {self.alpha!r}: try twice the rank.")
        if not 0 <= self.dropout < 1:
            raise MisconfigurationError(f"`dropout` must be in [0, 1), got {self.dropout!r}: try 0 or 0.05.")
        if isinstance(self.targets, str):
            raise MisconfigurationError(f"`targets` must be several names, got one: write targets=({self.targets!r},).")
        object.__setattr__(self, "targets", tuple(self.targets))
        if not self.targets or not all(isinstance(target, str) and target for target in self.targets):
            raise MisconfigurationError(
                f'`targets` must name at least one layer, got {self.targets!r}: try ("query", "value"), or ("*",).'
            )


class LoRAMixin(_Base):
    """Fine-tune a LightningModule's encoder, or any module of it, through low-rank adapters.

    Name it before `LightningModule` among the base classes, and call `adapt` in `__init__` or `configure_model`. The
    adapted module is frozen but for its adapters and what `trainable` names. Checkpoints leave the frozen parameters
    out and hold a fingerprint of each instead: they load strictly onto the same base, and no other.

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

    trick: ClassVar[Trick] = Trick(jobs=("adapt weights",), used=lambda module: "_lora" in vars(module))
    _frozen_base: FrozenBase
    _lora: dict[str, dict[str, Any]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        require_before_lightning_module(cls, LoRAMixin)

    def adapt(self, module: nn.Module, policy: LoRA, trainable: Sequence[str] = ()) -> None:
        """Give the linear layers of `module` that `policy` targets an adapter, and freeze the rest of it.

        Doing the same a second time changes nothing, so that it may stand in `configure_model`, which is called more
        than once.

        Args:
            module: a module of `self`, or `self`, with its pretrained weights in place.
            policy: what adapters, where.
            trainable: what else inside `module` is trained: names of parameters or modules, or globs, as in the
                policy's targets (`"pooler"`, `"LayerNorm"`, `"layer.5"`).

        Raises:
            MisconfigurationError: if `module` is not part of `self`, has been adapted otherwise, or a target or
                trainable name selects nothing.
        """
        prefix = self._path_of(module)
        options = {**asdict(policy), "trainable": tuple(_several(trainable))}
        adapted = self.__dict__.setdefault("_lora", {})
        if prefix in adapted:
            _require_the_same(prefix, adapted[prefix], options)
            return
        layers = find_linears(module, policy.targets)
        kept = _trainable(module, options["trainable"])
        _require_values(layers)
        module.requires_grad_(False)
        for parameter in kept:
            parameter.requires_grad_(True)
        for layer in layers.values():
            LoRALinear.extend(layer, rank=policy.rank, alpha=policy.alpha, dropout=policy.dropout)
        leave_fast_path(self)
        self._leave_out(prefix)
        adapted[prefix] = options

    def freeze_base(self, module: nn.Module) -> None:
        """Freeze `module` without adapters: checkpoints leave it out, and hold a fingerprint of it, all the same.

        Args:
            module: a module of `self`, with its pretrained weights in place.

        Raises:
            MisconfigurationError: if `module` is not part of `self`.
        """
        prefix = self._path_of(module)
        module.requires_grad_(False)
        self._leave_out(prefix)

    def setup(self, stage: str) -> None:
        """Look at the base anew: it may have been replaced since the last run."""
        super().setup(stage)
        if "_frozen_base" in self.__dict__:
            self._frozen_base.forget()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record the adapters' options and what they were trained on. Collective."""
        super().on_save_checkpoint(checkpoint)
        if "_frozen_base" in self.__dict__:
            record = checkpoint.setdefault("lightning_tricks", {})
            record["base"] = self._frozen_base.fingerprints(self)
            record["lora"] = {
                prefix: {"rank": options["rank"], "alpha": float(options["alpha"])}
                for prefix, options in self.__dict__.get("_lora", {}).items()
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse adapters that were trained on another base, or with another rank or scale. Collective.

        Raises:
            CheckpointError: naming the first tensor, or the option, that differs.
        """
        super().on_load_checkpoint(checkpoint)
        if "_frozen_base" not in self.__dict__:
            return
        record = checkpoint.get("lightning_tricks", {})
        if "base" not in record:
            rank_zero_warn("This checkpoint does not say which base model it was trained on: it may not be this one.")
            return
        self._frozen_base.verify(self, record["base"], checkpoint.get("state_dict", ()))
        _require_same_options(self.__dict__.get("_lora", {}), record.get("lora", {}))

    def _leave_out(self, prefix: str) -> None:
        if "_frozen_base" not in self.__dict__:
            self._frozen_base = FrozenBase(self)
        self._frozen_base.add(prefix)

    def _path_of(self, module: nn.Module) -> str:
        for name, candidate in self.named_modules():
            if candidate is module:
                return str(name)
        raise MisconfigurationError(
            f"the {type(module).__name__} to adapt is not a module of {type(self).__name__}: assign it first, as in "
            "`self.encoder = encoder; self.adapt(self.encoder, ...)`."
        )


def _several(names: Sequence[str]) -> Sequence[str]:
    if isinstance(names, str):
        raise MisconfigurationError(f"`trainable` must be several names, got one: write trainable=({names!r},).")
    return names


def _require_the_same(prefix: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    if before != now:
        raise MisconfigurationError(
            f"`{prefix}` has been adapted already, with {before}, and cannot be with {now} as well: call `adapt` once."
        )


def _require_same_options(adapted: dict[str, dict[str, Any]], recorded: dict[str, dict[str, Any]]) -> None:
    for prefix, options in recorded.items():
        for option, value in options.items():
            here = adapted.get(prefix, {}).get(option)
            if here != value:
                raise CheckpointError(
                    f"`{prefix}` was adapted with {option}={value:g} in this checkpoint, here with {option}={here}: "
                    "adapt it with the options that the checkpoint was trained with."
                )


def _require_values(layers: dict[str, nn.Linear]) -> None:
    for name, layer in layers.items():
        if layer.weight.is_meta or hasattr(layer.weight, "device_mesh"):
            state = "on the meta device, without values" if layer.weight.is_meta else "sharded already"
            raise MisconfigurationError(
                f"the weight of `{name}` is {state}: call `adapt` in `__init__` or `configure_model`, once the "
                "pretrained weights are loaded and before the strategy shards them."
            )


def _trainable(module: nn.Module, patterns: Sequence[str]) -> list[nn.Parameter]:
    """The parameters of `module` that patterns select, by their own name or that of a module around them."""
    kept = []
    for pattern in patterns:
        selected = [
            p for name, p in module.named_parameters() if any(path_matches(pattern, path) for path in _paths(name))
        ]
        if not selected:
            parts = ", ".join(name for name, _ in module.named_children())
            raise MisconfigurationError(
                f"trainable {pattern!r} selects no parameter of {type(module).__name__}, whose modules are: {parts}. "
                "What is outside the adapted module is trained anyway."
            )
        kept += selected
    return kept


def _paths(name: str) -> list[str]:
    """`a.b.c` and the modules around it: `a`, `a.b`."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
