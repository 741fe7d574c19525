"""Measure gradient norms: log them, keep their quantiles, and say which limit for clipping they support."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_tricks.callbacks._base import TrickCallback
from lightning_tricks.callbacks._norm_plot import plot_norms
from lightning_tricks.callbacks._norm_series import NormSeries, Suggestion
from lightning_tricks.callbacks._selection import none_selected, selected, trained_names
from lightning_tricks.callbacks._update_ratio import UpdateRatio
from lightning_tricks.engines import Trick
from lightning_tricks.errors import MisconfigurationError

__all__ = ["GradientNormMonitor"]

log = logging.getLogger(__name__)
TAKEN = ("total", "limit", "clipped", "clipped_share")


class GradientNormMonitor(TrickCallback):
    """Logs the gradient norm of the model and of parts of it, before clipping, on every engine alike.

    Logged are `grad_norm/total`, `grad_norm/<group>` for each group, and, where something logs `grad_norm/limit` as
    `GradientClipping` does, the share of clipped steps at the end of an epoch, `grad_norm/clipped_share`. With several
    optimizers each has norms of its own, and the names end in `/optimizer_<index>`. The end of a fit prints the limit
    that the norms support. Dropped steps, and norms that are not finite, are in no quantile.

    Args:
        groups: parts of the model: a prefix of parameter names (`encoder`, `encoder.layer.0`) or a pattern
            (`*.attention.*`) each; or a mapping from the names to log to such.
        every_n_steps: optimizer steps from one measurement to the next, 1 or more.
        update_ratio_every: optimizer steps from one measurement of `update_ratio/total` and `update_ratio/<group>` to
            the next: the norm of what a step changes over that of the weights, 1e-3 in a healthy training by Adam. It
            takes a copy of this rank's weights for the time of that step; None: it is not measured.

    Raises:
        MisconfigurationError: if `every_n_steps` or `update_ratio_every` is not a whole number above 0, or a group
            selects no trained parameter or takes a name that is logged already.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_tricks.callbacks import GradientNormMonitor
        >>> monitor = GradientNormMonitor(every_n_steps=1)
        >>> trainer = Trainer(callbacks=[monitor], accelerator="cpu", logger=False)
        >>> monitor.suggest().reason
        '0 gradient norms are too few to suggest a limit: 100 are needed'

    References:
        Pascanu, Mikolov, Bengio: On the difficulty of training recurrent neural networks (ICML 2013), which looks at
        the norm's usual range first.
    """

    trick: ClassVar[Trick] = Trick(jobs=("measure gradients",), needs=("gradient_norm", "gradient_norms"))
    place: ClassVar[int | None] = 1

    def __init__(
        self,
        *,
        groups: Mapping[str, str] | Sequence[str] | None = None,
        every_n_steps: int = 1,
        update_ratio_every: int | None = None,
    ) -> None:
        super().__init__()
        _check_interval("every_n_steps", every_n_steps, "1 measures every step.")
        if update_ratio_every is not None:
            _check_interval("update_ratio_every", update_ratio_every, "None measures none, 100 is usual.")
            needs = (*self.trick.needs, "named_shards")
            vars(self)["trick"] = Trick(jobs=self.trick.jobs, needs=needs)  # this very instance's
        self.groups = dict(groups) if isinstance(groups, Mapping) else {pattern: pattern for pattern in groups or ()}
        if taken := [name for name in self.groups if name in TAKEN]:
            raise MisconfigurationError(
                f"the group `{taken[0]}` would be logged as `grad_norm/{taken[0]}`, which is something else: pass a"
                " mapping from another name to its pattern."
            )
        self.every_n_steps = every_n_steps
        self.update_ratio_every = update_ratio_every
        self._update: UpdateRatio | None = None
        self._step = 0  # whose update is measured
        self._series: dict[int, NormSeries] = {}
        self._members: dict[str, list[str]] = {}
        self._measured: list[tuple[int, Tensor, str, int]] = []

    def suggest(self, optimizer: int = 0) -> Suggestion:
        """The limit for clipping that the norms support: their 95th percentile, from 100 on.

        Args:
            optimizer: which one's norms, where there are several.
        """
        return self._of(optimizer).suggestion()

    def quantiles(self, q: Sequence[float], optimizer: int = 0) -> list[float]:
        """The norms below which these shares of the steps lie, from 0 to 1; within 1% of a rank at a million steps."""
        series = self._of(optimizer)
        series.settle()
        found: list[float] = series.sketch.quantiles(q).tolist()
        return found

    def plot(self, ax: Any = None, optimizer: int = 0) -> tuple[Any, Any]:
        """Draw the norm over steps, its usual range, the limit of clipping and skipped steps.

        Args:
            ax: matplotlib axes to draw into; None: those of a new figure.
            optimizer: which one's norms, where there are several.

        Returns:
            The figure and the axes.

        Raises:
            MissingDependencyError: without matplotlib.
        """
        return plot_norms(self._of(optimizer), ax)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find each group's parameters."""
        super().on_fit_start(trainer, pl_module)
        names = trained_names(pl_module)
        self._members = {group: selected(pattern, names) for group, pattern in self.groups.items()}
        if empty := [group for group, members in self._members.items() if not members]:
            raise none_selected("the group", self.groups[empty[0]], pl_module, names)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Copy the weights before a step whose update is measured."""
        every = self.update_ratio_every
        if every is not None and self._update is None and trainer.global_step % every == 0:
            self._update, self._step = UpdateRatio(self.engine, self._members), trainer.global_step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure and log before anything is clipped; nothing is read back."""
        if not self.engine.is_optimizer_step():
            return
        index = trainer.optimizers.index(optimizer)
        series = self._of(index)
        series.seen += 1
        if (series.seen - 1) % self.every_n_steps:
            return
        suffix = f"/optimizer_{index}" if len(trainer.optimizers) > 1 else ""
        norm = self.engine.gradient_norm(optimizer)
        norms = {"total": norm, **self.engine.gradient_norms(optimizer, self._members)}
        for name, value in norms.items():
            pl_module.log(f"grad_norm/{name}{suffix}", value, on_step=True, on_epoch=False)
        self._measured.append((index, norm, f"grad_norm/limit{suffix}", trainer.global_step))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the limit of the step, which clipping has set by now, and whether the step was taken."""
        if self._update is not None and trainer.global_step > self._step:
            for name, ratio in self._update.after_step().items():
                pl_module.log(f"update_ratio/{name}", ratio, on_step=True, on_epoch=False)
            self._update = None
        measured, self._measured = self._measured, []
        limits = trainer.callback_metrics if measured else {}
        applied = len(trainer.optimizers) > 1 or not measured or self.engine.was_step_applied()
        for index, norm, limit, step in measured:
            self._of(index).add(step, norm, limits.get(limit), applied)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the share of clipped steps so far."""
        for index, series in self._series.items():
            series.settle()
            suffix = f"/optimizer_{index}" if len(trainer.optimizers) > 1 else ""
            if series.limited:
                pl_module.log(f"grad_norm/clipped_share{suffix}", series.clipped / series.limited)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say which limit the norms support."""
        for index, series in self._series.items():
            if self.engine.rank == 0:
                which = f" (optimizer {index})" if len(self._series) > 1 else ""
                log.info("GradientNormMonitor%s: %s.", which, series.suggestion().reason)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of a copy that no step came for."""
        self._update = None

    def _of(self, index: int) -> NormSeries:
        return self._series.setdefault(index, NormSeries())

    def _identity(self) -> dict[str, Any]:
        return {"groups": self.groups, "every_n_steps": self.every_n_steps}

    def _capture(self) -> dict[str, Any]:
        return {"series": {index: series.state_dict() for index, series in self._series.items()}}

    def _restore(self, state: dict[str, Any]) -> None:
        for index, series in state["series"].items():
            self._of(index).load_state_dict(series)


def _check_interval(name: str, value: Any, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise MisconfigurationError(f"`{name}` must be a whole number above 0, got {value!r}. {remedy}")
