"""Average the weights of a fit as it goes, and evaluate, save and deliver the average."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_tricks.callbacks._average import Average, Shards
from lightning_tricks.callbacks._averaging_options import (
    PURPOSES,
    Purpose,
    checked_count,
    checked_interval,
    checked_policy,
    checked_purposes,
)
from lightning_tricks.callbacks._averaging_policies import EMA, AveragingPolicy, Interval
from lightning_tricks.callbacks._averaging_rules import RULES
from lightning_tricks.callbacks._base import TrickCallback
from lightning_tricks.callbacks._interception import intercept, marked
from lightning_tricks.callbacks._lending import Buffers, Lender
from lightning_tricks.callbacks._other_average import ENDED, tell_of_others
from lightning_tricks.callbacks._statistics import AveragedStatistics, placed
from lightning_tricks.engines import Trick

__all__ = ["WeightAveraging"]


class WeightAveraging(TrickCallback):
    """Averages the weights in fp32 after optimizer steps, on this rank's shards; training goes on with the raw ones.

    By default the average is what validation sees (the module's own hooks and other callbacks too), what a checkpoint
    saved with `save_weights_only=True` holds, what `trainer.test(ckpt_path=...)` tests, and what the module holds after
    the fit, whatever ended it, unless it failed or was interrupted. A full checkpoint holds the raw weights as its
    `state_dict`, for training to go on from, and the average beside them: a resumed fit goes on bit for bit.

    Dropped steps and micro-batches are no updates. Running statistics of normalisations are estimated anew for the
    average; other buffers are left as training has them. Several instances work side by side, one for each purpose.

    Args:
        policy: what is averaged: `EMA`, `SWA` or `LAWA`.
        update_every: optimizer steps between updates, or `epoch`; the policy's usual if null: 1 for EMA, else `epoch`.
        use_for: what the average is used for: of `validation` (within a fit), `checkpoints` (of weights only), `test`
            (validate, test or predict with a full checkpoint), `result` (the module after the fit).
        statistics_batches: training batches that running statistics are estimated from, whenever the average is
            used; 0 keeps those of the raw weights. No cost without such normalisations.
        offload: whether the average lies in the host's memory.

    Attributes:
        updates: how many weights the average has taken in.

    Raises:
        MisconfigurationError: for an option out of range, or a purpose that two instances have; for the test of a
            full checkpoint whose average has another `policy` or `update_every`.
        UnsupportedError: under ZeRO-3 that swaps to NVMe.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_tricks.callbacks import EMA, WeightAveraging
        >>> averaging = WeightAveraging(EMA(decay=0.999))
        >>> trainer = Trainer(callbacks=[averaging], accelerator="cpu", logger=False)
        >>> averaging.updates
        0

    References:
        Polyak, Juditsky: Acceleration of stochastic approximation by averaging (SIAM J. Control Optim., 1992).
    """

    trick: ClassVar[Trick] = Trick(
        jobs=("average weights",),
        needs=("named_shards", "put_shards", "save_shards", "load_shards", "was_step_applied"),
        rules=RULES,
    )
    place: ClassVar[int | None] = 3
    _lender: Lender
    _found: tuple[list[Callable[[], Shards]], dict[str, Any]] | None  # in a checkpoint

    def __init__(
        self,
        policy: AveragingPolicy | None = None,
        *,
        update_every: Interval | None = None,
        use_for: Sequence[Purpose] = PURPOSES,
        statistics_batches: int = 32,
        offload: bool = False,
    ) -> None:
        super().__init__()
        self.policy = EMA() if policy is None else checked_policy(policy)
        self.update_every = checked_interval(self.policy.every if update_every is None else update_every)
        self.use_for = checked_purposes(use_for)
        self.statistics_batches = checked_count(statistics_batches)
        self.offload = offload
        self._trainer: weakref.ref[Trainer] | None = None
        self._reset()

    @property
    def updates(self) -> int:
        """How many weights the average has taken in."""
        return self._average.updates

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the module hold the average within the block: in a fit, or after one that failed. Collective.

        Before the first update, and where the module holds the average already, nothing changes.
        """
        with self._lender.lend(self._average.values, self._buffers) if self._can_lend() else nullcontext():
            yield

    def save_average(self, path: str | Path) -> None:
        """Write the averaged weights as one safetensors file, in a fit or after one that failed. Collective.

        Raises:
            CheckpointError: on every rank, if it cannot be written.
        """
        with self.applied():
            self.engine.save_weights(Path(path), self._facts())

    # -- the fit -----------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over what a checkpoint holds, and find where averaging begins."""
        self._load()
        self._seen = trainer.global_step
        self._statistics.begin(pl_module)
        self._begins = self.policy.begins(float(trainer.estimated_stepping_batches))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update after an optimizer step that was applied."""
        self._catch_up(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average into the module; the raw weights are kept for checkpoints that are still to come."""
        if "result" not in self.use_for:
            return
        if not self.updates:
            rank_zero_warn(
                f"WeightAveraging: the fit ended before the first update of {self.policy!r}, so the module keeps its"
                " own weights. Let averaging start earlier, or train longer."
            )
        elif self._can_lend():
            self._lender.hand_over(self._average.values, self._buffers)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the raw weights; deliver the average of a resumed fit that found nothing left to train."""
        if self._found is not None:
            self._load()
            self.on_train_end(trainer, pl_module)
        if self._lender.lent:
            self._delivered = True
            self._lender.forget()
            self._average.drop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the raw weights in the module."""
        if self._trainer is not None:
            self._lender.take_back_alone()

    @contextmanager
    def validating(self) -> Iterator[None]:
        """Around a validation of the fit, all its hooks included."""
        with self.applied() if "validation" in self.use_for else nullcontext():
            yield

    # -- evaluations of a checkpoint ---------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the average of the full checkpoint that was loaded, if one was."""
        if self._stage != "fit" and self._found is not None and "test" in self.use_for:
            readers, state = self._found
            average = Average(self.policy)
            average.load(readers, state["updates"])
            self.engine.put_shards(average.values())
            with torch.no_grad():
                for buffer, values in placed(pl_module, state.get("statistics", {})):
                    buffer.copy_(values)
            self._delivered, self._found = True, None

    on_test_start = on_predict_start = on_validation_start

    # -- checkpoints -------------------------------------------------------------------------------------------

    @contextmanager
    def saving(self, weights_only: bool) -> Iterator[None]:
        """Around a save: the average for weights alone, the raw weights in a full checkpoint."""
        trainer = self._fitting
        if trainer is None:  # after the fit
            with self._marking() if weights_only and self._delivered else nullcontext():
                yield
            return
        self._catch_up(trainer)
        if weights_only and "checkpoints" in self.use_for and self.updates:
            with self.applied(), self._marking():
                yield
        else:
            with self._lender.own():
                yield

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the average beside the raw weights, with its running statistics."""
        if self._fitting is None:
            if self._delivered:
                self._mark(checkpoint)
            return
        self._average.keep(self.engine, checkpoint, self.state_key)
        if self.updates and self._statistics.missing(self.updates) and not trainer.interrupted:
            with self.applied():
                pass  # which estimates them
        checkpoint["callbacks"][self.state_key]["statistics"] = self._statistics.known(self.updates)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note where the average is; it is read when the engine is there."""
        readers, state = Average.find(self.engine, checkpoint, self.state_key), checkpoint["callbacks"]
        self._found = (readers, dict(state[self.state_key])) if readers else None
        self._delivered = False
        if self.state_key not in state:
            purpose = "fit" if self._stage == "fit" else "test" if "test" in self.use_for else None
            known = [callback.state_key for callback in vars(trainer)["callbacks"]]
            tell_of_others(self.engine, checkpoint, self.state_key, known, purpose)

    # -- state -------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        return {"policy": repr(self.policy), "update_every": self.update_every}

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reset()
        self._lender = Lender(self.engine, self.offload)
        self._trainer = weakref.ref(trainer)
        intercept(trainer, self)

    def _capture(self) -> dict[str, Any]:
        return {"updates": self.updates, "applied": self._applied, "at_update": self._at_update}

    def _restore(self, state: dict[str, Any]) -> None:
        self._applied, self._at_update = state["applied"], state["at_update"]
        if state["updates"] and self._found is None:
            rank_zero_warn(ENDED)

    def _reset(self) -> None:
        self._average = Average(self.policy, self.offload)
        self._statistics = AveragedStatistics(self.statistics_batches)
        self._applied = self._at_update = 0  # steps that were applied, and how many there were at the last update
        self._seen = 0  # steps that there were, applied or not
        self._begins = 1
        self._found = None
        self._delivered = False

    @property
    def _fitting(self) -> Trainer | None:
        """The Trainer, from the beginning of its fit until the module keeps the average."""
        trainer = self._trainer() if self._trainer is not None else None
        return trainer if self._stage == "fit" and not self._delivered else None

    def _load(self) -> None:
        if self._found is not None:
            readers, state = self._found
            self._average.load(readers, state["updates"])
            self._statistics.take(self.updates, state.get("statistics", {}))
            self._found = None

    def _can_lend(self) -> bool:
        return self.updates > 0 and not self._delivered and not self._lender.lent

    def _buffers(self) -> Buffers:
        trainer = self._fitting
        return [] if trainer is None else self._statistics.buffers(trainer, self.engine, self.updates)

    # -- updates -----------------------------------------------------------------------------------------------

    def _catch_up(self, trainer: Trainer) -> None:
        """Update if a step is new. Also called before a save, since who saves may come before this callback."""
        if trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        applied = self.engine.was_step_applied()
        self._applied += applied
        if self._seen >= self._begins and self._is_due(trainer, applied):
            self._average.update(self.engine)
            self._at_update = self._applied

    def _is_due(self, trainer: Trainer, applied: bool) -> bool:
        if self.update_every == "epoch":
            return bool(trainer.is_last_batch) and self._applied > self._at_update
        return applied and self._applied % self.update_every == 0

    # -- what a file says --------------------------------------------------------------------------------------

    def _facts(self) -> dict[str, str]:
        return {"average": repr(self.policy), "updates": str(self.updates)}

    def _marking(self) -> Any:
        trainer = self._trainer() if self._trainer is not None else None
        return nullcontext() if trainer is None else marked(trainer, self._mark)

    def _mark(self, checkpoint: dict[str, Any]) -> None:
        checkpoint.setdefault("lightning_tricks", {})["averaged"] = self._facts()
