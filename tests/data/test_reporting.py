"""The report counts what the loader's batches hold, and `bucketed` gives a data module better ones."""

import functools

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_tricks.data import (
    ClassBalancedSampler,
    DynamicPaddingCollator,
    LengthBucketSampler,
    TricksDataLoader,
    bucketed,
    report,
)
from lightning_tricks.errors import DataError, MisconfigurationError
from tests.trainers import quiet_trainer

LENGTHS = np.random.default_rng(0).integers(1, 50, 200)
DATA = [{"input_ids": [1] * int(length)} for length in LENGTHS]


def loaded(collate, sampler):
    return TricksDataLoader(DATA, sampler=sampler, collate_fn=collate)


@pytest.mark.parametrize("pad_to", [1, 8])
def test_as_the_batches_themselves(pad_to):
    sampler = LengthBucketSampler(LENGTHS, max_tokens=256, pad_to=pad_to)
    batches = [batch["input_ids"] for batch in loaded(DynamicPaddingCollator(pad_to=pad_to), sampler)]
    found = report(loaded(None, sampler))
    assert found.counts.ravel().tolist() == [len(batch) for batch in batches]
    assert found.widths.ravel().tolist() == [batch.shape[1] for batch in batches]
    assert found.tokens.ravel().tolist() == [int(batch.sum()) for batch in batches]
    real, whole = sum(int(batch.sum()) for batch in batches), sum(batch.numel() for batch in batches)
    assert found.waste == pytest.approx(1 - real / whole)
    assert found.useful_share == [pytest.approx(real / whole)]
    assert found.lengths.sum() == real
    assert f"{found.waste:.1%} of all tokens are padding" in str(found)
    assert len(found.shapes) <= len(batches)


def test_ranks_wait_for_the_slowest():
    sampler = LengthBucketSampler([1, 1, 4, 9], batch_size=1, window=1)
    found = report(TricksDataLoader(range(4), sampler=sampler), ranks=2)
    assert found.counts.shape == (2, 2)
    slowest = (found.counts * found.widths).max(1).sum()
    assert sum(found.useful_share) == pytest.approx(15 / slowest)
    assert found.tokens_per_step[0] + found.tokens_per_step[2] == 15


def test_of_other_loaders():
    for loader in (
        DataLoader(DATA, batch_size=8, collate_fn=list),
        TricksDataLoader(DATA, batch_size=8, shuffle=False, seed=0),
    ):
        found = report(loader)
        assert found.tokens.sum() == LENGTHS.sum()
        assert found.widths.ravel().tolist() == [LENGTHS[at : at + 8].max() for at in range(0, 200, 8)]
    labels = np.arange(200) % 3
    balanced = ClassBalancedSampler(labels, within=LengthBucketSampler(LENGTHS, max_tokens=300))
    assert len(report(TricksDataLoader(DATA, sampler=balanced)).lengths) == 201
    assert report(TricksDataLoader(DATA, sampler=ClassBalancedSampler(labels))).lengths.sum() > 0


@pytest.mark.parametrize("own", [False, True])
def test_a_report_leaves_the_random_numbers_alone(own):
    """The next epoch is the one that would have come, and that is the one reported on."""

    def loader():
        generator = torch.Generator().manual_seed(3) if own else None
        return DataLoader(DATA, batch_size=8, shuffle=True, collate_fn=list, generator=generator)

    torch.manual_seed(7)
    expected = [[len(sample["input_ids"]) for sample in batch] for batch in loader()]
    torch.manual_seed(7)
    reported = loader()
    before = torch.get_rng_state()
    found = report(reported)
    assert torch.equal(torch.get_rng_state(), before)
    assert [[len(sample["input_ids"]) for sample in batch] for batch in reported] == expected
    assert sorted(found.lengths.tolist()) == sorted(LENGTHS.tolist())


def test_plot():
    pytest.importorskip("matplotlib")
    figure, axes = report(loaded(None, LengthBucketSampler(LENGTHS))).plot()
    assert [axis.get_xlabel() for axis in axes] == ["tokens of a sample", "samples of a batch"]
    assert sum(bar.get_height() for bar in axes[0].patches) == 200
    assert axes[0].figure is figure


def test_bad_input():
    with pytest.raises(MisconfigurationError, match="no report on a list"):
        report([1])
    with pytest.raises(DataError, match="There are 1 lengths, but 200 samples"):
        report(loaded(None, LengthBucketSampler(LENGTHS)), lengths=[1])


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(DATA, batch_size=16, shuffle=True, collate_fn=DynamicPaddingCollator())


class Spy(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.shapes = []

    def training_step(self, batch):
        self.shapes.append(tuple(batch["input_ids"].shape))
        return self.layer(batch["input_ids"].float().mean()[None]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-4)


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_bucketed_data_modules_train(tmp_path):
    module = Spy()
    data = bucketed(Data(), functools.partial(LengthBucketSampler, max_tokens=200), cache=tmp_path / "lengths.npy")
    run = quiet_trainer(tmp_path, max_epochs=1)
    run.fit(module, datamodule=data)
    assert sum(count for count, _ in module.shapes) == 200
    assert max(count * width for count, width in module.shapes) <= 200
    assert isinstance(run.train_dataloader, TricksDataLoader)
    assert len(bucketed(Data()).train_dataloader()) == 13


def test_bucketed_needs_one_loader():
    class Two(Data):
        def train_dataloader(self):
            return [super().train_dataloader()] * 2

    with pytest.raises(MisconfigurationError, match="gives one DataLoader, got list"):
        bucketed(Two()).train_dataloader()
