"""The average of weights files, one tensor in memory at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_tricks.errors import CheckpointError, MisconfigurationError
from lightning_tricks.storage.weights_file import WeightsFile, write_weights

__all__ = ["average_weights"]


def average_weights(
    members: Sequence[Path],
    out: Path,
    metadata: dict[str, str] | None = None,
    *,
    weights: Sequence[float] | None = None,
) -> None:
    """Write the average of some weights files to a new one.

    Floating-point tensors are summed in double precision and rounded once, so K equal members give themselves back.
    Integer and boolean tensors (counters, masks) have no mean: they come from the last member. Memory: one tensor a
    few times over, however many members there are.

    Args:
        members: weights files with the same names, shapes and dtypes; at least one, oldest first.
        out: the file to write; it appears only when it is complete.
        metadata: strings to store in the file.
        weights: a number above 0 for each member; all alike by default.

    Raises:
        MisconfigurationError: if there is no member, or another number of weights.
        CheckpointError: if a file is truncated, or differs from the first in a name, a shape or a dtype; the first
            one that differs is named.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> from lightning_tricks.storage import WeightsFile, average_weights, write_weights
        >>> folder = Path(tempfile.mkdtemp())
        >>> for value in (1.0, 4.0):
        ...     tensor = torch.tensor([value])
        ...     write_weights(folder / f"{value}", {"w": (tensor.dtype, (1,))}, [("w", tensor)], {})
        >>> average_weights([folder / "1.0", folder / "4.0"], folder / "mean")
        >>> WeightsFile(folder / "mean").tensor("w")
        tensor([2.5000])

    References:
        Wortsman et al.: Model soups: averaging weights of multiple fine-tuned models (ICML 2022).
    """
    if not members:
        raise MisconfigurationError("there are no weights files to average, got an empty list: pass at least one path")
    files = [WeightsFile(Path(member)) for member in members]
    for file, path in zip(files[1:], members[1:], strict=True):
        _refuse_mismatch(files[0], members[0], file, path)
    shares = [1.0] * len(files) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(files) or not min(shares) > 0:
        raise MisconfigurationError(f"`weights` must be a number above 0 for each of {len(files)} files, got {shares}.")
    write_weights(Path(out), files[0].layout, _means(files, shares), dict(metadata or {}))


def _means(files: list[WeightsFile], shares: list[float]) -> Iterator[tuple[str, Tensor]]:
    for name in files[0].layout:
        yield name, _mean(files, name, shares)


def _mean(files: list[WeightsFile], name: str, shares: list[float]) -> Tensor:
    last = files[-1].tensor(name)
    if not (last.is_floating_point() or last.is_complex()):
        return last
    total = last.to(torch.complex128 if last.is_complex() else torch.float64, copy=True).mul_(shares[-1])
    for file, share in zip(files[:-1], shares[:-1], strict=True):
        total.add_(file.tensor(name), alpha=share)
    return (total / sum(shares)).to(last.dtype)


def _refuse_mismatch(reference: WeightsFile, reference_path: Path, file: WeightsFile, path: Path) -> None:
    for name in [*reference.layout, *file.layout]:
        ours, theirs = reference.layout.get(name), file.layout.get(name)
        if ours != theirs:
            raise CheckpointError(
                f"cannot average {path} with {reference_path}: `{name}` is {_describe(theirs)} in the one and "
                f"{_describe(ours)} in the other. Average checkpoints of the same model and the same run."
            )


def _describe(entry: tuple[torch.dtype, tuple[int, ...]] | None) -> str:
    return "absent" if entry is None else f"{str(entry[0]).removeprefix('torch.')} of shape {list(entry[1])}"
