"""Accumulate as many batches as make up a given number of samples or tokens, whatever the number of devices."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader

from lightning_tricks.callbacks._base import TrickCallback
from lightning_tricks.engines import InUse, Rule, Situation, Trick
from lightning_tricks.errors import MisconfigurationError

__all__ = ["BatchSizeAccumulation"]

_OTHERS = ("accumulate_grad_batches", "change the accumulation", "choose the accumulation")


def _by_hand(now: Situation, _: InUse) -> Mapping[str, object] | None:
    return {} if not now.module.automatic_optimization else None


def _rivals(now: Situation, used: InUse) -> Mapping[str, object] | None:
    """The Trainer's own option counts while this callback has not set it."""
    found = [
        other.name
        for job in _OTHERS
        for other in now.tricks
        if other is not used and job in other.trick.jobs and not (job == _OTHERS[0] and used.source.accumulates)
    ]
    return {"other": found[0]} if found else None


def _left_to_the_engine(now: Situation, _: InUse) -> Mapping[str, object] | None:
    return {} if now.trainer.strategy.handles_gradient_accumulation else None


class BatchSizeAccumulation(TrickCallback):
    """Chooses `accumulate_grad_batches` so that an optimizer step takes a given number of samples, or of tokens.

    The number is that of all ranks together: with twice the devices, half as many batches are accumulated, and the
    same hyper-parameters go on. It may change with the optimizer steps taken; a change takes effect at the next batch
    at which a window of the old length has ended and one of the new length may begin, the start of an epoch at the
    latest, for Lightning counts windows from there. A window that the end of an epoch cuts short is a smaller step.

    Args:
        target: samples (or tokens) of an optimizer step, above 0; or a mapping from the optimizer step at which each
            target comes into force, the first being 0.
        per_batch: how many of them a batch of one rank holds; `"auto"`: the `batch_size` of the training loader. For
            tokens, or batches of different sizes, the number that they are made for.

    Raises:
        MisconfigurationError: if an option is out of range, or, before the first step, if a target is no multiple of
            what all ranks' batches hold together, or the loader has no batch size.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_tricks.callbacks import BatchSizeAccumulation
        >>> accumulation = BatchSizeAccumulation(256)
        >>> trainer = Trainer(callbacks=[accumulation], accelerator="cpu", logger=False)
        >>> BatchSizeAccumulation({0: 32768, 1000: 131072}, per_batch=4096).target_at(1500)
        131072

    References:
        Smith, Kindermans, Ying, Le: Don't Decay the Learning Rate, Increase the Batch Size (ICLR 2018).
    """

    trick: ClassVar[Trick] = Trick(
        jobs=("choose the accumulation",),
        needs=("sum_over_ranks",),
        rules=(
            Rule(
                when=_by_hand,
                verdict="refused",
                words="{trick} has Lightning accumulate, which it does not under manual optimisation",
                remedy="leave {trick} out, and step when it is due",
            ),
            Rule(
                when=_rivals,
                verdict="refused",
                words="{trick} and {other} both say how many batches are accumulated",
                remedy="keep one",
            ),
            Rule(
                when=_left_to_the_engine,
                verdict="refused",
                words="Lightning's own DeepSpeedStrategy accumulates by a number that is fixed before {trick} chooses",
                remedy="use `strategy='{engine}'`",
            ),
        ),
    )
    place: ClassVar[int | None] = -1  # before whoever asks how many steps a fit has

    def __init__(self, target: int | Mapping[int, int], *, per_batch: int | Literal["auto"] = "auto") -> None:
        super().__init__()
        self.target = dict(target) if isinstance(target, Mapping) else {0: target}
        if 0 not in self.target or not all(_whole(step, 0) for step in self.target):
            raise MisconfigurationError(
                f"`target` must map optimizer steps, of which the first is 0, to targets; got {self.target}."
            )
        if wrong := [value for value in self.target.values() if not _whole(value, 1)]:
            raise MisconfigurationError(
                f"`target` must be a whole number of samples or tokens above 0, got {wrong[0]!r}."
            )
        if per_batch != "auto" and not _whole(per_batch, 1):
            raise MisconfigurationError(f"`per_batch` must be 'auto' or a whole number above 0, got {per_batch!r}.")
        self.per_batch = per_batch
        self.accumulates = False  # whether the Trainer's number is this callback's
        self._in_force: int | None = None  # the target of the window under way; None: that of the step
        self._together = 0  # what all ranks' batches hold

    def target_at(self, step: int) -> int:
        """The target that is due at an optimizer step."""
        return self.target[max(start for start in self.target if start <= step)]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn what the ranks' batches hold, and accumulate."""
        own = self.per_batch if isinstance(self.per_batch, int) else _batch_size(trainer)
        # Added up, so that every rank has the same number, and the same error.
        held = self.engine.sum_over_ranks(torch.tensor(float(own or 0), device=trainer.strategy.root_device))
        self._together = int(held)
        if not own or not self._together:
            raise MisconfigurationError(
                "the training loader has no `batch_size`: pass `per_batch`, the samples or tokens of a rank's batch."
            )
        for target in self.target.values():
            self._batches(target)
        known = self._in_force in self.target.values()
        self._accumulate(trainer, self._in_force if known and self._in_force else self.target_at(trainer.global_step))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Change where both the old and the new windows begin: Lightning counts them from the epoch's first batch."""
        due = self.target_at(trainer.global_step)
        begins = batch_idx % trainer.accumulate_grad_batches == 0 == batch_idx % self._batches(due)
        if due != self._in_force and begins:
            self._accumulate(trainer, due)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the Trainer as it was found."""
        self._leave(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the Trainer as it was found."""
        self._leave(trainer)

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._in_force = None

    def _accumulate(self, trainer: Trainer, target: int) -> None:
        self._in_force, self.accumulates = target, True
        trainer.accumulate_grad_batches = self._batches(target)

    def _batches(self, target: int) -> int:
        batches, rest = divmod(target, self._together)
        if rest:
            near = [one for one in (batches * self._together, (batches + 1) * self._together) if one]
            raise MisconfigurationError(
                f"a `target` of {target} is no multiple of the {self._together} that the batches of"
                f" {self.engine.world_size} rank(s) hold together: take {' or '.join(map(str, near))}, or another batch"
                " size."
            )
        return batches

    def _leave(self, trainer: Trainer) -> None:
        if self.accumulates:
            trainer.accumulate_grad_batches = 1
            self.accumulates = False

    def _capture(self) -> dict[str, Any]:
        return {"in_force": self._in_force}

    def _restore(self, state: dict[str, Any]) -> None:
        self._in_force = state["in_force"]


def _batch_size(trainer: Trainer) -> int | None:
    loader = CombinedLoader(trainer.train_dataloader).flattened[0]
    for holder in (loader, getattr(loader, "batch_sampler", None)):
        if _whole(size := getattr(holder, "batch_size", None), 1):
            return int(size)  # type: ignore[arg-type]
    return None


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
