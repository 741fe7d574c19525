"""The stratified split: every class in every part, in proportion, by seed."""

import numpy as np
import pytest

from lightning_tricks.data.split import stratified_split
from lightning_tricks.errors import DataError, MisconfigurationError

CLASSES = ["a"] * 700 + ["b"] * 250 + ["c"] * 47 + ["d"] * 3


def shares(rows):
    names, counts = np.unique(np.asarray(CLASSES)[rows], return_counts=True)
    return dict(zip(names.tolist(), counts.tolist(), strict=True))


def test_parts_are_disjoint_complete_and_stratified():
    split = stratified_split(CLASSES, seed=0)
    assert sorted(np.concatenate(split)) == list(range(len(CLASSES)))
    assert shares(split.train) == {"a": 560, "b": 200, "c": 37, "d": 1}
    assert shares(split.val) == shares(split.test) == {"a": 70, "b": 25, "c": 5, "d": 1}


def test_the_seed_alone_decides():
    first, again, other = (stratified_split(CLASSES, seed=seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first.train, other.train)


def test_a_limit_takes_classes_in_proportion_and_never_moves_a_sample_to_another_part():
    whole, part = stratified_split(CLASSES, seed=0), stratified_split(CLASSES, seed=0, limit=100)
    assert sum(map(len, part)) == pytest.approx(100, abs=5)
    assert shares(part.train) == {"a": 56, "b": 20, "c": 4, "d": 1}
    assert all(set(small) <= set(large) for small, large in zip(part, whole, strict=True))
    assert all(map(np.array_equal, stratified_split(CLASSES, seed=0, limit=10**6), whole))


def test_bad_input():
    with pytest.raises(DataError, match="Class `rare` has 1 example, too few to be stratified"):
        stratified_split(["a"] * 9 + ["rare"] + ["b"] * 5, seed=0)
    with pytest.raises(DataError, match="Class `b` has 2 examples, too few"):
        stratified_split(["a"] * 9 + ["b"] * 2, seed=0)
    with pytest.raises(DataError, match="There is one class only, `a`"):
        stratified_split(["a"] * 9, seed=0)
    with pytest.raises(MisconfigurationError, match="`limit` must be at least 12, three for each class, got 11"):
        stratified_split(CLASSES, seed=0, limit=11)
