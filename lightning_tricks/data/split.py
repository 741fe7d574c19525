"""Split samples into training, validation and test parts that have the same share of every class."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lightning_tricks.errors import DataError, MisconfigurationError

__all__ = ["Split", "stratified_split"]

HELD_OUT = 0.1  # the share of validation, and of test


class Split(NamedTuple):
    """Sample indices, int64 and ascending, of the three parts."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def stratified_split(classes: Sequence[str], *, seed: int, limit: int | None = None) -> Split:
    """80% of each class for training, 10% for validation, 10% for test, and at least one example in each part.

    Args:
        classes: the class of each sample.
        seed: of the shuffle within each class.
        limit: use only about this many samples in all, the classes and parts in proportion. What is in one part
            with a limit is in no other part without it.

    Raises:
        DataError: if there is only one class, or a class has fewer than 3 examples.
        MisconfigurationError: if `limit` is below three samples a class.

    Example:
        >>> split = stratified_split(["a"] * 20 + ["b"] * 10, seed=0)
        >>> [len(part) for part in split]
        [24, 3, 3]
    """
    found, codes, counts = np.unique(np.asarray(classes, dtype=str), return_inverse=True, return_counts=True)
    _refuse_unsplittable(found, counts)
    if limit is not None and limit < 3 * len(found):
        raise MisconfigurationError(f"`limit` must be at least {3 * len(found)}, three for each class, got {limit}.")
    share = 1.0 if limit is None else min(1.0, limit / len(codes))
    generator = np.random.default_rng(seed)
    parts = [_split_class(generator.permutation(np.flatnonzero(codes == c)), share) for c in range(len(found))]
    return Split(*(np.sort(np.concatenate(part)) for part in zip(*parts, strict=True)))


def _split_class(rows: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    held_out = max(1, round(HELD_OUT * len(rows)))
    parts = rows[2 * held_out :], rows[:held_out], rows[held_out : 2 * held_out]
    train, val, test = (part[: max(1, round(share * len(part)))] for part in parts)
    return train, val, test


def _refuse_unsplittable(found: np.ndarray, counts: np.ndarray) -> None:
    if len(found) < 2:
        raise DataError(f"There is one class only, `{found[0]}`. Choose a label column with at least two.")
    for name, count in zip(found, counts, strict=True):
        if count < 3:
            raise DataError(
                f"Class `{name}` has {count} example{'s' * int(count > 1)}, too few to be stratified: training,"
                " validation and test need one each. Add examples, merge it into another class, or remove it."
            )
