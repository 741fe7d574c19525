"""A checkpoint that is to be combined with others: what it must not hold, and what must agree beside its tensors."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from lightning_tricks.engines._average import refuse_other_meaning, refuse_other_weights
from lightning_tricks.engines._stored import Stored, open_checkpoint
from lightning_tricks.errors import CheckpointError
from lightning_tricks.functional import same_fingerprint

__all__ = ["open_member", "refuse_other_member", "refuse_two_sets"]

_FACTS = ("average", "updates")  # what WeightAveraging.save_average says of its file
# Where other libraries put a second set of weights into a file, beside the state dict.
_SECOND_SETS = ("state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "ema", "ema_weights")


def open_member(path: Path) -> Stored:
    """Open a checkpoint; what a safetensors file says of an average in it stands where a checkpoint file says it.

    Raises:
        CheckpointError: if it cannot be read.
    """
    stored = open_checkpoint(path)
    facts = {name: stored.rest[name] for name in _FACTS if name in stored.rest}
    if path.suffix != ".safetensors" or len(facts) < len(_FACTS):
        return stored
    return replace(stored, rest={**stored.rest, "lightning_tricks": {"averaged": facts}})


def refuse_other_member(reference: Stored, member: Stored, ignore: Collection[str] = ()) -> None:
    """Refuse a checkpoint that does not go with another: weights, labels, tokenizer, base, or average and raw.

    Args:
        reference: a checkpoint.
        member: another.
        ignore: hyper-parameters that may differ.

    Raises:
        CheckpointError: naming both and what differs.
    """
    refuse_two_sets(member)
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


def refuse_two_sets(member: Stored) -> None:
    """Refuse a checkpoint that holds a second set of weights, and does not say which is meant.

    Raises:
        CheckpointError: naming both sets.
    """
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
