"""What a trick declares about itself, and which tricks a Trainer and a module hold."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch.optim import Optimizer
from torch.utils.data import WeightedRandomSampler

from lightning_tricks.engines._clipping import deepspeed_config, deepspeed_threshold

__all__ = ["InUse", "Rule", "Situation", "Trick", "Verdict", "tricks_in_use"]

Verdict = Literal["exact", "degraded", "refused"]
Known = Literal["setup", "built", "data"]

# Lightning's own callbacks that do the job of a trick, or that an engine has something to say about.
_LIGHTNING = {
    "BaseFinetuning": "freeze layers",
    "EarlyStopping": "stop early",
    "GradientAccumulationScheduler": "change the accumulation",
    "StochasticWeightAveraging": "average weights",
    "WeightAveraging": "average weights",
}


@dataclass(frozen=True)
class Rule:
    """One line of the table that `check` goes by.

    Args:
        when: given the situation and the trick, the names to fill in if the rule applies, None if it does not, and a
            sentence if that is not known yet.
        verdict: what becomes of the trick.
        words: why, as a clause; names in braces are filled in, `{trick}` and `{engine}` always.
        remedy: what to do instead, as an imperative clause.
        who: whom it is about: a job, or a method of `Engine` that is needed; None: the trick that declares the rule.
        known: when the answer is known: when a fit is set up, when its model and optimizers are built, or its data.
    """

    when: "Callable[[Situation, InUse], Mapping[str, object] | str | None]"
    verdict: Literal["degraded", "refused"]
    words: str
    remedy: str
    who: str | None = None
    known: Known = "setup"


@dataclass(frozen=True)
class Trick:
    """What a callback, a mixin or a sampler declares, as its class attribute `trick`, for `check` to go by.

    Args:
        jobs: what it does, in the words that its rivals use as well: `"clip gradients"`.
        needs: the methods of `Engine` that it calls. What an engine refuses of them is refused of the trick.
        rules: what it does not do exactly, or not at all.
        used: whether an object of a class that declares it makes use of it; None: always.
        does: whether such an object does the jobs as it is set up; None: always. What it needs, it needs all the same.

    Example:
        >>> Trick(jobs=("average weights",), needs=("named_shards", "put_shards")).rules
        ()
    """

    jobs: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    used: Callable[[Any], bool] | None = None
    does: Callable[[Any], bool] | None = None

    def of(self, source: Any) -> "Trick":
        """What it comes to for this object.

        Example:
            >>> Trick(jobs=("balance classes",), does=lambda weights: len(set(weights)) > 1).of([1.0, 1.0]).jobs
            ()
        """
        return self if self.does is None or self.does(source) else replace(self, jobs=())


@dataclass(frozen=True)
class InUse:
    """A trick, an option or a callback of Lightning's that a fit uses.

    Args:
        name: as users write it.
        trick: what it declares.
        source: the object, where there is one.
        ours: whether it declared itself, rather than being known from the table above.
    """

    name: str
    trick: Trick
    source: Any = None
    ours: bool = False

    def is_meant_by(self, rule: Rule) -> bool:
        """Whether a rule is about this."""
        return rule in self.trick.rules or rule.who in (*self.trick.jobs, *self.trick.needs)


@dataclass(frozen=True)
class Situation:
    """All that a rule may look at.

    Args:
        trainer: the Trainer.
        module: the module that it fits, or would.
        datamodule: its data, if that is a LightningDataModule.
        engine: the engine's name.
        tricks: what is in use.
    """

    trainer: Trainer
    module: LightningModule
    datamodule: LightningDataModule | None
    engine: str
    tricks: tuple[InUse, ...] = ()

    @property
    def zero(self) -> bool:
        """Whether DeepSpeed trains."""
        return self.engine.startswith("zero_")

    @property
    def precision(self) -> str:
        """The precision in force."""
        return str(self.trainer.precision)

    @property
    def fitting(self) -> bool:
        """Whether this very fit is under way, so that what it has set up is known."""
        running = self.trainer.state.fn == "fit" and self.trainer.state.status == "running"
        return running and self.trainer.lightning_module is self.module

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers; empty before they are built."""
        return self.trainer.optimizers if self.fitting else []

    @property
    def deepspeed_config(self) -> dict[str, Any]:
        """DeepSpeed's configuration; empty without DeepSpeed."""
        return deepspeed_config(self.trainer)

    def rivals(self, used: InUse, job: str) -> list[InUse]:
        """Who comes after `used` and does the same job."""
        place = next(index for index, other in enumerate(self.tricks) if other is used)
        return [other for other in self.tricks[place + 1 :] if job in other.trick.jobs]


def tricks_in_use(trainer: Trainer, module: LightningModule) -> Iterator[InUse]:
    """What this fit uses: callbacks, mixins, options of the Trainer, and a sampler once the data are there."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        yield from _callback(callback)
    for base in type(module).__mro__:
        declared = vars(base).get("trick")
        if isinstance(declared, Trick) and (declared.used is None or declared.used(module)):
            yield InUse(base.__name__, declared.of(module), module, ours=True)
    yield from _options(trainer, module)
    if module is trainer.lightning_module:
        yield from _samplers(trainer)


def _callback(callback: Any) -> Iterator[InUse]:
    declared = getattr(callback, "trick", None)
    if isinstance(declared, Trick):
        yield InUse(type(callback).__name__, declared, callback, ours=True)
        return
    for base in type(callback).__mro__:
        if base.__module__.startswith("lightning.pytorch.callbacks.") and base.__name__ in _LIGHTNING:
            name = f"Lightning's {type(callback).__name__}"
            yield InUse(name, Trick(jobs=(_LIGHTNING[base.__name__],)), callback)


def _options(trainer: Trainer, module: LightningModule) -> Iterator[InUse]:
    if trainer.gradient_clip_val:
        clip = Trick(jobs=("clip gradients", "gradient_clip_val"))
        yield InUse(f"`Trainer(gradient_clip_val={trainer.gradient_clip_val})`", clip)
    if (threshold := deepspeed_threshold(trainer)) is not None:
        clip = Trick(jobs=("clip gradients",))
        yield InUse(f"the DeepSpeed configuration (`gradient_clipping: {threshold}`)", clip)
    if trainer.accumulate_grad_batches != 1:
        name = f"`Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches})`"
        yield InUse(name, Trick(jobs=("accumulate_grad_batches",)))
    yield InUse(f"precision '{trainer.precision}'", Trick(jobs=("precision",)))
    if not module.automatic_optimization:
        yield InUse("manual optimisation", Trick(jobs=("manual optimisation",)))


def _samplers(trainer: Trainer) -> Iterator[InUse]:
    from lightning.pytorch.utilities import CombinedLoader

    if trainer.train_dataloader is None:
        return
    for loader in CombinedLoader(trainer.train_dataloader).flattened:
        sampler = getattr(loader, "sampler", getattr(loader, "order", None))  # TricksDataLoader has an order
        sampler = getattr(getattr(sampler, "dataset", None), "_sampler", sampler)  # Lightning's distributed wrapper
        if isinstance(declared := getattr(sampler, "trick", None), Trick):
            yield InUse(type(sampler).__name__, declared, sampler, ours=True)
        elif isinstance(sampler, WeightedRandomSampler):
            yield InUse("WeightedRandomSampler", Trick(jobs=("balance classes",)), sampler)
