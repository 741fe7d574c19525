"""What `check` says of WeightAveraging: rivals, purposes that two have, and statistics that cannot be estimated."""

from collections.abc import Mapping

from lightning_tricks.callbacks._statistics import norms_of
from lightning_tricks.engines import InUse, Rule, Situation

__all__ = ["RULES"]

Answer = Mapping[str, object] | None


def _lightnings_too(now: Situation, _: InUse) -> Answer:
    others = [other for other in now.tricks if "average weights" in other.trick.jobs and not other.ours]
    return {"other": others[0].name} if others else None


def _same_purpose(now: Situation, used: InUse) -> Answer:
    for other in now.rivals(used, "average weights"):
        shared = sorted(set(used.source.use_for) & set(getattr(other.source, "use_for", ())))
        if shared:
            return {"purpose": shared[0]}
    return None


def _steps_by_hand(now: Situation, used: InUse) -> Answer:
    needs = not now.module.automatic_optimization and used.source.statistics_batches
    norms = norms_of(now.module) if needs else []
    return {"kind": type(norms[0]).__name__} if norms else None


RULES = (
    Rule(
        when=_lightnings_too,
        verdict="refused",
        words="{trick} and {other} both put averages into the module",
        remedy="remove one",
    ),
    Rule(
        when=_same_purpose,
        verdict="refused",
        words="two instances of {trick} both have `{purpose}` in `use_for`",
        remedy="leave it to one, and give the other `use_for=[]` or the rest",
    ),
    Rule(
        when=_steps_by_hand,
        verdict="refused",
        words="{trick} estimates the running statistics of {kind} by training steps without an update, which manual"
        " optimisation would make",
        remedy="pass `statistics_batches=0` to keep those of the raw weights",
        known="built",
    ),
)
