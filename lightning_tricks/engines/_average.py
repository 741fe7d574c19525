"""The weighted mean of open checkpoints, and what must agree for there to be one."""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_tricks.engines._stored import Stored, write_checkpoint
from lightning_tricks.errors import CheckpointError
from lightning_tricks.functional import weighted_mean

__all__ = ["average_stored", "newest_of", "refuse_other_meaning", "refuse_other_weights"]

# Hyper-parameters that say what a module's inputs and outputs mean, rather than how it was trained.
_MEANING = (
    *("labels", "label_names", "classes", "class_names", "class_to_idx", "label2id", "id2label"),
    *("num_labels", "num_classes", "n_classes", "tokenizer", "tokenizer_name", "vocab", "vocab_size"),
    *("name", "model_name", "model_name_or_path", "pretrained_model_name_or_path"),
)
_GROUPS = ("hyper_parameters", "datamodule_hyper_parameters")
_PART = 2**19  # elements that are read, summed and divided together: few reads, and still in a core's cache
_KEPT = ("epoch", "global_step", "pytorch-lightning_version", "hparams_name", "datamodule_hparams_name", *_GROUPS)


def average_stored(members: Sequence[Stored], weights: Sequence[float], out: Path, record: Mapping[str, Any]) -> None:
    """Write the weighted mean of open checkpoints of one layout; each is read once, a tensor at a time.

    Floating-point tensors are averaged as `functional.weighted_mean` does and keep their dtype; integer and boolean
    ones come from the newest member, and so does what lies beside the weights.

    Args:
        members: at least one. The newest is the one of most steps; of several, the last.
        weights: one for each.
        out: the `.ckpt` or `.safetensors` file to write.
        record: what to note in the checkpoint under `lightning_tricks`.
    """
    newest = newest_of(members)
    rest = {name: newest.rest[name] for name in _KEPT if name in newest.rest}
    record = {**dict(newest.rest.get("lightning_tricks") or {}), **record}

    def entries() -> Iterator[tuple[str, Tensor]]:
        for name, (dtype, _) in newest.layout.items():
            if dtype.is_floating_point or dtype.is_complex:
                yield name, _mean_of(members, name, weights)
            else:
                yield name, newest.tensor(name)

    if out.suffix == ".safetensors":  # which holds no record
        rest |= record.get("averaged", {})
    write_checkpoint(out, newest.layout, entries(), {**rest, "lightning_tricks": record})


def _mean_of(members: Sequence[Stored], name: str, weights: Sequence[float]) -> Tensor:
    wholes = [member.weights[name] for member in members]
    if any(whole.fill is None for whole in wholes):
        return weighted_mean((member.tensor(name) for member in members), weights)
    mean = torch.empty(wholes[0].shape, dtype=wholes[0].dtype)
    pieces = _pieces(members, name, mean.numel(), mean.dtype)
    for part in mean.view(-1).split(_PART) if mean.numel() else ():  # type: ignore[no-untyped-call]
        part.copy_(weighted_mean(itertools.islice(pieces, len(members)), weights))
    return mean


def _pieces(members: Sequence[Stored], name: str, numel: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """The first part of a tensor from each member, then the second, and so on; each is gone when the next is taken.

    A thread reads ahead while the one before is summed up: reading and summing take about as long.
    """
    rooms = itertools.cycle([torch.empty(min(_PART, numel), dtype=dtype) for _ in range(2)])
    jobs = ((member, start, next(rooms)) for start in range(0, numel, _PART) for member in members)

    def read(job: tuple[Stored, int, Tensor]) -> Tensor:
        member, start, room = job
        values = room[: numel - start]
        member.elements_into(name, values, start)
        return values

    with ThreadPoolExecutor(max_workers=1) as reader:
        ahead = reader.submit(read, next(jobs))
        for job in jobs:
            values, ahead = ahead.result(), reader.submit(read, job)
            yield values
        yield ahead.result()


def newest_of(members: Sequence[Stored]) -> Stored:
    """The member of most steps; of several, the last."""
    return max(enumerate(members), key=lambda pair: (pair[1].step, pair[0]))[1]


def refuse_other_weights(reference: Stored, other: Stored) -> None:
    """Refuse to average two checkpoints of which a tensor's name, shape or dtype differs.

    Raises:
        CheckpointError: naming both and the first such tensor.
    """
    ours, theirs = reference.layout, other.layout
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            raise CheckpointError(
                f"cannot combine {other.path} with {reference.path}: `{name}` is {_told(theirs.get(name))} in the one"
                f" and {_told(ours.get(name))} in the other. Combine checkpoints of the same model."
            )


def refuse_other_meaning(reference: Stored, other: Stored, ignore: Collection[str] = ()) -> None:
    """Refuse to combine two checkpoints whose hyper-parameters say that they have other labels, or another tokenizer.

    Args:
        reference: a checkpoint.
        other: another.
        ignore: hyper-parameters that may differ.

    Raises:
        CheckpointError: naming both and the first such hyper-parameter.
    """
    for group in _GROUPS:
        ours, theirs = (stored.rest.get(group) or {} for stored in (reference, other))
        for name in _MEANING:
            if name in ignore or name not in ours or name not in theirs or _plain(ours[name]) == _plain(theirs[name]):
                continue
            raise CheckpointError(
                f"cannot combine {other.path} with {reference.path}: the hyper-parameter `{name}` is"
                f" {theirs[name]!r} in the one and {ours[name]!r} in the other, so that their inputs or outputs mean"
                f" different things. If they do not, pass ignore=[{name!r}]."
            )


def _plain(value: Any) -> Any:
    """Sequences and mappings of any kind as Python's own."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def _told(entry: tuple[Any, tuple[int, ...]] | None) -> str:
    return "absent" if entry is None else f"{str(entry[0]).removeprefix('torch.')} of shape {list(entry[1])}"
