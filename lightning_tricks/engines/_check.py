"""Before a fit: does each trick do, on this engine and with these options, what it does on one device?"""

from collections.abc import Iterator, Mapping

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_tricks.engines._capabilities import REFUSALS, refusal
from lightning_tricks.engines._report import Finding, Report
from lightning_tricks.engines._rules import CIRCUMSTANCES, RULES
from lightning_tricks.engines._select import engine_of
from lightning_tricks.engines._tricks import InUse, Known, Rule, Situation, tricks_in_use
from lightning_tricks.errors import DegradedWarning, MisconfigurationError, TricksError, UnsupportedError

__all__ = ["check", "check_before_fit"]


def check(trainer: Trainer, module: LightningModule, datamodule: LightningDataModule | None = None) -> Report:
    """Say of each trick in use whether it is exact, degraded or refused. Nothing is trained, and no data is read.

    A fit with a callback or a strategy of the suite does it by itself before its first step: what is refused raises,
    what is degraded warns once (`DegradedWarning`), what is exact says nothing. It costs milliseconds.

    Args:
        trainer: the Trainer, with its callbacks, strategy, precision and other options.
        module: the module that it is to fit.
        datamodule: the data, if that is a LightningDataModule.

    Returns:
        At least one finding for each callback and mixin of the suite, for each option of the Trainer that matters
        here, and for each of Lightning's callbacks that does the job of a trick.

    Raises:
        MisconfigurationError: if it is not a `lightning.pytorch.Trainer`.

    Example:
        >>> import lightning as L
        >>> import lightning_tricks
        >>> from lightning_tricks.callbacks import GradientClipping
        >>> trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=[GradientClipping(1.0)])
        >>> print(lightning_tricks.check(trainer, L.LightningModule()))
        GradientClipping     one_device  exact
        precision '32-true'  one_device  exact
    """
    return Report([finding for _, finding in _found(trainer, module, datamodule)])


def check_before_fit(trainer: Trainer, caller: object, known: Known = "setup") -> None:
    """Run the check, if `caller` is the first in this fit who would: a callback, else the strategy.

    Called on every rank, where it finds the same.

    Args:
        trainer: a Trainer whose fit begins.
        caller: a callback or strategy whose class has `runs_check = True`, or a module with a mixin of ours.
        known: what has just become known; what was known before has been told.

    Raises:
        UnsupportedError: if one thing is refused, for a reason of the engine's.
        MisconfigurationError: if one thing is refused for another reason, or several are; all are named.
    """
    candidates = [*trainer.callbacks, trainer.strategy]  # type: ignore[attr-defined]
    runners = [candidate for candidate in candidates if getattr(type(candidate), "runs_check", False)]
    if known == "data" or (runners and runners[0] is caller):
        now = {known} if runners else {"setup", "built", "data"}  # a module with a mixin comes last
        report = Report([finding for when, finding in _found(trainer, trainer.lightning_module) if when in now])
        _raise(report)
        _warn(report)


def _found(
    trainer: Trainer, module: LightningModule, datamodule: LightningDataModule | None = None
) -> Iterator[tuple[Known, Finding]]:
    """Every finding, and when it is known."""
    try:
        engine = engine_of(trainer).name
    except UnsupportedError as error:
        used = [one for one in tricks_in_use(trainer, module) if one.ours]
        yield from (("setup", _without_engine(trainer, one, error)) for one in used)
        return
    situation = Situation(trainer, module, datamodule, engine, tuple(tricks_in_use(trainer, module)))
    for one in situation.tricks:
        yield from _of(situation, one)


def _without_engine(trainer: Trainer, used: InUse, error: UnsupportedError) -> Finding:
    ours = UnsupportedError(used.name, error.engine, error.reason, error.instead)
    return Finding(used.name, type(trainer.strategy).__name__, "refused", error.reason, error.instead, ours)


def _of(situation: Situation, used: InUse) -> Iterator[tuple[Known, Finding]]:
    answers = [*_by_rules(situation, used), *_by_refusals(situation, used)]
    found = [(known, answer) for known, answer in answers if isinstance(answer, Finding)]
    notes = "; ".join(answer for _, answer in answers if isinstance(answer, str))
    yield from found or [("setup", Finding(used.name, situation.engine, "exact", notes))]


def _by_rules(situation: Situation, used: InUse) -> Iterator[tuple[Known, Finding | str]]:
    for rule in (*RULES, *used.trick.rules):
        answer = rule.when(situation, used) if used.is_meant_by(rule) else None
        if isinstance(answer, str):
            yield rule.known, answer
        elif answer is not None:
            yield (
                rule.known,
                _finding(situation, used, rule, {"trick": used.name, "engine": situation.engine, **answer}),
            )


def _finding(situation: Situation, used: InUse, rule: Rule, names: Mapping[str, object]) -> Finding:
    words, remedy = rule.words.format(**names), rule.remedy.format(**names)
    error = MisconfigurationError(f"{words}: {remedy}.") if rule.verdict == "refused" else None
    return Finding(used.name, situation.engine, rule.verdict, words, remedy, error)


def _by_refusals(situation: Situation, used: InUse) -> Iterator[tuple[Known, Finding | str]]:
    for key, (known, when) in CIRCUMSTANCES.items():
        entry = REFUSALS[key]
        concerned = situation.engine in entry.engines and not set(used.trick.needs).isdisjoint(entry.methods)
        answer = when(situation, used) if concerned else None
        if isinstance(answer, str):
            yield known, answer
        elif answer is not None:
            error = refusal(key, **answer)
            reason = f"{error.trick} cannot run on {error.engine}, since {error.reason}"
            yield known, Finding(used.name, situation.engine, "refused", reason, error.instead, error)


def _raise(report: Report) -> None:
    errors: dict[str, TricksError] = {f"{found.error}": found.error for found in report if found.error is not None}
    if len(errors) == 1:
        raise next(iter(errors.values()))
    if errors:
        lines = "".join(f"\n- {message}" for message in errors)
        raise MisconfigurationError(f"{len(errors)} things stand in the way of this fit:{lines}")


def _warn(report: Report) -> None:
    if degraded := report.of("degraded"):
        lines = "".join(f"\n- {found.trick}: {found.why}." for found in degraded)
        rank_zero_warn(f"Not as on one device, on {degraded[0].engine}:{lines}", category=DegradedWarning)
