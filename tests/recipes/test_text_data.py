"""TextClassificationData: from a file to batches, and bad input refused before training."""

from collections import Counter

import lightning as L
import numpy as np
import pytest
import torch

from lightning_tricks.data import tokens
from lightning_tricks.errors import DataError, MisconfigurationError
from lightning_tricks.recipes import TextClassificationData
from tests.trainers import quiet_trainer


def make(path, **options):
    return TextClassificationData(str(path), **{"text": "remark", "label": "mood", "batch_size": 4, **options})


def ready(path, **options):
    data = make(path, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def texts_of(data, loader):
    found = []
    for batch in loader:
        found += data.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    return found


def lines(path):
    return [line.split("\t") for line in path.read_text().splitlines()[1:]]


def test_reviews_are_what_the_documentation_says():
    data = TextClassificationData()
    assert data.labels == ["fresh", "plot", "rotten"]
    counts = Counter(data._classes)
    assert counts == {"fresh": 7403, "rotten": 5405, "plot": 1083}
    assert counts.total() == 13_891
    assert data.class_counts == [counts[label] - 2 * round(counts[label] / 10) for label in data.labels]


def test_labels_and_counts_are_there_after_construction(tsv):
    data = make(tsv)
    assert data.labels == ["calm", "keen", "rare"]
    assert data.class_counts == [24, 16, 8]


def test_loaders_hold_every_text_once_with_its_class(tsv):
    data = ready(tsv)
    loaders = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader()]
    pairs = []
    for loader in loaders:
        names = [data.labels[index] for batch in loader for index in batch["labels"]]
        pairs += zip(names, texts_of(data, loader), strict=True)
    assert sorted(pairs) == sorted(map(tuple, lines(tsv)))
    assert [sum(len(batch["labels"]) for batch in loader) for loader in loaders] == [48, 6, 6]


def test_a_token_budget_for_training_alone(tsv):
    data, plain = ready(tsv, max_length=16, max_tokens=32), ready(tsv, max_length=16)
    loader = data.train_dataloader()
    batches = list(loader)
    assert sorted(texts_of(data, batches)) == sorted(texts_of(plain, plain.train_dataloader()))
    assert len(loader) == len(batches)
    assert max(batch["input_ids"].numel() for batch in batches) <= 32
    assert len({len(batch["labels"]) for batch in batches}) > 1
    assert texts_of(data, data.val_dataloader()) == texts_of(plain, plain.val_dataloader())


def test_training_is_reshuffled_and_evaluation_goes_by_length(tsv):
    data = ready(tsv)
    train, val = data.train_dataloader(), data.val_dataloader()
    first = texts_of(data, train)
    train.set_epoch(1)
    second = texts_of(data, train)
    assert first != second
    assert sorted(first) == sorted(second)
    lengths = [int(row.sum()) for batch in val for row in batch["attention_mask"]]
    assert lengths == sorted(lengths)


def test_padding_goes_to_the_longest_of_the_batch_and_texts_are_cut(tsv):
    batches = list(ready(tsv).val_dataloader())
    assert all(batch["input_ids"].shape[1] == batch["attention_mask"].sum(1).max() for batch in batches)
    assert len({batch["input_ids"].shape[1] for batch in batches}) == 2
    whole, cut = (
        [batch["input_ids"].shape[1] for batch in data.train_dataloader()]
        for data in (ready(tsv), ready(tsv, max_length=8))
    )
    assert max(whole) > 8
    assert cut == [min(8, width) for width in whole]


def test_prediction_needs_no_labels_and_keeps_the_order_of_the_file(tmp_path, tsv):
    path = tmp_path / "unlabelled.csv"
    path.write_text("remark\n" + "\n".join(text for _, text in lines(tsv)))
    data = make(path)
    data.prepare_data()
    data.setup("predict")
    loader = data.predict_dataloader()
    assert texts_of(data, loader) == [text for _, text in lines(tsv)]
    assert all("labels" not in batch for batch in loader)


def test_a_limit_is_stratified(tsv):
    assert make(tsv, limit=30).class_counts == [12, 8, 4]


def test_texts_are_tokenised_once(tsv, monkeypatch):
    ready(tsv)

    def never(*_):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(tokens, "_tokenize", never)
    ready(tsv, seed=5, limit=30, batch_size=2)


class Reader(L.LightningModule):
    """It keeps the tokens of the batches that it trains on."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.ones(1)), []

    def training_step(self, batch):
        self.seen.append(batch["input_ids"].tolist())
        return self.weight.square().sum()

    def validation_step(self, batch):
        return None

    def test_step(self, batch):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many")
@pytest.mark.parametrize("max_tokens", [None, 128])
def test_a_new_fit_starts_at_the_beginning_whatever_was_tested_before(tsv, tmp_path, max_tokens):
    data, modules = make(tsv, max_tokens=max_tokens), (Reader(), Reader())
    for module in modules:
        run = quiet_trainer(tmp_path, max_steps=3, val_check_interval=1000, check_val_every_n_epoch=None)
        run.fit(module, datamodule=data)
        run.save_checkpoint(tmp_path / "saved.ckpt")
        run.test(module, datamodule=data, ckpt_path=tmp_path / "saved.ckpt", verbose=False)
    assert modules[0].seen == modules[1].seen


def test_overfitting_repeats_the_same_batches(tsv, tmp_path):
    data = ready(tsv)
    data.trainer = L.Trainer(overfit_batches=2, logger=False, enable_checkpointing=False, accelerator="cpu")
    loader = data.train_dataloader()
    first = texts_of(data, loader)
    loader.set_epoch(1)
    assert texts_of(data, loader) == first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("mood\tremarks\na\tb\n", r"no column `remark`. Its columns are `mood`, `remarks`. Did you mean `remarks`\?"),
        ("mood\tremark\na\t\na\tb\n", "Column `remark` of .* is blank in 1 of 2 rows: row 1. Remove or fill it"),
        ("", "is empty"),
    ],
)
def test_bad_texts(tsv, content, message):
    tsv.write_text(content)
    with pytest.raises(DataError, match=message):
        make(tsv).prepare_data()


def test_bad_labels(tsv):
    with pytest.raises(DataError, match=r"no column `moods`. .* Did you mean `mood`"):
        _ = make(tsv, label="moods").labels
    tsv.write_text(tsv.read_text() + "alone\tone text\n")
    with pytest.raises(DataError, match="Class `alone` has 1 example, too few to be stratified"):
        _ = make(tsv).class_counts
    tsv.write_text(tsv.read_text() + "\tone text\n")
    with pytest.raises(DataError, match=r"Column `mood` of .* is blank in 1 of 62 rows: row 62"):
        _ = make(tsv).labels


@pytest.mark.parametrize("path", ["gone.csv", "texts.docx"])
def test_bad_files(path):
    with pytest.raises(DataError, match=path):
        _ = make(path).labels


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 100}, "`max_tokens=100` is less than `max_length=128`"),
        ({"max_length": 4}, "`max_length` must be at least 8, got 4"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"seed": -1}, "`seed` must be at least 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(MisconfigurationError, match=message):
        make("a.csv", **options)


def test_options_that_do_not_fit_the_data_or_the_model(tsv):
    with pytest.raises(MisconfigurationError, match="`limit` must be at least 9"):
        _ = make(tsv, limit=5).class_counts
    with pytest.raises(MisconfigurationError, match="`max_length=600` is more than `all-minilm-l6-v2` takes, 512"):
        make(tsv, max_length=600).prepare_data()
    with pytest.raises(MisconfigurationError, match="call `setup"):
        make(tsv).train_dataloader()
    with pytest.raises(DataError, match="There is no tokenizer `no/such`"):
        make(tsv, tokenizer="no/such").prepare_data()


def test_two_processes_see_the_same_split(tsv):
    first, second = make(tsv)._split, make(tsv)._split
    assert all(map(np.array_equal, first, second))
