"""What a checkpoint ensemble goes by, and what it cannot do."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from torch.nn.modules.batchnorm import _NormBase

from lightning_tricks.callbacks._combine_policies import GreedySoup, Predictions
from lightning_tricks.callbacks._member_policies import TopK
from lightning_tricks.callbacks._monitor import NEEDS_VALIDATION, checked_mode
from lightning_tricks.engines import InUse, Rule, Situation
from lightning_tricks.errors import MisconfigurationError

__all__ = ["ENSEMBLE_RULES", "monitored"]


def monitored(members: object, combine: object) -> tuple[str, Literal["min", "max"]] | None:
    """The metric that the members, or the soup, are chosen by, and its direction.

    Raises:
        MisconfigurationError: if they are chosen by different ones.
    """
    ranked = [policy for policy in (members, combine) if isinstance(policy, TopK | GreedySoup)]
    found = [(each.monitor, checked_mode(type(each).__name__, each.monitor, each.mode)) for each in ranked]
    if len(set(found)) > 1:
        raise MisconfigurationError(
            f"CheckpointEnsemble would choose members by {found[0]} and combine them by {found[1]}: give TopK and"
            " GreedySoup the same `monitor` and `mode`."
        )
    return found[0] if found else None


def _running_statistics(situation: Situation, used: InUse) -> Mapping[str, object] | None:
    estimated = used.source.statistics_batches > 0 and situation.module.automatic_optimization
    if isinstance(used.source.combine, Predictions) or estimated:
        return None
    for name, module in situation.module.named_modules():
        if isinstance(module, _NormBase) and module.track_running_stats and module.training:
            return {"layer": name, "kind": type(module).__name__}
    return None


def _never_validated(situation: Situation, used: InUse) -> Mapping[str, object] | str | None:
    return NEEDS_VALIDATION.when(situation, used) if used.source.monitors else None


ENSEMBLE_RULES = (
    replace(NEEDS_VALIDATION, when=_never_validated),
    Rule(
        when=_running_statistics,
        verdict="refused",
        words="{trick} cannot average the running statistics of `{layer}` ({kind}), whose mean belongs to no weights,"
        " and estimates them anew only by training steps of automatic optimisation, with `statistics_batches` above 0",
        remedy="use a normalisation without them (LayerNorm, GroupNorm), or freeze them by putting the layer in "
        "eval() mode before the fit",
        known="built",
    ),
)
