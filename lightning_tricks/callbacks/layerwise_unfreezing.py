"""Fine-tune the top layer first, then one layer more at a time, each with a learning rate of its own."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lightning_tricks.callbacks._base import TrickCallback
from lightning_tricks.callbacks._layer_groups import LAYER, rearrange, split_by_layer
from lightning_tricks.callbacks._layers import Order, find_layers, ids_by_layer
from lightning_tricks.callbacks._patience import Epochs, Steps
from lightning_tricks.callbacks._selection import plain_name
from lightning_tricks.callbacks._sparing import Sparing
from lightning_tricks.engines import InUse, Rule, Situation, Trick, rival
from lightning_tricks.errors import CheckpointError, MisconfigurationError

__all__ = ["LayerwiseUnfreezing"]

log = logging.getLogger(__name__)


def _several_optimizers(now: Situation, _: InUse) -> Mapping[str, object] | None:
    return {"count": len(now.optimizers)} if len(now.optimizers) > 1 else None


def _by_hand(now: Situation, _: InUse) -> Mapping[str, object] | None:
    return {} if not now.module.automatic_optimization else None


class LayerwiseUnfreezing(TrickCallback):
    """Trains the top layer first and thaws one layer more at a time; what was thawed is never frozen again.

    A frozen layer's weights do not move, weight decay included; it has neither moments nor a step count, so that Adam's
    bias correction begins when it thaws; and no norm, and so no clipping, counts its gradients. On one device they are
    not computed; engines of several ranks compute and drop them. Buffers are not frozen: the statistics of a batch
    normalisation follow the batches. Parameters that require no gradient before the fit, such as the base of an
    adapter, stay frozen.

    Each layer gets a parameter group of its own, cut from those of the module's optimizer, whose settings it keeps.
    Schedules of torch's follow. Each step logs `unfreezing/layers`, the number of layers in training.

    Args:
        schedule: when a layer more is thawed: after every `Epochs(n)`, or every `Steps(n)` as Lightning counts them in
            `trainer.global_step`. An epoch is the paper's choice.
        order: the layers from top to bottom, each a prefix of parameter names (`encoder.layer.11`), a pattern
            (`*.layer.11.*`), or a list of such; None: the model's repeated blocks from the last registered to the
            first, what is registered after them above and what comes before them below.
        factor: each layer's learning rate is the one above it divided by this, 1 or more; the paper's is 2.6.
        start: how many layers are in training from the first step, 1 or more.

    Raises:
        MisconfigurationError: if an option is out of range, or, before the first step, if a trained parameter is in no
            layer or in two, a pattern selects none, or a layer has none in the optimizer.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_tricks.callbacks import Epochs, LayerwiseUnfreezing
        >>> unfreezing = LayerwiseUnfreezing(Epochs(1), order=["head", "encoder.1", "encoder.0"], factor=2.6)
        >>> trainer = Trainer(callbacks=[unfreezing], accelerator="cpu", logger=False)

    References:
        Howard, Ruder: Universal Language Model Fine-tuning for Text Classification (ACL 2018).
    """

    trick: ClassVar[Trick] = Trick(
        jobs=("freeze layers",),
        needs=("leave_out",),
        rules=(
            Rule(
                when=rival("freeze layers"),
                verdict="refused",
                words="{trick} and {other} both freeze layers",
                remedy="keep one",
            ),
            Rule(
                when=_by_hand,
                verdict="refused",
                words="under manual optimisation {trick} cannot tell which steps are those of the layers",
                remedy="use automatic optimisation",
            ),
            Rule(
                when=_several_optimizers,
                verdict="refused",
                words="{trick} counts the steps of one optimizer, and there are {count}",
                remedy="put all parameters into the parameter groups of one",
                known="built",
            ),
        ),
    )
    place: ClassVar[int | None] = -1  # before anyone asks for a norm

    def __init__(
        self,
        schedule: Epochs | Steps | None = None,
        *,
        order: Order | None = None,
        factor: float = 1.0,
        start: int = 1,
    ) -> None:
        super().__init__()
        if schedule is not None and not isinstance(schedule, Epochs | Steps):
            raise MisconfigurationError(f"`schedule` must be `Epochs(n)` or `Steps(n)`, got {schedule!r}.")
        if not (math.isfinite(factor) and factor >= 1):
            raise MisconfigurationError(f"`factor` must be a finite number, 1 or more, got {factor!r}; 2.6 is usual.")
        if isinstance(start, bool) or not isinstance(start, int) or start < 1:
            raise MisconfigurationError(f"`start` must be a whole number of layers, 1 or more, got {start!r}.")
        _refuse_order(order)
        self.schedule = Epochs(1) if schedule is None else schedule
        self.order = order
        self.factor = factor
        self.start = start
        self.layers: dict[str, list[str]] = {}
        self.thawed = start
        self._saved: list[str] | None = None
        self._leave: Callable[[], None] = lambda: None
        self._sparing: Sparing | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The optimizer is built: let go of the module, and see that every layer has a group."""
        self._leave()
        super().on_fit_start(trainer, pl_module)
        found = {group.get(LAYER) for optimizer in trainer.optimizers for group in optimizer.param_groups}
        missing = [name for depth, name in enumerate(self.layers) if depth not in found]
        if missing or not self.layers:
            raise MisconfigurationError(
                f"the layer `{missing[0] if missing else '...'}` has no parameter group of its own in the optimizer:"
                " return an optimizer that holds its parameters from `configure_optimizers`. (DeepSpeed merges the"
                " groups of torch's Adagrad, and builds an optimizer of its configuration without them.)"
            )
        if self.start >= len(self.layers):
            raise MisconfigurationError(
                f"`start={self.start}` leaves nothing to unfreeze: {type(pl_module).__name__} has"
                f" {len(self.layers)} layers of trained parameters."
            )
        if not self.engine.awaits_gradients():
            named = {plain_name(name): own for name, own in pl_module.named_parameters(remove_duplicate=False)}
            self._sparing = Sparing(pl_module, lambda: [named[name] for name in self._frozen()])
        if self.engine.rank == 0:
            log.info("LayerwiseUnfreezing: from top to bottom, %s.", "; ".join(self.layers))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A checkpoint of other layers has moments in other groups."""
        if self._saved is not None and self._saved != list(self.layers):
            raise CheckpointError(
                f"the checkpoint was saved with the layers {self._saved}, and this fit has {list(self.layers)}: pass"
                " the same `order`, or start from its weights alone."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Thaw what is due: once in a window, since neither epochs nor steps go on within one."""
        self.thawed = max(self.thawed, self._due(trainer))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Leave the frozen layers out of this step."""
        if not self.engine.is_optimizer_step():
            return
        pl_module.log("unfreezing/layers", float(self.thawed), on_step=True, on_epoch=False)
        if frozen := self._frozen():
            self.engine.leave_out(optimizer, frozen)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on all layers require gradients again."""
        self._end_sparing()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Also where the training step returned nothing, so that there was no backward pass."""
        self._end_sparing()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module as it was found."""
        self._leave_module()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was found."""
        self._leave_module()

    def _frozen(self) -> list[str]:
        """The names of the parameters that are frozen now."""
        return [name for names in list(self.layers.values())[self.thawed :] for name in names]

    def _end_sparing(self) -> None:
        if self._sparing is not None:
            self._sparing.end()

    def _leave_module(self) -> None:
        self._leave()
        if self._sparing is not None:
            self._sparing.leave()
            self._sparing = None

    def _due(self, trainer: Trainer) -> int:
        """How many layers are in training by now."""
        passed = trainer.current_epoch if isinstance(self.schedule, Epochs) else trainer.global_step
        return min(len(self.layers), self.start + passed // self.schedule.n)

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave_module()
        self.layers, self.thawed, self._saved = {}, self.start, None

        def split(configured: Any) -> None:
            """Once the module has all of its parameters, those of `configure_model` included."""
            self.layers = find_layers(pl_module, self.order)
            split_by_layer(configured, ids_by_layer(pl_module, self.layers), self.factor)

        self._leave = rearrange(pl_module, split)

    def _capture(self) -> dict[str, Any]:
        return {"thawed": self.thawed, "layers": list(self.layers)}

    def _restore(self, state: dict[str, Any]) -> None:
        self.thawed, self._saved = max(self.start, state["thawed"]), state["layers"]


def _refuse_order(order: Any) -> None:
    if order is None:
        return
    whole = isinstance(order, Sequence) and not isinstance(order, str) and len(order) > 0
    if not whole or not all(isinstance(name, str) and name for layer in order for name in _names(layer)):
        raise MisconfigurationError(
            f"`order` must be a list of prefixes or patterns, or of lists of such, from top to bottom, got {order!r}:"
            " for instance ['head', 'encoder.1', 'encoder.0']."
        )


def _names(layer: Any) -> Sequence[Any]:
    """The patterns of one layer; none is as wrong as what is no pattern."""
    return layer if isinstance(layer, list | tuple) and layer else [layer]
