"""Keep checkpoints of a fit and combine them into one, or let them predict together."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_tricks.callbacks._averaging_options import checked_count
from lightning_tricks.callbacks._base import is_dry_run, writable_folder
from lightning_tricks.callbacks._combine_policies import CombinePolicy, GreedySoup, Predictions, Uniform
from lightning_tricks.callbacks._combining import Combiner, FromPaths, FromShelf, Source
from lightning_tricks.callbacks._cycles import CYCLE_JOB, CYCLE_RULES, Cycles
from lightning_tricks.callbacks._ensemble_file import write_ensemble
from lightning_tricks.callbacks._ensemble_report import outcome, tell, tell_none, warn_of_adapters
from lightning_tricks.callbacks._ensemble_rules import ENSEMBLE_RULES, monitored
from lightning_tricks.callbacks._given_members import GivenMembers
from lightning_tricks.callbacks._member_policies import Cyclic, MemberPolicy, TopK
from lightning_tricks.callbacks._monitor import Monitor
from lightning_tricks.callbacks._scored import ScoredCallback
from lightning_tricks.callbacks._shelf import Shelf
from lightning_tricks.callbacks._statistics import AveragedStatistics
from lightning_tricks.engines import Trick
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional import rank_scores

__all__ = ["CheckpointEnsemble"]

_BEST_THREE = TopK()
_UNIFORM = Uniform()


@dataclass(frozen=True)
class _Member:
    """One set of weights on the shelf, and what validation logged for it."""

    file: str
    epoch: int
    step: int
    score: float
    metrics: dict[str, float] = field(default_factory=dict, repr=False)


class CheckpointEnsemble(ScoredCallback):
    """Averages the best checkpoints of a fit into one, and scores it beside the best single one.

    `members` says which weights are kept during the fit, at most so many at a time. When it ends, `combine` says what
    they become. An average is written to `<dirpath>/ensemble.ckpt`, a checkpoint that `load_from_checkpoint` reads
    strictly, on any engine, and validated once on the fit's validation data if it has any: `results`, and the loggers
    as `ensemble/<metric>` and `best/<metric>`, say how it compares. The module keeps the weights that it ended the fit
    with (or that `EarlyStopping` restored): the ensemble is a file.

    A score that is not finite never wins. Running statistics of normalisation layers have no mean: for an average they
    are estimated anew from training batches.

    Args:
        members: which checkpoints to combine: `TopK`, `LastK`, `Every`, `Cyclic`, or a list of checkpoints of other
            runs, of any engine.
        combine: what they become: `Uniform`, `Weighted` or `GreedySoup` average, `Predictions` keeps them apart.
        dirpath: folder for the members and the ensemble, seen by all nodes;
            `<default_root_dir>/checkpoint_ensemble/<metric or policy>` if null.
        statistics_batches: how many training batches running statistics are estimated from; 0: a module that updates
            some is refused.

    Attributes:
        path: the ensemble's file; None before the fit ended, and with `Predictions`.
        paths: with `Predictions`, the members' checkpoints, for `inference.PredictionEnsemble`.
        results: `{"best": {metric: value}, "ensemble": {metric: value}}`; empty before the fit ended, without `best`
            if no member was scored.
        scores: the members' scores, best first, as far as they have some.
        rejected: what `GreedySoup` left out: the score of the average with it, by its step or path.

    Raises:
        MisconfigurationError: for a metric that the first validation does not log, or only some ranks do, a folder that
            cannot be written or that another ensemble uses, running statistics under manual optimisation, or
            with `Cyclic` another scheduler or a fit without an end.
        CheckpointError: before the fit, for given checkpoints that are damaged or do not match.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_tricks.callbacks import CheckpointEnsemble, TopK
        >>> ensemble = CheckpointEnsemble(TopK(3, monitor="val/macro_f1"))
        >>> trainer = Trainer(callbacks=[ensemble], max_epochs=10, accelerator="cpu", logger=False)

    References:
        Wortsman et al.: Model soups: averaging weights of multiple fine-tuned models (ICML 2022).
        Vaswani et al.: Attention is all you need (NeurIPS 2017), which averages its last checkpoints.
        Huang et al.: Snapshot ensembles: train 1, get M for free (ICLR 2017), for `Cyclic`.
    """

    trick: ClassVar[Trick] = Trick(
        jobs=("average checkpoints",), needs=("load_weights", "save_weights"), rules=ENSEMBLE_RULES
    )
    path: Path | None
    paths: list[Path]
    results: dict[str, dict[str, float]]
    rejected: dict[str, float]
    _kept: list[_Member]
    _shelf: Shelf
    _statistics: AveragedStatistics

    def __init__(
        self,
        members: MemberPolicy | Sequence[str | Path] = _BEST_THREE,
        combine: CombinePolicy = _UNIFORM,
        *,
        dirpath: str | Path | None = None,
        statistics_batches: int = 32,
    ) -> None:
        super().__init__()
        self.statistics_batches = checked_count(statistics_batches, "CheckpointEnsemble")
        self._given = None if isinstance(members, MemberPolicy) else GivenMembers(members)
        if not isinstance(combine, CombinePolicy):
            raise MisconfigurationError(
                f"CheckpointEnsemble's `combine` must be a policy, got {combine!r}: try Uniform()."
            )
        self.members, self.combine, self.dirpath = members, combine, dirpath
        found = monitored(members, combine)
        self._monitors = [] if found is None else [Monitor("CheckpointEnsemble", *found)]
        if self._monitors:
            self._monitor = self._monitors[0]
        if isinstance(members, Cyclic):  # this instance does another job as well
            jobs, rules = (*self.trick.jobs, CYCLE_JOB), (*self.trick.rules, *CYCLE_RULES)
            vars(self)["trick"] = Trick(jobs=jobs, needs=(*self.trick.needs, "was_step_applied"), rules=rules)
        self._reset()

    @property
    def monitors(self) -> bool:
        """Whether it goes by a metric, so that the fit must validate."""
        return monitored(self.members, self.combine) is not None

    @property
    def scores(self) -> list[float]:
        """The members' scores, best first, as far as they have some."""
        known = [member.score for member in self._kept if math.isfinite(member.score)]
        return [known[place] for place in rank_scores(known, mode=self._monitor.mode)] if known else []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the modes that the module trains in; say what an average of adapters is not."""
        super().on_fit_start(trainer, pl_module)
        if self._given is None and not isinstance(self.combine, Predictions):
            warn_of_adapters(pl_module)
        self._statistics = AveragedStatistics(self.statistics_batches)
        self._statistics.begin(pl_module)

    # -- collecting ----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the members of a resumed run."""
        self._resumed = False
        if self._cycles is not None:
            self._cycles.begin(trainer)
        if not is_dry_run(trainer):
            self._find_members()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the learning rate of the next step, if the members are cyclic."""
        if self._cycles is not None:
            self._cycles.set_rate(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the weights at the end of a cycle."""
        if self._cycles is not None and self._cycles.completes(trainer, self.engine) and not is_dry_run(trainer):
            self._shelf.settle(self.engine)
            self._scored(trainer, math.nan)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the weights if they are among the best; see that the metric is there."""
        if isinstance(self.members, TopK):
            super().on_validation_end(trainer, pl_module)
        elif self.monitors and self._stage == "fit":
            self._monitor.check(trainer, pl_module, self.engine)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the weights at the end of an epoch."""
        policy = self.members
        if isinstance(policy, MemberPolicy) and policy.wants(trainer.current_epoch) and not is_dry_run(trainer):
            self._shelf.settle(self.engine)
            self._scored(trainer, math.nan)

    def _scored(self, trainer: Trainer, score: float) -> None:
        """Keep the weights if the policy chooses them. The one that goes is deleted once the new one is complete."""
        policy = self.members
        if not isinstance(policy, MemberPolicy) or any(member.step == trainer.global_step for member in self._kept):
            return
        candidates = [*self._kept, self._candidate(trainer, score)]
        chosen = policy.choose(candidates, [member.score for member in candidates])
        if candidates[-1] in chosen:
            metadata = {"step": str(trainer.global_step), "epoch": str(trainer.current_epoch), "score": repr(score)}
            self.engine.save_weights(self._shelf.path(candidates[-1].file), metadata)
        dropped = [member.file for member in self._kept if member not in chosen]
        self._kept = chosen
        self._shelf.evict(dropped, self.engine)

    # -- the end of the fit --------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Combine the members, write the ensemble, and score it."""
        if is_dry_run(trainer):
            return
        self._shelf.settle(self.engine)
        if self._cycles is not None and self._cycles.ends_nearly():
            self._scored(trainer, math.nan)
        self._combine(trainer, scored=trainer.enable_validation)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the ensemble, unscored, if a resumed fit found nothing left to train, so that training never began."""
        if self._resumed and not is_dry_run(trainer):
            self._find_members()
            self._combine(trainer, scored=False)

    def _combine(self, trainer: Trainer, *, scored: bool) -> None:
        source, scores = self._source()
        self.path, self.results, self.rejected = None, {}, {}  # a second fit of this Trainer makes its own
        if not source.names:
            tell_none(self.members)
        elif isinstance(self.combine, Predictions):
            self._keep_apart(trainer)
        elif isinstance(self.combine, GreedySoup) and not scored:
            rank_zero_warn(
                "CheckpointEnsemble: a greedy soup scores its members, and this fit took no step: no ensemble."
            )
        else:
            monitor = self._monitor if self.monitors else None
            combiner = Combiner(trainer, self.engine, self._shelf, monitor, self._statistics)
            try:
                self._average(combiner, source, scores, scored)
            finally:
                combiner.clear()

    def _source(self) -> tuple[Source, list[float]]:
        """The members, the best or the newest first, and their scores as far as they are known."""
        if self._given is not None:
            return FromPaths(self._given), [math.nan] * len(self._given.paths)
        kept = self._in_order()
        files = [self._shelf.path(member.file) for member in kept]
        return FromShelf(files, [member.step for member in kept]), [member.score for member in kept]

    def _in_order(self) -> list[_Member]:
        return self._kept if isinstance(self.members, TopK) else self._kept[::-1]

    def _average(self, combiner: Combiner, source: Source, scores: list[float], scored: bool) -> None:
        places, shares = list(range(len(source.names))), self.combine.weights(len(source.names))
        best, found = (self._kept[0].metrics if isinstance(self.members, TopK) else {}), None
        if isinstance(self.combine, GreedySoup):
            choice, tried = combiner.greedy(source, scores)
            if choice is None:
                rank_zero_warn(f"CheckpointEnsemble: no member has a finite `{self._monitor.name}`: no ensemble.")
                return
            places, shares = choice.chosen, [1.0] * len(choice.chosen)
            self.rejected = {source.names[place]: score for place, score in choice.tried.items()}
            best = tried.get((places[0],), best)
            found = tried.get(tuple(places), best)
        average = combiner.average(source, places, shares)
        path = self._shelf.path("ensemble.ckpt")
        chosen = [place for place, share in zip(places, shares, strict=True) if share > 0]
        if len(chosen) > 1:  # a single member has its own
            combiner.complete(average)
        write_ensemble(combiner.trainer, self.engine, average, path, self._records(chosen))
        self.path = path
        if scored:
            self._publish(combiner.trainer, best, combiner.score(average) if found is None else found)
        name = self._monitor.name if self.monitors else "val/loss"
        how = outcome(name, self.results.get("ensemble", {}), self.results.get("best", {}), self.rejected)
        self._tell(len(chosen), how, path)

    def _records(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """What the ensemble's file says of its members, oldest first."""
        if self._given is not None:
            return [{"file": str(self._given.paths[place])} for place in places]
        kept = self._in_order()
        return [asdict(member) for member in sorted((kept[place] for place in places), key=lambda one: one.step)]

    def _keep_apart(self, trainer: Trainer) -> None:
        """Write each member as a checkpoint that `load_from_checkpoint` reads."""
        if self._given is not None:
            self.paths = list(self._given.paths)
            return
        before, self.paths = self.paths, []
        for member in self._in_order():
            path = self._shelf.path(self._shelf.new_name("prediction", member.step)).with_suffix(".ckpt")
            weights, moment = self._shelf.path(member.file), (member.epoch, member.step)
            write_ensemble(trainer, self.engine, weights, path, [asdict(member)], moment)
            self.paths.append(path)
        self._shelf.evict({path.name for path in before} - {path.name for path in self.paths}, self.engine)
        self._tell(len(self.paths), ", each a checkpoint of its own", self.paths[0].parent)

    def _publish(self, trainer: Trainer, best: Mapping[str, float], found: dict[str, float]) -> None:
        known = {name: best[name] for name in found if name in best}
        self.results = {**({"best": known} if known else {}), "ensemble": found}
        logged = {f"{area}/{name}": value for area, values in self.results.items() for name, value in values.items()}
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=trainer.global_step)

    def _tell(self, used: int, how: str, where: Path) -> None:
        kept = len(self._kept) if self._given is None else len(self._given.paths)
        tell(self.members, kept, used, how, "".join(monitor.gaps() for monitor in self._monitors), where)

    # -- state ---------------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        folder = None if self.dirpath is None else Path(self.dirpath).name
        if isinstance(self.members, TopK):
            return {"monitor": self.members.monitor, "mode": self._monitor.mode, "folder": folder}
        return {"members": self._kind(), "folder": folder}

    def _kind(self) -> str:
        return "paths" if self._given is not None else type(self.members).__name__

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            self._reset()
            for monitor in self._monitors:
                monitor.reset()
        if self._given is not None:
            self._given.open(pl_module)
        if not is_dry_run(trainer):
            self._refuse_shared_folder(trainer)
            self._shelf.open(writable_folder("CheckpointEnsemble", self._folder(trainer)))

    def _capture(self) -> dict[str, Any]:
        return {
            "members": [asdict(member) for member in self._kept],
            "shelf": self._shelf.capture([member.file for member in self._kept]),
            "monitors": [monitor.capture() for monitor in self._monitors],
            **({} if self._cycles is None else {"cycles": self._cycles.capture()}),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self._resumed = True
        self._kept = [_Member(**member) for member in state["members"]]
        self._shelf.restore(state["shelf"])
        for monitor, saved in zip(self._monitors, state["monitors"], strict=True):
            monitor.restore(saved)
        if self._cycles is not None:
            self._cycles.restore(state["cycles"])

    def _reset(self) -> None:
        self.path, self.paths, self.results, self.rejected = None, [], {}, {}
        self._kept = []
        self._resumed = False
        self._shelf = Shelf()
        self._cycles = Cycles(self.members) if isinstance(self.members, Cyclic) else None

    def _folder(self, trainer: Trainer) -> Path:
        if self.dirpath is not None:
            return Path(self.dirpath).expanduser().absolute()
        name = self.members.monitor if isinstance(self.members, TopK) else self._kind().lower()
        return Path(trainer.default_root_dir).absolute() / "checkpoint_ensemble" / re.sub(r"\W+", "_", name)

    def _refuse_shared_folder(self, trainer: Trainer) -> None:
        folder = self._folder(trainer)
        others = [
            other for other in vars(trainer)["callbacks"] if isinstance(other, CheckpointEnsemble) and other is not self
        ]
        if any(other._folder(trainer) == folder for other in others):
            raise MisconfigurationError(
                f"two CheckpointEnsembles would write their ensemble.ckpt to {folder}: give each its own `dirpath`."
            )

    def _candidate(self, trainer: Trainer, score: float) -> _Member:
        epoch, step = trainer.current_epoch, trainer.global_step
        metrics = {}
        if isinstance(self.members, TopK):  # others are not taken where they are validated
            metrics = {name: float(value) for name, value in self._monitor.logged(trainer).items()}
            metrics[self._monitor.name] = score
        return _Member(self._shelf.new_name("member", step), epoch, step, score, metrics)

    def _find_members(self) -> None:
        gone = self._shelf.start([member.file for member in self._kept], self.engine)
        if gone:
            rank_zero_warn(
                f"CheckpointEnsemble: {len(gone)} of {len(self._kept)} members are not in {self._shelf.path('')} and "
                "are left out. To keep them, resume with the `dirpath` of the run that wrote them."
            )
            self._kept = [member for member in self._kept if member.file not in gone]
