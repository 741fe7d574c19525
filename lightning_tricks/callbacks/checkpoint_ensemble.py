"""Keep the best checkpoints of a fit and average them into one."""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.modules.batchnorm import _NormBase

from lightning_tricks.callbacks._base import is_dry_run, writable_folder
from lightning_tricks.callbacks._ensemble_file import write_ensemble
from lightning_tricks.callbacks._evaluation import borrowed_weights, validate
from lightning_tricks.callbacks._monitor import NEEDS_VALIDATION, Mode, Monitor, checked_mode, joint
from lightning_tricks.callbacks._scored import ScoredCallback
from lightning_tricks.callbacks._shelf import Shelf
from lightning_tricks.engines import InUse, Rule, Situation, Trick
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional import rank_scores
from lightning_tricks.storage import average_weights

__all__ = ["CheckpointEnsemble", "TopK"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TopK:
    """Takes the best K checkpoints by a validation metric as members.

    Args:
        k: number of members, 1 or more; 3 to 10 is usual.
        monitor: metric to rank by, as `validation_step` logs it.
        mode: `min` if lower is better, `max` if higher is, `auto` to tell it from the metric's name.

    Raises:
        MisconfigurationError: for an option out of range.

    Example:
        >>> from lightning_tricks.callbacks import TopK
        >>> TopK(5, monitor="val/macro_f1")
        TopK(k=5, monitor='val/macro_f1', mode='auto')
    """

    k: int = 3
    monitor: str = "val/loss"
    mode: Mode = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise MisconfigurationError(
                f"TopK's `k` must be a whole number of checkpoints, 1 or more, got {self.k!r}. 3 is a good start."
            )
        checked_mode("TopK", self.monitor, self.mode)


_BEST_THREE = TopK()


@dataclass(frozen=True)
class _Member:
    """One set of weights on the shelf, and what validation logged for it."""

    file: str
    epoch: int
    step: int
    score: float
    metrics: dict[str, float] = field(default_factory=dict, repr=False)


def _running_statistics(situation: Situation, _: InUse) -> Mapping[str, object] | None:
    for name, module in situation.module.named_modules():
        if isinstance(module, _NormBase) and module.track_running_stats and module.training:
            return {"layer": name, "kind": type(module).__name__}
    return None


_RULES = (
    NEEDS_VALIDATION,
    Rule(
        when=_running_statistics,
        verdict="refused",
        words="{trick} cannot average the running statistics of `{layer}` ({kind}), whose mean belongs to no weights",
        remedy="use a normalisation without them (LayerNorm, GroupNorm), or freeze them by putting the layer in "
        "eval() mode before the fit",
        known="built",
    ),
)


class CheckpointEnsemble(ScoredCallback):
    """Averages the best checkpoints of a fit into one, and scores it beside the best single one.

    After each validation the weights are kept if they are among the best K. When the fit ends their uniform average
    is written to `<dirpath>/ensemble.ckpt`, a checkpoint that `load_from_checkpoint` reads strictly, on any engine. It
    is validated once on the fit's validation data: `results`, and the loggers as `ensemble/<metric>` and
    `best/<metric>`, say how it compares. The module keeps the weights that it
    ended the fit with (or that `EarlyStopping` restored): the ensemble is a file.

    A score that is not finite is never a member. Running statistics of normalisation layers cannot be averaged, so
    a module that updates some is refused.

    Args:
        members: which checkpoints to average.
        dirpath: folder for the members and the ensemble, seen by all nodes;
            `<default_root_dir>/checkpoint_ensemble/<metric>` if null.

    Attributes:
        path: the ensemble's file; None before the fit ended.
        results: `{"best": {metric: value}, "ensemble": {metric: value}}`; empty before the fit ended.
        scores: the members' scores, best first.

    Raises:
        MisconfigurationError: for a metric that validation does not log, a folder that cannot be written or that
            another ensemble uses, or running statistics.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_tricks.callbacks import CheckpointEnsemble, TopK
        >>> ensemble = CheckpointEnsemble(TopK(3, monitor="val/macro_f1"))
        >>> trainer = Trainer(callbacks=[ensemble], max_epochs=10, accelerator="cpu", logger=False)

    References:
        Wortsman et al.: Model soups: averaging weights of multiple fine-tuned models (ICML 2022).
        Vaswani et al.: Attention is all you need (NeurIPS 2017), which averages its last checkpoints.
    """

    trick: ClassVar[Trick] = Trick(jobs=("average checkpoints",), needs=("load_weights", "save_weights"), rules=_RULES)
    path: Path | None
    results: dict[str, dict[str, float]]
    _kept: list[_Member]
    _shelf: Shelf

    def __init__(self, members: TopK = _BEST_THREE, *, dirpath: str | Path | None = None) -> None:
        super().__init__()
        if not isinstance(members, TopK):
            raise MisconfigurationError(
                f"CheckpointEnsemble's `members` must say which checkpoints to average, got {members!r}: pass "
                "TopK(3, monitor='val/loss')."
            )
        self.members = members
        self.dirpath = dirpath
        mode = checked_mode("TopK", members.monitor, members.mode)
        self._monitor = Monitor("CheckpointEnsemble", members.monitor, mode)
        self._reset()

    @property
    def scores(self) -> list[float]:
        """The members' scores, best first."""
        return [member.score for member in self._kept]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the members of a resumed run."""
        self._resumed = False
        if not is_dry_run(trainer):
            self._find_members()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average the members, write the ensemble, and score it."""
        if is_dry_run(trainer):
            return
        self._shelf.settle(self.engine)
        with self._averaged(trainer) as average:
            if average is not None:
                self._score(trainer, pl_module, average)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the ensemble, unscored, if a resumed fit found nothing left to train, so that training never began."""
        if self._resumed and not is_dry_run(trainer):
            self._find_members()
            with self._averaged(trainer):
                pass

    def _identity(self) -> dict[str, Any]:
        folder = None if self.dirpath is None else Path(self.dirpath).name
        return {"monitor": self.members.monitor, "mode": self._monitor.mode, "folder": folder}

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            self._reset()
        if not is_dry_run(trainer):
            self._refuse_shared_folder(trainer)
            self._shelf.open(writable_folder("CheckpointEnsemble", self._folder(trainer)))

    def _capture(self) -> dict[str, Any]:
        return {
            "members": [asdict(member) for member in self._kept],
            "shelf": self._shelf.capture([member.file for member in self._kept]),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self._resumed = True
        self._kept = [_Member(**member) for member in state["members"]]
        self._shelf.restore(state["shelf"])

    def _reset(self) -> None:
        self.path = None
        self.results = {}
        self._kept = []
        self._resumed = False
        self._shelf = Shelf()

    def _folder(self, trainer: Trainer) -> Path:
        if self.dirpath is not None:
            return Path(self.dirpath).expanduser().absolute()
        metric = re.sub(r"\W+", "_", self.members.monitor)
        return Path(trainer.default_root_dir).absolute() / "checkpoint_ensemble" / metric

    def _refuse_shared_folder(self, trainer: Trainer) -> None:
        folder = self._folder(trainer)
        others = [
            other for other in vars(trainer)["callbacks"] if isinstance(other, CheckpointEnsemble) and other is not self
        ]
        if any(other._folder(trainer) == folder for other in others):
            raise MisconfigurationError(
                f"two CheckpointEnsembles would write their ensemble.ckpt to {folder}: give each its own `dirpath`."
            )

    def _scored(self, trainer: Trainer, score: float) -> None:
        """Keep the weights if they are among the best."""
        if any(member.step == trainer.global_step for member in self._kept):
            return
        candidates = [*self._kept, self._candidate(trainer, score)]
        order = rank_scores([member.score for member in candidates], mode=self._monitor.mode)
        chosen = [candidates[position] for position in order[: self.members.k]]
        if candidates[-1] in chosen:
            metadata = {"step": str(trainer.global_step), "epoch": str(trainer.current_epoch), "score": repr(score)}
            self.engine.save_weights(self._shelf.path(candidates[-1].file), metadata)
        dropped = [member.file for member in self._kept if member not in chosen]
        self._kept = chosen
        self._shelf.evict(dropped, self.engine)

    def _candidate(self, trainer: Trainer, score: float) -> _Member:
        epoch, step = trainer.current_epoch, trainer.global_step
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        return _Member(
            self._shelf.new_name("member", step), epoch, step, score, {**metrics, self.members.monitor: score}
        )

    def _find_members(self) -> None:
        gone = self._shelf.start([member.file for member in self._kept], self.engine)
        if gone:
            rank_zero_warn(
                f"CheckpointEnsemble: {len(gone)} of {len(self._kept)} members are not in {self._shelf.path('')} and "
                "are left out. To keep them, resume with the `dirpath` of the run that wrote them."
            )
            self._kept = [member for member in self._kept if member.file not in gone]

    @contextmanager
    def _averaged(self, trainer: Trainer) -> Iterator[Path | None]:
        """Write the ensemble, and lend the weights file of the average; None if there is no member."""
        if not self._kept:
            rank_zero_warn(f"CheckpointEnsemble: no validation gave a finite `{self.members.monitor}`: no ensemble.")
            yield None
            return
        self.path = self._shelf.path("ensemble.ckpt")
        members = sorted(self._kept, key=lambda member: member.step)
        average = self._shelf.path(self._shelf.new_name("mean", trainer.global_step))
        try:
            files = [self._shelf.path(member.file) for member in members]
            self.engine.write_on_rank_zero(average, lambda: average_weights(files, average))
            write_ensemble(trainer, self.engine, average, self.path, [asdict(member) for member in members])
            yield average
        finally:
            self._shelf.evict([average.name], self.engine)

    def _score(self, trainer: Trainer, pl_module: LightningModule, average: Path) -> None:
        raw = self._shelf.path(self._shelf.new_name("raw", trainer.global_step))
        with borrowed_weights(self.engine, average, raw):
            found = validate(trainer)
        if self.members.monitor in found:
            found[self.members.monitor] = joint(found[self.members.monitor], pl_module, self.engine)
        self._publish(trainer, found)

    def _publish(self, trainer: Trainer, found: dict[str, float]) -> None:
        best = {name: self._kept[0].metrics[name] for name in found if name in self._kept[0].metrics}
        self.results = {"best": best, "ensemble": found}
        logged = {f"{area}/{name}": value for area, values in self.results.items() for name, value in values.items()}
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=trainer.global_step)
        if trainer.is_global_zero:
            name = self.members.monitor
            log.info(
                f"CheckpointEnsemble of {len(self._kept)}: `{name}` {found.get(name)}, best single {best.get(name)}; "
                f"written to {self.path}."
            )
