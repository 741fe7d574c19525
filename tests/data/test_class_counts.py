"""Counting classes: labels at hand, data sets read once, and passes that were interrupted."""

import json

import lightning
import numpy as np
import pytest
import torch

from lightning_tricks.data import class_counts, count_classes
from lightning_tricks.errors import DataError, MisconfigurationError
from lightning_tricks.mixins import ClassWeightedLossMixin

LABELS = [0, 2, 1, 0, 2, 2, -100, 0] * 100
COUNTS = [300, 100, 300]


class Samples:
    """A data set that knows which of its samples were read, and can fail at one."""

    def __init__(self, labels, fails_at=None, sample=lambda label: (torch.zeros(2), label)):
        self.labels, self.fails_at, self.sample, self.read = labels, fails_at, sample, []

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        if index == self.fails_at:
            raise KeyboardInterrupt
        self.read.append(index)
        return self.sample(self.labels[index])


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda labels: torch.tensor(labels).view(100, 8)])
def test_labels_at_hand(kind):
    assert count_classes(kind(LABELS), 3) == COUNTS


@pytest.mark.parametrize(
    "sample",
    [
        lambda label: (torch.zeros(2), label),
        lambda label: {"x": 1, "label": label},
        lambda label: {"labels": torch.tensor(label)},
    ],
)
def test_a_data_set_is_read_once(sample):
    data = Samples(LABELS, sample=sample)
    assert count_classes(data, 3) == COUNTS
    assert data.read == list(range(len(LABELS)))


def test_every_token_has_a_label():
    data = Samples([[0, 1, -100], [2], []], sample=lambda labels: {"tags": torch.tensor(labels, dtype=torch.int64)})
    assert count_classes(data, 3, label=lambda sample: sample["tags"]) == [1, 1, 1]


def test_what_was_counted_is_kept(tmp_path):
    cache = tmp_path / "counts.json"
    assert count_classes(Samples(LABELS), 3, cache=cache) == COUNTS
    again = Samples(LABELS)
    assert count_classes(again, 3, cache=cache) == COUNTS
    assert len(again.read) == class_counts.PROBES


def test_an_interrupted_pass_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(class_counts, "SAVE_EVERY", 0.0)
    cache = tmp_path / "counts.json"
    with pytest.raises(KeyboardInterrupt):
        count_classes(Samples(LABELS, fails_at=600), 3, cache=cache)
    done = json.loads(cache.read_text())["done"]
    assert done == 2 * class_counts.CHUNK
    rest = Samples(LABELS)
    assert count_classes(rest, 3, cache=cache) == COUNTS
    assert rest.read[class_counts.PROBES :] == list(range(done, len(LABELS)))


@pytest.mark.parametrize("other", [LABELS[:-1], [1, *LABELS[1:]]])
def test_another_data_set_is_counted_anew(other, tmp_path):
    cache = tmp_path / "counts.json"
    count_classes(Samples(LABELS), 3, cache=cache)
    assert count_classes(Samples(other), 3, cache=cache) == count_classes(other, 3) != COUNTS


@pytest.mark.parametrize("text", ["", "[1]", '{"of": 1}'])
def test_a_damaged_file_is_named(text, tmp_path):
    cache = tmp_path / "counts.json"
    cache.write_text(text)
    with pytest.raises(DataError, match=r"counts\.json are damaged: .*Delete it"):
        count_classes(Samples(LABELS), 3, cache=cache)


def test_a_label_that_is_no_class_is_named_with_its_place():
    with pytest.raises(DataError, match="label 2 is 3, which is no class: there are 3, so labels are 0 to 2"):
        count_classes([0, 1, 3], 3)
    with pytest.raises(DataError, match="the label of sample 1 is -1, which is no class"):
        count_classes(Samples([0, -1]), 3)
    with pytest.raises(DataError, match=r"sample 0: labels must be whole numbers, got float64"):
        count_classes(Samples([0.5]), 3)


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(MisconfigurationError, match="2 or more, got 1"):
        count_classes([0], 1)
    with pytest.raises(MisconfigurationError, match="got generator"):
        count_classes((label for label in LABELS), 3)
    with pytest.raises(MisconfigurationError, match=r"no `label` or `labels`, only \['x'\]"):
        count_classes(Samples([0], sample=lambda label: {"x": label}), 3)
    with pytest.raises(MisconfigurationError, match="a sample is int"):
        count_classes(Samples([0], sample=lambda label: label), 3)


ROWS = [[0, 1, 1], [0, 0, -100], [0, 1, 0], [1, 1, 1]]
OF_LABELS = [[3, 1], [1, 3], [1, 2]]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, Samples])
def test_labels_of_which_any_number_may_hold(kind, tmp_path):
    cache = tmp_path / "counts.json"
    assert count_classes(kind(ROWS), 3, multi_label=True, cache=cache) == OF_LABELS
    assert count_classes(Samples(ROWS), 3, multi_label=True, cache=cache) == OF_LABELS
    module = type("Module", (ClassWeightedLossMixin, lightning.LightningModule), {})()
    module.weigh_classes(count_classes(kind(ROWS), 3, multi_label=True))
    assert module.class_weights.shape == (3, 2)


def test_an_interrupted_pass_over_several_labels_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(class_counts, "SAVE_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        count_classes(Samples(ROWS * 200, fails_at=600), 3, cache=tmp_path / "counts.json", multi_label=True)
    rest = Samples(ROWS * 200)
    found = count_classes(rest, 3, cache=tmp_path / "counts.json", multi_label=True)
    assert found == [[200 * count for count in pair] for pair in OF_LABELS]
    assert len(rest.read) == class_counts.PROBES + len(rest) - 2 * class_counts.CHUNK


def test_labels_that_do_not_fit_are_named():
    with pytest.raises(DataError, match="label 1, 0 is 2, which is no class: there are 2"):
        count_classes(np.array([[0, 1], [2, 1]]), 2, multi_label=True)
    with pytest.raises(DataError, match=r"sample 0: labels must be 3, each 0 or 1, got shape \(2,\)"):
        count_classes(Samples([[0, 1]]), 3, multi_label=True)
    with pytest.raises(DataError, match=r"must be 2, each 0 or 1, got shape \(3,\)"):
        count_classes(np.array([0, 1, 1]), 2, multi_label=True)
    with pytest.raises(MisconfigurationError, match="`classes` must be their number, 1 or more, got 0"):
        count_classes([[0]], 0, multi_label=True)


def test_another_fingerprint_is_another_data_set(tmp_path):
    """Its labels may differ where they are not probed."""
    one, other = Samples(LABELS), Samples([LABELS[0], 1, *LABELS[2:]])
    one.fingerprint, other.fingerprint = lambda: "first", lambda: "second"
    cache = tmp_path / "counts.json"
    assert count_classes(one, 3, cache=cache) == COUNTS
    assert count_classes(other, 3, cache=cache) == [300, 101, 299]
