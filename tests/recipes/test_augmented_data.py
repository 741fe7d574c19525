"""TextClassificationData(augmented=...): only what was made of training texts is trained on."""

import csv

import numpy as np
import pytest

from lightning_tricks.data._augment_rows import PROVENANCE, checksum
from lightning_tricks.errors import DataError
from lightning_tricks.recipes import TextClassificationData


def make(path, **options):
    return TextClassificationData(str(path), text="remark", label="mood", batch_size=4, **options)


def ready(path, **options):
    data = make(path, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def texts_of(data, loader):
    return [t for b in loader for t in data.tokenizer.batch_decode(b["input_ids"], skip_special_tokens=True)]


@pytest.fixture
def source(tsv):
    return [line.split("\t") for line in tsv.read_text().splitlines()[1:]]


def written(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["remark", "mood", *PROVENANCE], *rows])
    return str(path)


def row(source, number, text=None, **changed):
    mood, remark = source[number - 1]
    origin = {"row": number, "checksum": checksum(remark), "mood": mood, **changed}
    made = text or f"again {remark}"
    return [made, origin["mood"], origin["row"], origin["checksum"], "paraphrase", "m", 0, 0, 0.5]


@pytest.fixture
def augmented(source, tmp_path):
    """Two texts of each of the file's, in another order than theirs."""
    numbers = np.random.default_rng(0).permutation(len(source)) + 1
    rows = [row(source, int(n), f"again {source[n - 1][1]} {copy}") for n in numbers for copy in ("one", "two")]
    return written(tmp_path / "augmented.csv", rows)


@pytest.mark.parametrize("options", [{}, {"seed": 3}, {"limit": 30}, {"fold": (1, 4)}])
def test_no_text_held_out_comes_back_in_other_words(tsv, augmented, options):
    plain, data = ready(tsv, **options), ready(tsv, augmented=augmented, **options)
    own = texts_of(plain, plain.train_dataloader())
    expected = own + [f"again {text} {copy}" for text in own for copy in ("one", "two")]
    assert sorted(texts_of(data, data.train_dataloader())) == sorted(expected)
    for name in ("val_dataloader", "test_dataloader"):
        assert texts_of(data, getattr(data, name)()) == texts_of(plain, getattr(plain, name)())
    assert data.labels == plain.labels
    assert data.class_counts == [3 * count for count in plain.class_counts]


def test_each_has_the_class_of_its_source(tsv, augmented):
    data = ready(tsv, augmented=augmented, max_length=16, max_tokens=64)
    for batch in data.train_dataloader():
        texts = data.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        for text, label in zip(texts, batch["labels"].tolist(), strict=True):
            assert text.removeprefix("again ").split()[0] == data.labels[label]


def test_predictions_are_of_the_file_itself(tsv, source, augmented):
    data = ready(tsv, augmented=augmented)
    assert texts_of(data, data.predict_dataloader()) == [remark for _, remark in source]


def test_a_file_made_of_other_texts_is_refused(tsv, source, tmp_path):
    good = row(source, 1)
    for bad, message in (
        (row(source, 2, checksum=checksum("x")), "Row 2 of .* was not made of row 2 of the data as it is now"),
        (row(source, 2, row=1), "Row 2 of .* was not made of row 1"),
        (row(source, 2, row=999), "was not made of row 999"),
        (row(source, 2, row=0), "was not made of row 0"),
        (row(source, 2, mood="rare"), "was not made of row 2"),
        (row(source, 2, row="two"), "`source_row` of .* is not all whole numbers"),
    ):
        data = make(tsv, augmented=written(tmp_path / "a.csv", [good, bad]))
        with pytest.raises(DataError, match=message):
            data.prepare_data()
    with pytest.raises(DataError, match="has no column `source_row`"):
        make(tsv, augmented=str(tsv)).prepare_data()
