"""Stratified folds, against scikit-learn's for their sizes."""

import numpy as np
import pytest
from sklearn.model_selection import StratifiedKFold

from lightning_tricks.data.folds import checked_fold, fold_split
from lightning_tricks.data.split import stratified_split
from lightning_tricks.errors import DataError, MisconfigurationError

CLASSES = ["a"] * 57 + ["b"] * 31 + ["c"] * 12


@pytest.mark.parametrize("folds", [2, 3, 5])
@pytest.mark.parametrize("limit", [None, 60])
def test_every_sample_is_held_out_once_and_classes_keep_their_share(folds, limit):
    split = stratified_split(CLASSES, seed=4, limit=limit)
    parts = [fold_split(split, CLASSES, (k, folds), seed=4) for k in range(folds)]
    pool = sorted({*split.train, *split.val})
    assert sorted(row for part in parts for row in part.val) == pool
    labels = np.array(CLASSES)[pool]
    expected = [len(held) for _, held in StratifiedKFold(folds).split(pool, labels)]
    assert sorted(len(part.val) for part in parts) == sorted(expected)
    for part in parts:
        assert sorted([*part.train, *part.val]) == pool
        assert part.test.tolist() == split.test.tolist()
        for name in set(CLASSES):
            share = (labels == name).sum() / folds
            assert abs((np.array(CLASSES)[part.val] == name).sum() - share) < 1


def test_the_seed_decides():
    split = stratified_split(CLASSES, seed=4)
    one, same, other = (fold_split(split, CLASSES, (1, 3), seed=seed).val.tolist() for seed in (0, 0, 1))
    assert one == same != other


def test_too_few_of_a_class():
    with pytest.raises(DataError, match=r"Class `c` has \d+ examples .* 20 folds"):
        fold_split(stratified_split(CLASSES, seed=0), CLASSES, (0, 20), seed=0)


@pytest.mark.parametrize("fold", [(5, 5), (-1, 5), (0, 1), (0,), (0.5, 2)])
def test_bad_folds(fold):
    with pytest.raises(MisconfigurationError, match="`fold`"):
        checked_fold(fold)
