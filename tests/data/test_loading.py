"""How batches are loaded: a DataLoader's usual options, and a data module's loader that keeps them."""

import multiprocessing

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, get_worker_info

from lightning_tricks.data import LengthBucketSampler, TricksDataLoader, bucketed
from lightning_tricks.errors import MisconfigurationError
from tests.trainers import quiet_trainer


class Told(torch.utils.data.Dataset):
    """Samples that tell the process which read them, and what was done there before."""

    told = 0

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.tensor([index, multiprocessing.current_process().pid, Told.told])

    def fingerprint(self):
        return "told"


def tell(worker):
    Told.told = 10 + worker


def make(**options):
    return TricksDataLoader(Told(), batch_size=2, shuffle=True, seed=0, **options)


def test_persistent_workers_stay_and_the_order_is_the_same():
    one, plain = make(num_workers=2, persistent_workers=True, worker_init_fn=tell), make()
    processes = set()
    for epoch in range(3):
        one.set_epoch(epoch)
        plain.set_epoch(epoch)
        found = torch.stack(list(one))
        assert found[..., 0].tolist() == torch.stack(list(plain))[..., 0].tolist()
        assert set(found[..., 2].flatten().tolist()) == {10, 11}
        processes |= set(found[..., 1].flatten().tolist())
    assert len(processes) == 2
    assert multiprocessing.current_process().pid not in processes


def test_persistent_workers_after_an_epoch_that_was_left():
    one, plain = make(num_workers=2, persistent_workers=True), make()
    iterator = iter(one)
    first = next(iterator)[:, 0].tolist()
    resumed = make(num_workers=2, persistent_workers=True)
    resumed.load_state_dict(one.state_dict())
    iterator.close()
    again = [batch[:, 0].tolist() for batch in one]
    assert again == [batch[:, 0].tolist() for batch in plain]
    assert [first, *(batch[:, 0].tolist() for batch in resumed)] == again
    assert [batch[:, 0].tolist() for batch in one.anew()] == again


def test_options_go_on_to_torch_s_loader(monkeypatch):
    options = {"num_workers": 1, "prefetch_factor": 3, "timeout": 20, "pin_memory": True, "worker_init_fn": tell}
    context = multiprocessing.get_context("fork")
    one = make(**options, multiprocessing_context=context)
    torch_s = one._loader((one._fresh(),))
    assert {name: getattr(torch_s, name) for name in options} == options
    assert torch_s.multiprocessing_context is context


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefetch_factor": 2}, "`prefetch_factor=2` is for workers: set `num_workers`"),
        ({"persistent_workers": True}, "`persistent_workers=True` is for workers"),
        ({"multiprocessing_context": "spawn"}, "`multiprocessing_context='spawn'` is for workers"),
        ({"timeout": 3}, "`timeout=3` is for workers"),
        ({"timeout": -1, "num_workers": 1}, "`timeout` must be seconds, at least 0, got -1"),
        ({"prefetch_factor": 0, "num_workers": 1}, "`prefetch_factor` must be a whole number of at least 1, got 0"),
    ],
)
def test_options_that_cannot_be_meant(options, message):
    with pytest.raises(MisconfigurationError, match=message):
        make(**options)


# -- bucketed ----------------------------------------------------------------------------------------------------------

ROWS = [[index] * (1 + index * 7 % 11) for index in range(60)]


def first_tokens(rows):
    assert (get_worker_info() is None) == (Data.workers == 0)
    return torch.tensor([row[0] for row in rows])


class Data(L.LightningDataModule):
    workers = 0

    def __init__(self, **options):
        super().__init__()
        self.options, self.loaded = options, None

    def train_dataloader(self):
        return DataLoader(ROWS, batch_size=4, shuffle=True, collate_fn=first_tokens, **self.options)

    def test_dataloader(self):
        return DataLoader(ROWS, batch_size=4, collate_fn=first_tokens)

    def state_dict(self):
        return {"own": 7}

    def load_state_dict(self, state_dict):
        self.loaded = state_dict


@pytest.mark.parametrize(
    "options",
    [{}, {"num_workers": 1, "prefetch_factor": 3, "persistent_workers": True, "worker_init_fn": tell, "timeout": 9}],
)
def test_the_loader_s_own_options_are_kept(options):
    own = Data(**options).train_dataloader()
    found = bucketed(Data(**options), length=len).train_dataloader()
    for name in ("num_workers", "prefetch_factor", "persistent_workers", "worker_init_fn", "timeout", "pin_memory"):
        assert getattr(found, name) == getattr(own, name)
    again = bucketed(bucketed(Data(**options), length=len), length=len).train_dataloader()
    assert again.prefetch_factor == own.prefetch_factor


class Counted(L.LightningModule):
    """Its schedule asks for the number of steps: Lightning then has the loader before it restores positions."""

    def __init__(self, asks):
        super().__init__()
        self.layer, self.asks, self.seen = torch.nn.Linear(1, 1), asks, []

    def training_step(self, batch):
        self.seen.append(batch.tolist())
        return self.layer(batch[:, None] / 60).square().mean()

    def test_step(self, batch):
        return self.layer(batch[:, None] / 60)

    def configure_optimizers(self):
        self.total = self.trainer.estimated_stepping_batches if self.asks else None
        return torch.optim.SGD(self.parameters(), 0.01)


class Breaks(Counted):
    """It fails once the checkpoint's position is restored."""

    def configure_optimizers(self):
        raise KeyError("broken")


class Save(L.Callback):
    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:The 'train_dataloader' does not have many")
@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("step", [7, 15, 20])
def test_a_resumed_epoch_is_the_uninterrupted_one(tmp_path, asks, step):
    def fit(resume=None):
        data = bucketed(Data(), lambda lengths: LengthBucketSampler(lengths, max_tokens=30, window=3), length=len)
        module = Counted(asks)
        run = quiet_trainer(tmp_path, [Save(tmp_path / "saved.ckpt", step)] if resume is None else [], max_epochs=2)
        run.fit(module, datamodule=data, ckpt_path=resume)
        return module.seen, data

    whole, _ = fit()
    assert step % (len(whole) // 2), "within an epoch"
    for epoch in (whole[: len(whole) // 2], whole[len(whole) // 2 :]):
        assert sorted(sample for batch in epoch for sample in batch) == list(range(60))
    resumed, data = fit(tmp_path / "saved.ckpt")
    assert resumed == whole[step:]
    assert data.loaded == {"own": 7}


@pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:The '.*_dataloader' does not have many")
def test_a_new_fit_starts_at_the_beginning_whatever_was_tested_or_broken_off_before(tmp_path):
    data = bucketed(Data(), lambda lengths: LengthBucketSampler(lengths, max_tokens=30, window=3), length=len)

    def fit(module, **options):
        run = quiet_trainer(tmp_path, max_steps=3, **options)
        run.fit(module, datamodule=data)
        return run, module.seen

    run, first = fit(Counted(False))
    run.save_checkpoint(tmp_path / "saved.ckpt")
    run.test(Counted(False), datamodule=data, ckpt_path=tmp_path / "saved.ckpt")
    position = data.state_dict()
    assert fit(Counted(False))[1] == first
    assert position == data.state_dict(), "a test leaves the position of the fit as it was"

    with pytest.raises(KeyError, match="broken"):
        quiet_trainer(tmp_path).fit(Breaks(False), datamodule=data, ckpt_path=tmp_path / "saved.ckpt")
    assert fit(Counted(False))[1] == first
