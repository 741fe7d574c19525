"""Which checkpoints of a fit an ensemble is made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from lightning_tricks.callbacks._monitor import Mode, checked_mode
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional import rank_scores

__all__ = ["Cyclic", "Every", "LastK", "MemberPolicy", "TopK"]

T = TypeVar("T")
Moment = Literal["validation", "epoch", "cycle"]


class MemberPolicy:
    """What the policies share."""

    moment: ClassVar[Moment] = "epoch"

    @property
    def most(self) -> int:
        """The most members."""
        return int(vars(self)["k"])

    def wants(self, epoch: int) -> bool:
        """Whether the weights at the end of this epoch, counted from 0, are a candidate."""
        return self.moment == "epoch"

    def choose(self, members: Sequence[T], scores: Sequence[float]) -> list[T]:
        """Who stays, of members in the order in which they were taken."""
        return list(members[-self.most :])


@dataclass(frozen=True)
class TopK(MemberPolicy):
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
    moment: ClassVar[Moment] = "validation"

    def __post_init__(self) -> None:
        _whole(self, "k", self.k, "of checkpoints, 1 or more", "3 is a good start")
        checked_mode("TopK", self.monitor, self.mode)

    def choose(self, members: Sequence[T], scores: Sequence[float]) -> list[T]:
        """The best, best first."""
        order = rank_scores(scores, mode=checked_mode("TopK", self.monitor, self.mode))
        return [members[place] for place in order[: self.most]]


@dataclass(frozen=True)
class LastK(MemberPolicy):
    """Takes the weights at the end of the last K epochs as members.

    Args:
        k: number of members, 1 or more; 5 to 20 is usual.

    Raises:
        MisconfigurationError: for an option out of range.

    Example:
        >>> from lightning_tricks.callbacks import LastK
        >>> LastK(5)
        LastK(k=5)
    """

    k: int = 5

    def __post_init__(self) -> None:
        _whole(self, "k", self.k, "of checkpoints, 1 or more", "5 is usual")


@dataclass(frozen=True)
class Every(MemberPolicy):
    """Takes the weights at the end of every so many epochs as members.

    Args:
        epochs: 1 or more.
        k: the most members that are kept, the latest ones: what bounds the disk.

    Raises:
        MisconfigurationError: for an option out of range.

    Example:
        >>> from lightning_tricks.callbacks import Every
        >>> Every(epochs=2)
        Every(epochs=2, k=10)
    """

    epochs: int = 1
    k: int = 10

    def __post_init__(self) -> None:
        _whole(self, "epochs", self.epochs, "of epochs, 1 or more", "1 takes each")
        _whole(self, "k", self.k, "of checkpoints, 1 or more", "10 is a good start")

    def wants(self, epoch: int) -> bool:
        """Whether this epoch, counted from 0, completes so many."""
        return bool((epoch + 1) % self.epochs == 0)


@dataclass(frozen=True)
class Cyclic(MemberPolicy):
    """Snapshot ensembling: lets the learning rate descend several times, and takes the weights after each descent.

    Each optimizer's rate, as it is when training starts, falls along half a cosine in each cycle and starts anew. Only
    steps that change the weights count. The fit must know its number of steps, and have no other scheduler.

    Args:
        cycles: number of descents, and of members, 1 or more; 3 to 6 is usual. A cycle should be long enough to
            converge.
        floor: the share of the rate that a descent goes towards, in [0, 1).

    Raises:
        MisconfigurationError: for an option out of range.

    Example:
        >>> from lightning_tricks.callbacks import Cyclic
        >>> Cyclic(cycles=4)
        Cyclic(cycles=4, floor=0.0)

    References:
        Huang et al.: Snapshot ensembles: train 1, get M for free (ICLR 2017).
    """

    cycles: int = 5
    floor: float = 0.0
    moment: ClassVar[Moment] = "cycle"

    def __post_init__(self) -> None:
        _whole(self, "cycles", self.cycles, "of descents, 1 or more", "5 is usual")
        if not 0 <= self.floor < 1:
            raise MisconfigurationError(f"Cyclic's `floor` must be in [0, 1), got {self.floor!r}: try 0.")

    @property
    def most(self) -> int:
        """One member a cycle."""
        return self.cycles


def _whole(policy: Any, name: str, value: Any, what: str, hint: str) -> None:
    """Refuse what is not a whole number of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise MisconfigurationError(
            f"{type(policy).__name__}'s `{name}` must be a whole number {what}, got {value!r}. {hint}."
        )
