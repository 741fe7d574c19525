"""The greedy soup: a mean of checkpoints that takes in only what does not make it worse."""

import math
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lightning_tricks.errors import CheckpointError, MisconfigurationError
from lightning_tricks.functional import greedy_selection
from lightning_tricks.inference._adapters import AdapterMerger
from lightning_tricks.inference._members import checked_paths, open_members
from lightning_tricks.inference._statistics import checked_source
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
        skipped: those left out by `skip_bad` before anything was scored, and why.
    """

    path: Path
    score: float
    members: tuple[Path, ...]
    rejected: dict[Path, str]
    scores: dict[Path, float]
    skipped: Mapping[Path, str] = field(default_factory=dict)


def greedy_soup(
    paths: Sequence[str | Path],
    score: Callable[[Path], float],
    out: str | Path,
    *,
    mode: Literal["min", "max"] = "max",
    skip_bad: bool = False,
    ignore: Collection[str] = (),
    module: nn.Module | None = None,
    loader: Iterable[Any] | None = None,
    batches: int = 100,
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
        skip_bad: as for `average_checkpoints`.
        ignore: as for `average_checkpoints`.
        module: as for `average_checkpoints`.
        loader: as for `average_checkpoints`, and read anew for each mean that is scored: not an iterator. A member by
            itself keeps its own running statistics.
        batches: as for `average_checkpoints`.

    Raises:
        MisconfigurationError: for no path, another mode, a score that is no number, or a `loader` that can be read
            only once.
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
    given, out = checked_paths(paths), checked_out(out, paths)
    if len(set(given)) < len(given):
        raise MisconfigurationError(f"a checkpoint is given twice: {', '.join(map(str, given))}.")
    checked_source(module, loader, batches)
    if isinstance(loader, Iterator):
        raise MisconfigurationError(
            f"`loader` is a {type(loader).__name__}, which can be read once, and each mean needs it: pass the loader"
            " itself, or a list of batches."
        )
    members, skipped = open_members(given, AdapterMerger(module), ignore=ignore, skip_bad=skip_bad)
    chosen = [member.path for member in members]
    trial = out.with_name(f".soup-{secrets.token_hex(4)}{out.suffix}")

    def mix(places: list[int], to: Path) -> None:
        source = loader if len(places) > 1 else None  # a member by itself has statistics of its own
        shares = [1.0] * len(places)
        average_members([members[place] for place in places], shares, to, module=module, loader=source, batches=batches)

    def score_together(places: list[int]) -> float:
        mix(places, trial)
        return _number(score(trial))

    try:
        scores = [score_together([place]) for place in range(len(members))]
        if not any(map(math.isfinite, scores)):
            raise CheckpointError(f"no checkpoint has a finite score: {scores}. Nothing is written.")
        found = greedy_selection(scores, score_together, mode=mode)
        mix(found.chosen, out)
    finally:
        trial.unlink(missing_ok=True)
    return Soup(
        out,
        found.score,
        tuple(chosen[place] for place in found.chosen),
        {chosen[place]: _reason(value) for place, value in found.tried.items()},
        dict(zip(chosen, scores, strict=True)),
        skipped,
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
