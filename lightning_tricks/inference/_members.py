"""The checkpoints that are combined: opened, compared, and those that cannot be used skipped if that is wanted."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from lightning_tricks.engines import Stored, open_member, refuse_other_member, refuse_two_sets
from lightning_tricks.errors import CheckpointError, MisconfigurationError

__all__ = ["checked_paths", "open_members"]


def checked_paths(paths: Sequence[str | Path]) -> list[Path]:
    """The members' paths.

    Raises:
        MisconfigurationError: if there is none, or one path instead of several.
    """
    if isinstance(paths, str | Path):
        raise MisconfigurationError(f"`paths` must be several checkpoints, got one: write [{str(paths)!r}].")
    if not paths:
        raise MisconfigurationError("there are no checkpoints to combine, got an empty list: pass at least one path.")
    return [Path(path) for path in paths]


def open_members(
    paths: Sequence[Path],
    prepare: Callable[[Stored], Stored],
    *,
    ignore: Collection[str] = (),
    skip_bad: bool = False,
) -> tuple[list[Stored], dict[Path, str]]:
    """Open checkpoints and refuse those that do not go with the first one; nothing is written yet.

    Args:
        paths: the checkpoints.
        prepare: called with each; raises CheckpointError for what it refuses.
        ignore: hyper-parameters that may differ.
        skip_bad: leave out what is refused.

    Returns:
        The members, and why others were left out.

    Raises:
        CheckpointError: naming the file and what is wrong with it; with `skip_bad`, if fewer than two are left.
    """
    members: list[Stored] = []
    skipped: dict[Path, str] = {}
    for path in paths:
        try:
            member = prepare(open_member(path))
            if members:
                refuse_other_member(members[0], member, ignore)
            else:
                refuse_two_sets(member)
            members.append(member)
        except CheckpointError as error:
            if not skip_bad:
                raise
            skipped[path] = str(error)
    if skipped and len(members) < 2:
        raise CheckpointError("fewer than two checkpoints are left to combine: " + " ".join(skipped.values()))
    return members, skipped
