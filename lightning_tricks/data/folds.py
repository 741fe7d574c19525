"""Cut the training and validation parts of a split into folds for cross-validation."""

from collections.abc import Sequence

import numpy as np

from lightning_tricks.data.split import Split
from lightning_tricks.errors import DataError, MisconfigurationError

__all__ = ["checked_fold", "fold_split"]


def checked_fold(fold: Sequence[int] | None) -> tuple[int, int] | None:
    """The fold and the number of folds.

    Raises:
        MisconfigurationError: if they are not two whole numbers, the first from 0 to the second less 1.
    """
    if fold is None:
        return None
    numbers = tuple(fold)
    if len(numbers) != 2 or not all(isinstance(number, int) for number in numbers) or numbers[1] < 2:
        raise MisconfigurationError(f"`fold` must be a fold and their number, 2 or more, such as [0, 5], got {fold!r}.")
    if not 0 <= numbers[0] < numbers[1]:
        raise MisconfigurationError(f"`fold` counts from 0 to {numbers[1] - 1}, got {numbers[0]}.")
    return numbers[0], numbers[1]


def fold_split(split: Split, classes: Sequence[str], fold: tuple[int, int], *, seed: int) -> Split:
    """Hold one fold out for validation, and train on the others; the test part stays as it is.

    Every sample of the training and validation parts is in exactly one fold, and a fold has its share of each class.

    Args:
        split: a split of the samples.
        classes: the class of each sample of the whole file.
        fold: which fold, from 0, and how many there are.
        seed: of the shuffle within each class; the same for all folds.

    Raises:
        DataError: if a class has fewer samples than there are folds.

    Example:
        >>> from lightning_tricks.data.split import stratified_split
        >>> classes = ["a"] * 40 + ["b"] * 20
        >>> parts = [fold_split(stratified_split(classes, seed=0), classes, (k, 3), seed=0) for k in range(3)]
        >>> [len(part.val) for part in parts], sorted({*parts[0].val, *parts[1].val, *parts[2].val}) == sorted(
        ...     {*parts[0].train, *parts[0].val}
        ... )
        ([18, 18, 18], True)
    """
    place, count = fold
    pool = np.sort(np.concatenate([split.train, split.val]))
    names, codes = np.unique(np.asarray(classes, dtype=str)[pool], return_inverse=True)
    generator = np.random.default_rng(seed)
    held, start = [], 0
    for code, name in enumerate(names):
        rows = generator.permutation(pool[codes == code])
        if len(rows) < count:
            raise DataError(
                f"Class `{name}` has {len(rows)} examples for training and validation, too few for {count} folds: add"
                " some, merge it into another class, or ask for fewer folds."
            )
        held.append(rows[(np.arange(len(rows)) + start) % count == place])  # so that folds differ by one sample at most
        start += len(rows)
    val = np.sort(np.concatenate(held))
    return Split(np.setdiff1d(pool, val), val, split.test)
