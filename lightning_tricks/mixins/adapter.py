"""Parameter-efficient fine-tuning of any module inside a LightningModule."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_tricks.engines import Trick
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.layers import adapted_layers, leave_fast_path
from lightning_tricks.mixins import _selection as selection
from lightning_tricks.mixins._adapter_trick import groups, trick_named
from lightning_tricks.mixins._footprint import trainable_report
from lightning_tricks.mixins._frozen_base import FrozenBase
from lightning_tricks.mixins._method import Method
from lightning_tricks.mixins._order import require_before_lightning_module
from lightning_tricks.mixins._records import require_same_records

__all__ = ["AdapterMixin"]

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Base
else:
    _Base = object


@dataclass(frozen=True)
class _Adapter:
    """One adapter of one module: its method, and what else is trained with it."""

    method: Method
    trainable: tuple[str, ...]


class AdapterMixin(_Base):
    """Fine-tune a LightningModule's encoder, or any module of it, through adapters: few parameters beside frozen ones.

    Name it before `LightningModule` among the base classes, and call `adapt` in `__init__` or `configure_model`. The
    adapted module is frozen but for its adapters and what `trainable` names. Checkpoints leave the frozen parameters
    out and hold a fingerprint of each instead: they load strictly onto the same base, and no other.

    One module may hold several adapters by name. The last one adapted is active; `use_adapters` switches.

    Example:
        >>> import lightning as L
        >>> import torch
        >>> from lightning_tricks.mixins import AdapterMixin, LoRA
        >>> class Classifier(AdapterMixin, L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.encoder = torch.nn.ModuleDict({"query": torch.nn.Linear(4, 4), "out": torch.nn.Linear(4, 4)})
        ...         self.head = torch.nn.Linear(4, 2)
        ...         self.adapt(self.encoder, LoRA(rank=2, targets=("query",)))
        ...         self.adapt(self.encoder, LoRA(rank=4, targets=("out",)), name="other")
        >>> module = Classifier()
        >>> module.adapter_names, module.active_adapters
        (('default', 'other'), {'other': 1.0})
        >>> module.use_adapters("default")
        >>> [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        ['encoder.query.lora_A', 'encoder.query.lora_B', 'head.weight', 'head.bias']
    """

    default_method: ClassVar[type[Method] | None] = None
    trick: ClassVar[Trick] = trick_named("AdapterMixin")
    _frozen_base: FrozenBase
    _adapted: dict[str, dict[str, _Adapter]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        require_before_lightning_module(cls, AdapterMixin)

    # -- adapting ------------------------------------------------------------------------------------------------

    def adapt(
        self, module: nn.Module, policy: Method | None = None, trainable: Sequence[str] = (), *, name: str = "default"
    ) -> None:
        """Give `module` an adapter, and freeze the rest of it.

        Doing the same a second time changes nothing, so that it may stand in `configure_model`, which is called more
        than once.

        Args:
            module: a module of `self`, or `self`, with its pretrained weights in place.
            policy: the method with its options: what adapters, where.
            trainable: what else inside `module` is trained: names of parameters or modules, or globs, as in the
                policy's targets (`"pooler"`, `"LayerNorm"`, `"layer.5"`).
            name: of the adapter, an identifier; several adapters of one module have different ones.

        Raises:
            MisconfigurationError: if `module` is not part of `self`, holds another adapter of that name, or a target or
                trainable name selects nothing.
        """
        method = self._method(policy)
        prefix = self._path_of(module)
        adapter = _Adapter(method, tuple(selection.several(trainable)))
        held = self.__dict__.setdefault("_adapted", {}).setdefault(prefix, {})
        if name in held:
            _require_the_same(prefix, name, held[name], adapter)
            return
        try:
            self._attach(module, prefix, adapter, name)
        finally:
            if not held:
                del self._adapted[prefix]

    def _attach(self, module: nn.Module, prefix: str, adapter: _Adapter, name: str) -> None:
        selection.require_identifier(name)
        self._require_unmerged("adapt again")
        plan = adapter.method.plan(module, name)
        kept = selection.trainable(module, adapter.trainable)
        selection.require_values(module, plan)
        held = self._adapted[prefix]
        _require_together(prefix, [*(other.method for other in held.values()), adapter.method])
        if not held:
            module.requires_grad_(False)
        for parameter in kept:
            parameter.requires_grad_(True)
        adapter.method.attach(module, name, plan)
        held[name] = adapter
        self._activate(module, {name: 1.0})
        selection.warn_of_frozen_heads(module)
        leave_fast_path(self)
        self._leave_out(prefix)

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

    def _method(self, policy: Method | None) -> Method:
        if policy is None and self.default_method is not None:
            return self.default_method()
        if not isinstance(policy, Method):
            raise MisconfigurationError(f"`policy` must be a method, such as LoRA(rank=8), got {policy!r}.")
        return policy

    # -- several adapters ----------------------------------------------------------------------------------------

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The names of all adapters, in the order in which they came."""
        return tuple(dict.fromkeys(name for held in self.__dict__.get("_adapted", {}).values() for name in held))

    @property
    def active_adapters(self) -> dict[str, float]:
        """The names of those that have a say, each with its weight; empty while they are disabled."""
        return {name: weight for _, layer in adapted_layers(self) for name, weight in layer.active.items()}

    def use_adapters(self, names: str | Mapping[str, float]) -> None:
        """Let other adapters have a say: one, or several with weights, whose updates are added up.

        Active adapters are trained, others are frozen, with their values in checkpoints all the same.

        Args:
            names: a name, or weights by name: `{"french": 0.7, "legal": 0.3}`.

        Raises:
            MisconfigurationError: if there is no adapter of a name, adapters are merged, a fit is running, or a
                method's adapters cannot be weighted.
        """
        weights = {names: 1.0} if isinstance(names, str) else dict(names)
        unknown = [name for name in weights if name not in self.adapter_names]
        if unknown or not weights:
            known, asked = ", ".join(self.adapter_names), unknown[0] if unknown else weights
            raise MisconfigurationError(f"there is no adapter {asked!r}: there are {known}.")
        self._require_unmerged("switch")
        if self._is_fitting():
            raise MisconfigurationError(
                "a fit is running, whose optimizer holds the active adapters' parameters: switch between fits, or use "
                "`adapters_disabled()`."
            )
        for prefix, held in self._adapted.items():
            if here := {name: weight for name, weight in weights.items() if name in held}:
                self._activate(self.get_submodule(prefix), here)
            else:
                self._activate(self.get_submodule(prefix), {})

    @contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        """Compute as the base alone would, inside a `with` block.

        Raises:
            MisconfigurationError: if adapters are merged, or the method cannot be switched off.
        """
        self._require_unmerged("disable them")
        self._require("be switched off", "switchable")
        before = [(layer, layer.active) for _, layer in adapted_layers(self)]
        try:
            for layer, _ in before:
                layer.active = {}
            yield
        finally:
            for layer, active in before:
                layer.active = active

    def _activate(self, module: nn.Module, weights: dict[str, float]) -> None:
        layers = [layer for _, layer in adapted_layers(module)]
        for layer in layers:
            layer.check_weights(weights)
        for layer in layers:
            layer.activate(weights)

    # -- merging -------------------------------------------------------------------------------------------------

    def merge_adapters(self) -> None:
        """Put the active adapters into the base's own weights: inference then costs what the base's does.

        The weights they replace are kept, for `unmerge_adapters`. Merged modules are not saved, trained or switched.

        Raises:
            MisconfigurationError: if they are merged already, a method cannot be merged, a weight is shared with
                another layer, or it is sharded.
        """
        self._require_unmerged("merge again")
        self._require("be merged", "mergeable")
        selection.require_mergeable(self)
        for _, layer in adapted_layers(self):
            layer.merge()

    def unmerge_adapters(self) -> None:
        """Take the adapters out again: the base's weights get the bytes back that they had.

        Raises:
            MisconfigurationError: if nothing is merged.
        """
        if not self.adapters_merged:
            raise MisconfigurationError("no adapters are merged: there is nothing to unmerge.")
        for _, layer in adapted_layers(self):
            layer.unmerge()

    @property
    def adapters_merged(self) -> bool:
        """Whether adapters are merged now."""
        return any(layer.merged is not None for _, layer in adapted_layers(self))

    # -- optimizers ----------------------------------------------------------------------------------------------

    def parameter_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """The trained parameters as an optimizer's groups, with LoRA+'s learning rates if `LoRA(plus=...)` asks so.

        Every group has the weight decay, and none is empty.

        Args:
            lr: learning rate of all but LoRA+'s B, whose is `plus` times as high.
            weight_decay: of every group.

        Example:
            `torch.optim.AdamW(self.parameter_groups(lr=1e-4, weight_decay=0.01))`
        """
        return groups(self, lr, weight_decay)

    # -- files ---------------------------------------------------------------------------------------------------

    def save_adapter(self, folder: str | Path, *, name: str = "default") -> None:
        """Write one adapter as `peft.PeftModel.from_pretrained` loads it, and a fingerprint of its base. Collective.

        Args:
            folder: gets `adapter_config.json`, `adapter_model.safetensors` and `lightning_tricks.json`.
            name: which adapter.

        Raises:
            MisconfigurationError: if there is no such adapter, adapters are merged, or peft has no such method.
            CheckpointError: if the disk refuses it.
        """
        self._require_unmerged("save")
        adapter_files().save_adapter(self, Path(folder), name)

    def load_adapter(self, folder: str | Path, *, name: str = "default", module: nn.Module) -> None:
        """Read an adapter that peft or `save_adapter` wrote, and make it the active one.

        Args:
            folder: where it is.
            name: what it is called here. An adapter of that name gets the values; otherwise `module` is adapted.
            module: the module of `self` that is its base.

        Raises:
            CheckpointError: if a file is missing or malformed, the type unknown, or the base another one; the first
                tensor that differs is named.
            MisconfigurationError: if adapters are merged.
        """
        self._require_unmerged("load")
        adapter_files().load_adapter(self, Path(folder), name, module)

    def export_merged(self, path: str | Path, *, module: nn.Module) -> None:
        """Write `module` with the active adapters in its weights, as one plain safetensors file. Changes nothing.

        Args:
            path: of the file, ending in `.safetensors`.
            module: an adapted module of `self`; its keys in the file are its own.

        Raises:
            MisconfigurationError: if a weight is sharded or shared with another layer.
            CheckpointError: if the disk refuses it.
        """
        selection.require_mergeable(self)
        adapter_files().export_merged(Path(path), module)

    # -- hooks ---------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Say what is trained, and look at the base anew: it may have been replaced since the last run.

        Raises:
            MisconfigurationError: if a fit begins while adapters are merged.
        """
        super().setup(stage)
        if stage == "fit":
            self._require_unmerged("train")
            if "_adapted" in self.__dict__:
                rank_zero_info(f"{type(self).__name__}: {trainable_report(self)}")
        if "_frozen_base" in self.__dict__:
            self._frozen_base.forget()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record the adapters' options and what they were trained on. Collective."""
        super().on_save_checkpoint(checkpoint)
        if "_frozen_base" in self.__dict__:
            record = checkpoint.setdefault("lightning_tricks", {})
            record["base"] = self._frozen_base.fingerprints(self)
            record["adapters"] = self._records()

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
        require_same_records(self._records(), record)

    def _records(self) -> dict[str, dict[str, Any]]:
        return {
            prefix: {
                name: {"method": type(adapter.method).__name__, **adapter.method.record()}
                for name, adapter in held.items()
            }
            for prefix, held in self.__dict__.get("_adapted", {}).items()
        }

    # -- help ----------------------------------------------------------------------------------------------------

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

    def _require_unmerged(self, what: str) -> None:
        if self.adapters_merged:
            raise MisconfigurationError(f"adapters are merged: call `unmerge_adapters()` before you {what}.")

    def _require(self, what: str, ability: str) -> None:
        methods = [adapter.method for held in self.__dict__.get("_adapted", {}).values() for adapter in held.values()]
        for method in methods:
            if not getattr(method, ability):
                raise MisconfigurationError(f"{type(method).__name__} cannot {what}: {method.reason}")

    def _is_fitting(self) -> bool:
        trainer = getattr(self, "_trainer", None)
        return trainer is not None and (trainer.state.fn, trainer.state.status) == ("fit", "running")


def adapter_files() -> Any:
    """The files' code knows every method, and methods know this mixin: it is imported when it is needed."""
    return import_module("lightning_tricks.mixins._adapter_files")


def _require_together(prefix: str, methods: list[Method]) -> None:
    for method in methods:
        if len(methods) > 1 and not method.switchable:
            raise MisconfigurationError(
                f"`{prefix}` cannot hold {type(method).__name__} and another adapter: {method.reason}"
            )


def _require_the_same(prefix: str, name: str, before: _Adapter, now: _Adapter) -> None:
    if before != now:
        raise MisconfigurationError(
            f"`{prefix}` has been adapted already under the name {name!r}, with {before.method} and trainable="
            f"{before.trainable}, and cannot be with {now.method} and trainable={now.trainable} as well: give the "
            "second another `name`."
        )
