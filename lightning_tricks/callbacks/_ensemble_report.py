"""What a checkpoint ensemble tells its user: before the fit about adapters, after it about what has become of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_tricks.callbacks._member_policies import MemberPolicy, TopK
from lightning_tricks.callbacks._selection import trained_names

__all__ = ["adapter_names", "outcome", "tell", "tell_none", "warn_of_adapters"]


def adapter_names(names: Sequence[str]) -> list[str]:
    """Those that are factors of low-rank adapters, of the suite or of peft.

    Example:
        >>> adapter_names(["q.weight", "q.lora_A", "k.lora_B.default.weight", "flora_1.weight"])
        ['q.lora_A', 'k.lora_B.default.weight']
    """
    return [name for name in names if any(part.startswith("lora_") for part in name.split("."))]


def warn_of_adapters(module: LightningModule) -> None:
    """Say once, before the fit, what an average of weights is not, if the module trains low-rank adapters."""
    if found := adapter_names(trained_names(module)):
        rank_zero_warn(
            f"CheckpointEnsemble will average adapters (`{found[0]}`), A and B apart, as any average along one run: the"
            " mean of A and of B is not the mean of the products BA. `results` says what it is worth. For the mean of"
            " the products pass combine=Predictions(), and then its `paths` to"
            " `lightning_tricks.inference.average_checkpoints(..., module=...)`."
        )


def tell_none(members: object) -> None:
    """Why there is no ensemble."""
    missing = (
        f"no validation gave a finite `{members.monitor}`"
        if isinstance(members, TopK)
        else "the fit ended before the first member was due"
    )
    rank_zero_warn(f"CheckpointEnsemble: {missing}: no ensemble.")


def outcome(name: str, found: Mapping[str, float], best: Mapping[str, float], rejected: Mapping[str, float]) -> str:
    """How the ensemble compares with the best single member, and what was left out."""
    scores = f": `{name}` {found.get(name)}, best single {best.get(name)}" if found else ", not scored"
    left = ", ".join(f"{member} (`{name}` {score} with it)" for member, score in rejected.items())
    return scores + (f"; left out: {left}" if left else "")


def tell(members: object, kept: int, used: int, how: str, gaps: str, where: Path) -> None:
    """Say what the ensemble is made of.

    Args:
        members: the policy, or the given paths.
        kept: how many members there were.
        used: how many of them the ensemble holds.
        how: it compares, in words.
        gaps: what is to be said of its metric.
        where: it lies.
    """
    few = isinstance(members, MemberPolicy) and kept < members.most
    short = f" (of {members} there were only {kept})" if few else ""
    rank_zero_info(f"CheckpointEnsemble of {used}{short}{how}; written to {where}{gaps}.")
