"""The greedy soup: a mean of checkpoints that takes in only what does not make it worse."""

import math
import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from lightning_tricks.errors import CheckpointError, MisconfigurationError
from lightning_tricks.functional import greedy_selection
from lightning_tricks.inference._adapters import AdapterMerger
from lightning_tricks.inference._members import checked_paths, open_members
from lightning_tricks.inference.averaging import average_members, checked_out

__all__ = ["Soup", "greedy_soup"]


@dataclass(frozen=True)
class Soup:
    """What `greedy_soup` came to.

    Attributes:
        path: the file that it wrote.
        score: its score.
        members: what is in it, best first.
        rejected: what is not, and why.
        scores: each member's own score.
    """

    path: Path
    score: float
    members: tuple[Path, ...]
    rejected: dict[Path, str]
    scores: dict[Path, float]


def greedy_soup(
    paths: Sequence[str | Path],
    score: Callable[[Path], float],
    out: str | Path,
    *,
    mode: Literal["min", "max"] = "max",
    ignore: Collection[str] = (),
    module: nn.Module | None = None,
) -> Soup:
    """Average checkpoints one after another, best first, and keep each that does not make the mean score worse.

    So the result is never worse than the best member by the same score, and the same for the same scores. Members of
    equal score keep their order; one whose score is not finite is rejected.

    Args:
        paths: as for `average_checkpoints`.
        score: called with a checkpoint file of the kind of `out` that holds the weights to score, whichever engine
            wrote the members: `lambda path: evaluate(Model.load_from_checkpoint(path))`. Score held-out data, and
            judge the result by others still. The file is deleted afterwards.
        out: the `.ckpt` or `.safetensors` file to write.
        mode: `max` if a higher score is better, `min` if a lower one is.
        ignore: as for `average_checkpoints`.
        module: as for `average_checkpoints`.

    Raises:
        MisconfigurationError: for no path, another mode, or a score that is no number.
        CheckpointError: as `average_checkpoints`, before anything is scored; or if no score is finite.

    Example:
        >>> import tempfile, torch
        >>> folder = Path(tempfile.mkdtemp())
        >>> for value in (1.0, 4.0, 9.0):
        ...     torch.save({"state_dict": {"w": torch.tensor(value)}}, folder / f"{value:g}.ckpt")
        >>> def distance(path: Path) -> float:
        ...     return abs(3 - torch.load(path, weights_only=True)["state_dict"]["w"].item())
        >>> soup = greedy_soup([folder / f"{n}.ckpt" for n in (1, 4, 9)], distance, folder / "soup.ckpt", mode="min")
        >>> [path.name for path in soup.members], soup.score
        (['4.ckpt', '1.ckpt'], 0.5)

    References:
        Wortsman et al.: Model soups: averaging weights of multiple fine-tuned models (ICML 2022), recipe 1.
    """
    if mode not in ("min", "max"):
        raise MisconfigurationError(f"`mode` must be 'min' or 'max', got {mode!r}.")
    chosen, out = checked_paths(paths), checked_out(out, paths)
    if len(set(chosen)) < len(chosen):
        raise MisconfigurationError(f"a checkpoint is given twice: {', '.join(map(str, chosen))}.")
    members, _ = open_members(chosen, AdapterMerger(module), ignore=ignore)
    trial = out.with_name(f".soup-{secrets.token_hex(4)}{out.suffix}")

    def score_together(places: list[int]) -> float:
        average_members([members[place] for place in places], [1.0] * len(places), trial)
        return _number(score(trial))

    try:
        scores = [score_together([place]) for place in range(len(members))]
        if not any(map(math.isfinite, scores)):
            raise CheckpointError(f"no checkpoint has a finite score: {scores}. Nothing is written.")
        found = greedy_selection(scores, score_together, mode=mode)
        average_members([members[place] for place in found.chosen], [1.0] * len(found.chosen), out)
    finally:
        trial.unlink(missing_ok=True)
    return Soup(
        out,
        found.score,
        tuple(chosen[place] for place in found.chosen),
        {chosen[place]: _reason(value) for place, value in found.tried.items()},
        dict(zip(chosen, scores, strict=True)),
    )


def _reason(value: float) -> str:
    if not math.isfinite(value):
        return f"its score, or that of the mean with it, is {value}"
    return f"the mean with it scores {value:g}, worse than without it"


def _number(value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise MisconfigurationError(f"`score` must return a number, got {value!r}.") from error
