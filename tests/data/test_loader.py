"""TricksDataLoader: every sample once, on any number of ranks, also after interruptions."""

import json
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import IterableDataset

from lightning_tricks.data import TricksDataLoader, loader
from lightning_tricks.data._order import PlainOrder
from lightning_tricks.errors import DataError, MisconfigurationError
from tests.trainers import quiet_trainer as trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:The number of training batches",
)


class Numbers(torch.utils.data.Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return torch.tensor([float(index)])


class Recorder(L.LightningModule):
    """Keeps the samples of every batch it was given."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch, _):
        self.seen.append(batch.flatten().int().tolist())
        return self.layer(batch).mean()

    def validation_step(self, batch, _):
        self.log("val/loss", self.layer(batch).mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-5)


def batches(source):
    return [batch.flatten().int().tolist() for batch in source]


def on_ranks(monkeypatch, world, make, epoch=0):
    """The batches of each of `world` ranks."""
    found = []
    for rank in range(world):
        monkeypatch.setattr(loader, "ranks", lambda rank=rank: (rank, world))
        one = make()
        one.set_epoch(epoch)
        assert len(one) == len(batches(one))
        found.append(batches(one))
    return found


def make(count=22, batch_size=3, **options):
    return TricksDataLoader(Numbers(count), **{"batch_size": batch_size, "shuffle": True, "seed": 1, **options})


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [4, 11, 12, 13, 16, 17, 24, 25, 50])
def test_ranks_share_a_permutation_in_equally_many_batches(monkeypatch, count, world, shuffle):
    parts = on_ranks(monkeypatch, world, lambda: make(count, 3, shuffle=shuffle))
    assert sorted(n for part in parts for batch in part for n in batch) == list(range(count))
    assert len({len(part) for part in parts}) == 1
    assert all(len(batch) > 0 for part in parts for batch in part)
    for step in zip(*parts, strict=True):
        assert max(map(len, step)) - min(map(len, step)) <= 1


def test_one_device_sees_the_same_global_batches(monkeypatch):
    parts = on_ranks(monkeypatch, 2, lambda: make(22, 3), epoch=4)
    (alone,) = on_ranks(monkeypatch, 1, lambda: make(22, 6), epoch=4)
    assert [first + second for first, second in zip(*parts, strict=True)] == alone


def test_a_tail_smaller_than_the_ranks_joins_the_batch_before(monkeypatch):
    parts = on_ranks(monkeypatch, 2, lambda: make(9, 2, shuffle=False))
    assert parts == [[[0, 1], [4, 5, 6]], [[2, 3], [7, 8]]]


def test_drop_last_leaves_out_the_partial_batch(monkeypatch):
    parts = on_ranks(monkeypatch, 2, lambda: make(11, 2, shuffle=False, drop_last=True))
    assert parts == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def test_epochs_differ_and_repeat():
    one = make()
    first = batches(one)
    assert batches(one) == first
    one.set_epoch(1)
    second = batches(one)
    assert second != first
    other = make()
    other.set_epoch(1)
    assert batches(other) == second
    assert batches(make(seed=2)) not in (first, second)


@pytest.mark.parametrize("workers", [0, 2])
def test_two_resumes_in_one_epoch(workers):
    whole = make(num_workers=workers)
    whole.set_epoch(3)
    expected, found = batches(whole), []
    state = {**whole.state_dict(), "batches": 0}
    for count in (3, 2, 99):
        part = make(num_workers=workers)
        part.load_state_dict(state)
        for _, batch in zip(range(count), part, strict=False):
            found.append(batch.flatten().int().tolist())
            state = part.state_dict()
    assert found == expected
    assert state["batches"] == len(whole)


def test_position_counts_what_was_handed_out_not_what_workers_hold_ready():
    one = make(num_workers=2)
    iterator = iter(one)
    assert one.state_dict()["batches"] == 0
    next(iterator)
    assert one.state_dict()["batches"] == 1
    one.set_epoch(1)
    assert one.state_dict() == {**make().state_dict(), "epoch": 1}


def test_loading_leaves_the_global_random_numbers_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(make())
    assert torch.equal(torch.get_rng_state(), before)


def test_state_is_the_same_on_every_rank(monkeypatch):
    states = []
    for rank in (0, 1):
        monkeypatch.setattr(loader, "ranks", lambda rank=rank: (rank, 2))
        one = make()
        next(iter(one))
        states.append(one.state_dict())
    assert states[0] == states[1]


def test_ranks_may_change_when_the_global_batch_does_not(monkeypatch):
    alone = make(24, 6)
    expected = batches(alone)
    next(iter(alone))
    state = alone.state_dict()

    def resumed():
        one = make(24, 3)
        one.load_state_dict(state)
        return one

    found = []
    for rank in (0, 1):
        monkeypatch.setattr(loader, "ranks", lambda rank=rank: (rank, 2))
        found.append(batches(resumed()))
    assert [first + second for first, second in zip(*found, strict=True)] == expected[1:]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 11])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (4, 1), (3, 2), (1, 2), (2, 3)])
def test_on_other_ranks_what_is_left_is_shared_out_anew(monkeypatch, before, after, batch_size):
    """Every sample once, in as many batches as an epoch has on the ranks at the end, or refused."""
    for taken in (1, 2, 5):
        monkeypatch.setattr(loader, "ranks", lambda: (0, before))
        first = make(46, batch_size)
        if taken >= len(first):
            continue
        seen = [
            n
            for rank in range(before)
            for batch in on_rank(monkeypatch, rank, before, make(46, batch_size))[:taken]
            for n in batch
        ]
        monkeypatch.setattr(loader, "ranks", lambda: (0, before))
        for _, _ in zip(range(taken), first, strict=False):
            state = first.state_dict()
        parts = []
        for rank in range(after):
            monkeypatch.setattr(loader, "ranks", lambda rank=rank: (rank, after))
            other = make(46, batch_size)
            left, steps = 46 - len(seen), len(other) - taken
            if steps < 1 or left < steps * after or left - steps * after * batch_size >= after:
                # More ranks make fewer batches of an epoch than were taken and are left; or nearly all were taken.
                with pytest.raises(MisconfigurationError, match="Lightning counts on that number"):
                    other.load_state_dict(state)
                break
            other.load_state_dict(state)
            parts.append(batches(other))
            assert taken + len(parts[-1]) == len(other)
        else:
            assert all(batch for part in parts for batch in part)
            assert sorted(seen + [n for part in parts for batch in part for n in batch]) == list(range(46))


def on_rank(monkeypatch, rank, world, one):
    monkeypatch.setattr(loader, "ranks", lambda: (rank, world))
    return batches(one)


@pytest.mark.parametrize(
    ("options", "name"), [({"shuffle": False}, "shuffle"), ({"seed": 9}, "seed"), ({"count": 23}, "samples")]
)
def test_another_order_is_refused_in_mid_epoch_only(options, name):
    one = make()
    iterator = iter(one)
    next(iterator)
    with pytest.raises(MisconfigurationError, match=f"middle of an epoch .batch 1 of 8. with {name}="):
        make(**options).load_state_dict(one.state_dict())
    list(iterator)
    make(**options).load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    ("count", "world", "options", "message"),
    [
        (1, 2, {}, r"1 sample\(s\) cannot give each of 2 devices a batch. Use at most 1 devices"),
        (5, 2, {"drop_last": True}, "5 samples do not fill one batch of 3 on 2"),
    ],
)
def test_too_few_samples_is_an_error_not_a_hang(monkeypatch, count, world, options, message):
    monkeypatch.setattr(loader, "ranks", lambda: (0, world))
    one = make(count, **options)
    with pytest.raises(DataError, match=message):
        len(one)
    with pytest.raises(DataError, match=message):
        next(iter(one))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be a whole number of at least 1, got 0"),
        ({"batch_size": 2.0}, "got 2.0"),
        ({"seed": -1}, "`seed` must be"),
        ({"num_workers": -1}, "`num_workers` must be"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(MisconfigurationError, match=message):
        make(**options)


def test_a_sampler_replaces_the_loader_s_own_options():
    with pytest.raises(MisconfigurationError, match="Pass `batch_size`, `seed`, or a `sampler` instead"):
        TricksDataLoader(Numbers(3), shuffle=True)
    with pytest.raises(MisconfigurationError, match="`seed` is the sampler's"):
        TricksDataLoader(Numbers(3), seed=1, sampler=PlainOrder(3, batch_size=1, shuffle=False, seed=0))


def test_datasets_that_cannot_be_ordered():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(MisconfigurationError, match="needs a dataset with `__len__` and `__getitem__`, got Stream"):
        TricksDataLoader(Stream(), batch_size=1, shuffle=False, seed=0)
    with pytest.raises(DataError, match="holds no samples"):
        make(0)


class Saver(L.Callback):
    """Saves a checkpoint wherever Lightning may save one."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / f"step-{trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / f"epoch-{trainer.current_epoch}.ckpt")

    def on_validation_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / f"validated-{trainer.global_step}.ckpt")


def fit(run, resume=None, **options):
    module = Recorder()
    run.fit(module, make(**options), make(5, shuffle=False), ckpt_path=resume)
    return module.seen


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_lightning_resumes_wherever_it_was_interrupted(tmp_path, workers):
    first, second = tmp_path / "a", tmp_path / "b"
    expected = fit(trainer(tmp_path), num_workers=workers)
    assert fit(trainer(tmp_path, [Saver(first)], max_steps=5), num_workers=workers) == expected[:5]
    resumed = fit(trainer(tmp_path, [Saver(second)], max_steps=17), first / "step-3.ckpt", num_workers=workers)
    assert resumed == expected[3:17]
    for step in (5, 8, 9, 16, 17):  # in mid-epoch for the second time, at an epoch's end, after it
        assert fit(trainer(tmp_path), second / f"step-{step}.ckpt", num_workers=workers) == expected[step:], step


def test_lightning_resumes_from_the_end_of_an_epoch_and_of_a_validation(tmp_path):
    expected = fit(trainer(tmp_path))
    fit(trainer(tmp_path, [Saver(tmp_path)], max_epochs=2, val_check_interval=4, num_sanity_val_steps=0))
    for epoch in (0, 1):
        assert fit(trainer(tmp_path), tmp_path / f"epoch-{epoch}.ckpt") == expected[8 * (epoch + 1) :]
    for step in (4, 8, 12, 16):
        run = trainer(tmp_path, val_check_interval=4)
        assert fit(run, tmp_path / f"validated-{step}.ckpt") == expected[step:], step


def test_overfitting_repeats_the_same_batches(tmp_path):
    seen = fit(trainer(tmp_path, overfit_batches=2), shuffle=False)
    assert seen == [[0, 1, 2], [3, 4, 5]] * 3


def test_prediction_needs_no_other_loader(tmp_path):
    class Echo(Recorder):
        def predict_step(self, batch):
            return batch

    found = trainer(tmp_path).predict(Echo(), make(7, shuffle=False))
    assert torch.cat(found).flatten().tolist() == list(range(7))


@pytest.mark.slow
def test_lightning_leaves_the_loader_alone_on_two_ranks(tmp_path):
    subprocess.run([sys.executable, __file__, str(tmp_path)], check=True, timeout=120)
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert seen[0]["type"] == seen[1]["type"] == "TricksDataLoader"
    whole = make(23, 6)
    for epoch in (0, 1):
        whole.set_epoch(epoch)
        parts = [one["seen"][4 * epoch : 4 * epoch + 4] for one in seen]
        assert [first + second for first, second in zip(*parts, strict=True)] == batches(whole)
    assert [sum(map(len, one["validated"])) for one in seen] == [3, 2]


def two_ranks(folder):
    class Both(Recorder):
        def on_validation_start(self):
            self.validated = []

        def validation_step(self, batch, _):
            self.validated.append(batch.flatten().tolist())

    module = Both()
    run = trainer(folder, devices=2, strategy="ddp", max_epochs=2, num_sanity_val_steps=0)
    run.fit(module, make(23, 3), make(5, 3, shuffle=False))
    result = {
        "type": type(run.train_dataloader).__name__,
        "seen": module.seen,
        "validated": module.validated,
    }
    (Path(folder) / f"{run.global_rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    from tests.rank_process import leave

    two_ranks(sys.argv[1])
    leave()
