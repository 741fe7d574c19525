"""The checkpoints that are combined: opened, compared, and those that cannot be used skipped if that is wanted."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from lightning_tricks.engines import Stored, open_checkpoint, refuse_other_meaning, refuse_other_weights
from lightning_tricks.errors import CheckpointError, MisconfigurationError
from lightning_tricks.functional import same_fingerprint

__all__ = ["checked_paths", "open_members"]

_FACTS = ("average", "updates")  # what WeightAveraging.save_average says of its file
# Where other libraries put a second set of weights into a file, beside the state dict.
_SECOND_SETS = ("state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "ema", "ema_weights")


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
            member = prepare(_opened(path))
            if members:
                _compare(members[0], member, ignore)
            else:
                _refuse_second_sets(member)
            members.append(member)
        except CheckpointError as error:
            if not skip_bad:
                raise
            skipped[path] = str(error)
    if skipped and len(members) < 2:
        raise CheckpointError("fewer than two checkpoints are left to combine: " + " ".join(skipped.values()))
    return members, skipped


def _opened(path: Path) -> Stored:
    """The checkpoint; what a safetensors file says of an average in it, where a checkpoint file says it."""
    stored = open_checkpoint(path)
    facts = {name: stored.rest[name] for name in _FACTS if name in stored.rest}
    if path.suffix != ".safetensors" or len(facts) < len(_FACTS):
        return stored
    return replace(stored, rest={**stored.rest, "lightning_tricks": {"averaged": facts}})


def _compare(reference: Stored, member: Stored, ignore: Collection[str]) -> None:
    _refuse_second_sets(member)
    refuse_other_weights(reference, member)
    refuse_other_meaning(reference, member, ignore)
    _refuse_other_base(reference, member)
    averaged = [stored.path for stored in (reference, member) if _is_average(stored)]
    if len(averaged) == 1:
        other = next(stored.path for stored in (reference, member) if stored.path != averaged[0])
        raise CheckpointError(
            f"cannot combine {member.path} with {reference.path}: {averaged[0]} holds a running average of the weights"
            f" and {other} the weights themselves. Combine checkpoints of one kind."
        )


def _is_average(stored: Stored) -> bool:
    """Whether Lightning's WeightAveraging, or the suite's, says that the weights are a running average."""
    return "averaging_state" in stored.rest or "averaged" in (stored.rest.get("lightning_tricks") or {})


def _refuse_second_sets(member: Stored) -> None:
    for name in _SECOND_SETS:
        if name in member.rest:
            raise CheckpointError(
                f"{member.path} holds two sets of weights, `state_dict` and `{name}`, and does not say which is meant:"
                " save the one you mean to a file of its own."
            )
    for name in (member.rest.get("lightning_tricks") or {}).get("values") or {}:
        if name.startswith("WeightAveraging"):
            raise CheckpointError(
                f"{member.path} is a full checkpoint of a run with WeightAveraging and holds two sets of weights, the"
                f" raw ones and the average `{name}`, and does not say which is meant. For the average give checkpoints"
                " saved with `save_weights_only=True`, or by `save_average`; for the raw weights the files that"
                " `lightning-tricks consolidate` writes of these."
            )


def _refuse_other_base(reference: Stored, member: Stored) -> None:
    ours, theirs = ((stored.rest.get("lightning_tricks") or {}).get("base") or {} for stored in (reference, member))
    for name in [*ours, *theirs]:
        if name not in ours or name not in theirs or not same_fingerprint(ours[name], theirs[name]):
            raise CheckpointError(
                f"cannot combine {member.path} with {reference.path}: they were trained beside different frozen weights"
                f" `{name}`. Combine members that share their base model."
            )
