"""Parameter-efficient fine-tuning of any module inside a LightningModule."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from lightning_tricks.engines import Trick
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.layers import adapted_layers
from lightning_tricks.mixins import _adapting as adapting
from lightning_tricks.mixins import _selection as selection
from lightning_tricks.mixins import _switching as switching
from lightning_tricks.mixins._adapter_checkpoints import AdapterCheckpoints
from lightning_tricks.mixins._adapter_trick import groups, trick_named
from lightning_tricks.mixins._adapting import Adapter
from lightning_tricks.mixins._method import Method
from lightning_tricks.mixins._order import require_before_lightning_module
from lightning_tricks.mixins._small_base import Base

__all__ = ["AdapterMixin"]


class AdapterMixin(AdapterCheckpoints):
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

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        require_before_lightning_module(cls, AdapterMixin)

    # -- adapting ------------------------------------------------------------------------------------------------

    def adapt(
        self,
        module: nn.Module,
        policy: Method | None = None,
        trainable: Sequence[str] = (),
        *,
        name: str = "default",
        base: Base | None = None,
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
            base: how LoRA or DoRA keep the frozen weights of their targets: `nf4` (4 bits, as in QLoRA), `int8`,
                `bf16`; None: as they are. The rest of `module` stays as it is.

        Raises:
            MisconfigurationError: if `module` is not part of `self`, holds another adapter of that name, a target or
                trainable name selects nothing, or a target cannot be kept as `base` says.
        """
        adapting.adapt(self, module, Adapter(self._method(policy), tuple(selection.several(trainable)), base), name)

    def freeze_base(self, module: nn.Module) -> None:
        """Freeze `module` without adapters: checkpoints leave it out, and hold a fingerprint of it, all the same.

        Args:
            module: a module of `self`, with its pretrained weights in place.

        Raises:
            MisconfigurationError: if `module` is not part of `self`.
        """
        prefix = adapting.path_of(self, module)
        module.requires_grad_(False)
        adapting.leave_out(self, prefix)

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
        switching.use(self, {names: 1.0} if isinstance(names, str) else dict(names))

    def adapters_disabled(self) -> AbstractContextManager[None]:
        """Compute as the base alone would, inside a `with` block.

        Raises:
            MisconfigurationError: if adapters are merged, or the method cannot be switched off.
        """
        return switching.disabled(self)

    # -- merging -------------------------------------------------------------------------------------------------

    def merge_adapters(self) -> None:
        """Put the active adapters into the base's own weights: inference then costs what the base's does.

        The weights they replace are kept, for `unmerge_adapters`. Merged modules are not saved, trained or switched.

        Raises:
            MisconfigurationError: if they are merged already, a method cannot be merged, a weight is shared with
                another layer, or it is sharded, or kept in few bits.
        """
        selection.require_unmerged(self, "merge again")
        selection.require_ability(self, "be merged", "mergeable")
        selection.require_mergeable(self)
        selection.require_unpacked(self)
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
        selection.require_unmerged(self, "save")
        adapter_files().save_adapter(self, Path(folder), name)

    def load_adapter(
        self, folder: str | Path, *, name: str = "default", module: nn.Module, base: Base | None = None
    ) -> None:
        """Read an adapter that peft or `save_adapter` wrote, and make it the active one. A refusal changes nothing.

        Args:
            folder: where it is.
            name: what it is called here. An adapter of that name, of the same places and scales, gets the values;
                otherwise `module` is adapted.
            module: the module of `self` that is its base.
            base: as in `adapt`, if `module` is adapted.

        Raises:
            CheckpointError: if a file is missing or malformed, the type or an option unknown, or base or
                adapter are others here; the first tensor or layer that differs is named.
            MisconfigurationError: if adapters are merged, a layer cannot be adapted, or a strategy has the module.
        """
        selection.require_unmerged(self, "load")
        adapter_files().load_adapter(self, Path(folder), name, module, base)

    def export_merged(self, path: str | Path, *, module: nn.Module) -> None:
        """Write `module` with the active adapters in its weights, as one plain safetensors file. Changes nothing.

        Collective; rank 0 writes.

        Args:
            path: of the file, ending in `.safetensors`.
            module: an adapted module of `self`; its keys in the file are its own.

        Raises:
            MisconfigurationError: if an active adapter cannot be merged, or a weight is sharded or shared.
            CheckpointError: if the disk refuses it.
        """
        selection.require_in_weights(self, module)
        selection.require_mergeable(self)
        adapter_files().export_merged(Path(path), module)


def adapter_files() -> Any:
    """The files' code knows every method, and methods know this mixin: it is imported when it is needed."""
    return import_module("lightning_tricks.mixins._adapter_files")
