"""What a module with adapters does when it is set up, saved and loaded."""

from typing import TYPE_CHECKING, Any, Self

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_tricks.mixins._adapter_trick import warn_of_unused_ratio
from lightning_tricks.mixins._adapting import Adapter, records
from lightning_tricks.mixins._footprint import trainable_report
from lightning_tricks.mixins._frozen_base import FrozenBase
from lightning_tricks.mixins._frozen_norms import keep_norms_still
from lightning_tricks.mixins._records import require_same_records
from lightning_tricks.mixins._selection import require_unmerged

__all__ = ["AdapterCheckpoints"]

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Base
else:
    _Base = object


class AdapterCheckpoints(_Base):
    """The LightningModule's hooks of `AdapterMixin`: checkpoints without the base, that recognise it."""

    _frozen_base: FrozenBase
    _adapted: dict[str, dict[str, Adapter]]
    _fit_began: bool

    def train(self, mode: bool = True) -> Self:
        """Set the mode, but for batch normalisations of a frozen base, which keep the statistics that they have."""
        super().train(mode)
        if mode and "_frozen_base" in self.__dict__:
            for prefix in self._frozen_base.prefixes:
                keep_norms_still(self.get_submodule(prefix))
        return self

    def on_fit_start(self) -> None:
        """Say what is trained, now that `configure_model` has had its say as well."""
        super().on_fit_start()
        self._fit_began = True
        if "_adapted" in self.__dict__:
            rank_zero_info(f"{type(self).__name__}: {trainable_report(self)}")

    def setup(self, stage: str) -> None:
        """Look at the base anew: it may have been replaced since the last run.

        Raises:
            MisconfigurationError: if a fit begins while adapters are merged.
        """
        super().setup(stage)
        self._fit_began = False
        if stage == "fit":
            require_unmerged(self, "train")
        if "_frozen_base" in self.__dict__:
            self._frozen_base.forget()

    def on_train_start(self) -> None:
        """Look at what the optimizer was made of."""
        super().on_train_start()
        warn_of_unused_ratio(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record the adapters' options and what they were trained on. Collective."""
        super().on_save_checkpoint(checkpoint)
        if "_frozen_base" in self.__dict__:
            record = checkpoint.setdefault("lightning_tricks", {})
            record["base"] = self._frozen_base.fingerprints(self)
            record["adapters"] = records(self)

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
        require_same_records(records(self), record)
