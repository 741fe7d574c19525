"""The checkpoint ensemble: who is a member, what the file holds, and that the fit around it is left alone."""

import math

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_tricks.callbacks import CheckpointEnsemble, EarlyStopping, TopK
from lightning_tricks.errors import MisconfigurationError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),  # resumed without the ModelCheckpoint
]

SCORES = [3.0, 1.0, math.nan, 2.0, 1.5, 9.0]


def ensemble(k=3, mode="min", **options):
    return CheckpointEnsemble(TopK(k, monitor="val/score", mode=mode), **options)


def mean_of(diary, epochs):
    members = [diary.weights[epoch] for epoch in epochs]
    return {name: sum(m[name] for m in members) / len(members) for name in members[0]}  # in fp32, oldest first


def members_on_disk(folder):
    return {path.name for path in folder.glob("member-*")}


@pytest.mark.parametrize(("mode", "best"), [("min", [1, 3, 4]), ("max", [0, 3, 5])])
def test_averages_the_best_by_either_direction(trainer, scripted, diary, mode, best):
    callback = ensemble(mode=mode)
    trainer([callback, diary]).fit(scripted(SCORES))
    checkpoint = torch.load(callback.path, weights_only=True)
    torch.testing.assert_close(checkpoint["state_dict"], mean_of(diary, best), rtol=1e-6, atol=1e-7)
    assert sorted(callback.scores) == sorted(SCORES[epoch] for epoch in best)
    assert [m["epoch"] for m in checkpoint["lightning_tricks"]["ensemble"]] == best


def test_equal_scores_keep_the_earlier(trainer, scripted, diary, same_weights):
    callback = ensemble(k=2)
    trainer([callback, diary], max_epochs=3).fit(scripted([1.0, 1.0, 1.0]))
    assert same_weights(torch.load(callback.path, weights_only=True)["state_dict"], mean_of(diary, [0, 1]))


def test_the_module_keeps_its_last_weights(trainer, scripted, diary, same_weights):
    module = scripted(SCORES)
    run = trainer([ensemble(), diary])
    run.fit(module)
    assert same_weights(module.state_dict(), diary.weights[5])
    assert run.callback_metrics["val/score"] == SCORES[5]


def test_the_file_loads_strictly_and_tests(trainer, scripted, diary, same_weights):
    class Tested(scripted):
        def test_step(self, batch):
            self.log("test/loss", self.loss(batch), batch_size=4)

        test_dataloader = scripted.train_dataloader

        def on_save_checkpoint(self, checkpoint):
            checkpoint["lightning_tricks"] = {"base": {"layer.weight": len(checkpoint["state_dict"])}}

    callback, module = ensemble(), Tested(SCORES, lr=0.05)
    run = trainer([callback, diary])
    run.fit(module)
    loaded = Tested.load_from_checkpoint(callback.path, strict=True)
    assert same_weights(loaded.state_dict(), mean_of(diary, [1, 3, 4]))
    assert loaded.hparams.lr == 0.05
    assert torch.load(callback.path, weights_only=True)["lightning_tricks"]["base"] == {"layer.weight": 2}
    [tested] = run.test(module, ckpt_path=callback.path, verbose=False)
    assert tested["test/loss"] == pytest.approx(callback.results["ensemble"]["val/loss"])
    assert callback.results


def test_hyper_parameters_of_the_data_are_in_the_file(trainer, scripted):
    class Data(LightningDataModule):
        def __init__(self, folds=5):
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self):
            return scripted().train_dataloader()

        val_dataloader = train_dataloader

    callback = ensemble()
    trainer([callback], max_epochs=1).fit(scripted(), datamodule=Data(folds=7))
    checkpoint = torch.load(callback.path, weights_only=True)
    assert checkpoint["datamodule_hyper_parameters"] == {"folds": 7}
    assert checkpoint["hyper_parameters"]["lr"] == 0.1


def test_scores_the_ensemble_beside_the_best(trainer, scripted, diary, tmp_path):
    callback, module = CheckpointEnsemble(TopK(2, monitor="val/loss")), scripted([1.0])
    logger = CSVLogger(tmp_path)
    run = trainer([callback, diary], max_epochs=3, logger=logger, log_every_n_steps=1)
    run.fit(module)
    expected = scripted()
    expected.load_state_dict(mean_of(diary, [1, 2]))
    loss = sum(expected.loss(batch).item() for batch in expected.val_dataloader()) / 2
    assert callback.results["ensemble"]["val/loss"] == pytest.approx(loss)
    assert callback.results["best"]["val/loss"] == min(callback.scores)
    text = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    header, *rows = [line.split(",") for line in text.splitlines()]
    logged = [row[header.index("ensemble/val/loss")] for row in rows]
    assert [float(value) for value in logged if value] == [pytest.approx(loss)]
    assert len([row for row in rows if row[header.index("val/loss")]]) == 3


def test_scoring_is_unheard_by_other_callbacks(trainer, scripted, diary, tmp_path):
    saver = ModelCheckpoint(tmp_path / "saved", save_on_train_epoch_end=False, save_top_k=-1)
    early = EarlyStopping("val/loss", patience=9)
    trainer([ensemble(), early, diary, saver], max_epochs=3, enable_checkpointing=True).fit(scripted())
    assert (early.wait_count, early.best_step) == (0, 6)
    assert len(list((tmp_path / "saved").iterdir())) == 3
    assert sorted(diary.weights) == [0, 1, 2]


@pytest.mark.parametrize("first", ["ensemble", "stopping"])
def test_the_order_with_early_stopping_does_not_matter(trainer, scripted, diary, same_weights, first):
    callback, early, module = ensemble(), EarlyStopping("val/score", mode="min", patience=9), scripted(SCORES)
    both = [callback, early] if first == "ensemble" else [early, callback]
    trainer([*both, diary]).fit(module)
    assert same_weights(module.state_dict(), diary.weights[1])
    assert same_weights(torch.load(callback.path, weights_only=True)["state_dict"], mean_of(diary, [1, 3, 4]))


def test_an_exception_while_scoring_puts_the_weights_back(trainer, scripted, diary, same_weights, tmp_path):
    class Fails(scripted):
        def validation_step(self, batch, index):
            if 2 in diary.weights:
                raise KeyError("scoring")
            super().validation_step(batch, index)

    module = Fails()
    run = trainer([ensemble(), diary], max_epochs=3)
    with pytest.raises(KeyError, match="scoring"):
        run.fit(module)
    assert same_weights(module.state_dict(), diary.weights[2])
    assert len(run.callbacks) == 2


def test_the_folder_holds_the_members_and_the_ensemble(trainer, scripted, tmp_path):
    callback = ensemble(k=2, dirpath=tmp_path / "out")
    trainer([callback]).fit(scripted([6.0, 5.0, 4.0, 3.0, 2.0, 1.0]))
    assert len(members_on_disk(tmp_path / "out")) == 2
    assert len(list((tmp_path / "out").iterdir())) == 3


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("epoch", [1, 3, 5])
@pytest.mark.parametrize("scores", [SCORES, [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
def test_interrupted_and_resumed_equals_uninterrupted(
    trainer, scripted, crash_after_epoch, same_weights, tmp_path, scores, epoch, every
):
    whole = ensemble(k=2, dirpath=tmp_path / "whole" / "members")
    trainer([whole]).fit(scripted(scores))
    folder = tmp_path / "cut" / "members"
    saver = ModelCheckpoint(tmp_path / "saved", every_n_epochs=every, save_last=True)
    cut = [ensemble(k=2, dirpath=folder), crash_after_epoch(epoch), saver]
    with pytest.raises(KeyError, match="crash"):
        trainer(cut, enable_checkpointing=True).fit(scripted(scores))
    resumed = ensemble(k=2, dirpath=folder)
    trainer([resumed]).fit(scripted(scores), ckpt_path=saver.last_model_path or None)
    assert resumed.scores == whole.scores
    assert resumed.results == whole.results
    one, other = (torch.load(c.path, weights_only=True)["state_dict"] for c in (resumed, whole))
    assert same_weights(one, other)


def test_the_disk_stays_bounded_whatever_is_checkpointed(trainer, scripted, tmp_path):
    class Count(ModelCheckpoint):
        most = 0

        def on_validation_end(self, *args):
            super().on_validation_end(*args)
            Count.most = max(Count.most, len(members_on_disk(tmp_path / "out")))

    falling = [20.0 - epoch for epoch in range(20)]
    for every in (1, 3, 100):
        saver = Count(tmp_path / f"saved-{every}", every_n_epochs=every)
        callback = ensemble(k=2, dirpath=tmp_path / "out")
        trainer([callback, saver], max_epochs=12, enable_checkpointing=True).fit(scripted(falling))
        for path in (tmp_path / "out").iterdir():
            path.unlink()
    assert Count.most <= 5


def test_members_newer_than_the_checkpoint_are_dropped(trainer, scripted, crash_after_epoch, tmp_path):
    saver = ModelCheckpoint(tmp_path / "saved", every_n_epochs=3, save_last=True)
    with pytest.raises(KeyError, match="crash"):
        trainer([ensemble(dirpath=tmp_path / "out"), crash_after_epoch(4), saver], enable_checkpointing=True).fit(
            scripted([9.0, 8.0, 7.0, 1.0, 2.0])
        )
    callback = ensemble(dirpath=tmp_path / "out")
    trainer([callback], max_epochs=4).fit(scripted([9.0, 8.0, 7.0, 6.0]), ckpt_path=saver.last_model_path)
    assert callback.scores == [6.0, 7.0, 8.0]
    assert not any("step=10-" in name for name in members_on_disk(tmp_path / "out"))


def test_members_that_are_gone_are_reported(trainer, scripted, tmp_path):
    saver = ModelCheckpoint(tmp_path / "saved", save_last=True)
    trainer([ensemble(dirpath=tmp_path / "out"), saver], max_epochs=2, enable_checkpointing=True).fit(scripted([1.0]))
    min((tmp_path / "out").glob("member-step=2-*")).unlink()
    callback = ensemble(dirpath=tmp_path / "out")
    with pytest.warns(UserWarning, match="1 of 2 members are not in"):
        trainer([callback], max_epochs=3).fit(scripted([1.0]), ckpt_path=saver.last_model_path)
    assert len(callback.scores) == 2


def test_without_a_finite_score_there_is_no_ensemble(trainer, scripted):
    callback = ensemble()
    with pytest.warns(UserWarning, match="no validation gave a finite `val/score`"):
        trainer([callback], max_epochs=2).fit(scripted([math.nan]))
    assert callback.path is None


def test_resuming_a_finished_run_writes_the_ensemble(trainer, scripted, diary, same_weights, tmp_path):
    saver = ModelCheckpoint(tmp_path / "saved", save_last=True)
    trainer([ensemble(), saver, diary], enable_checkpointing=True).fit(scripted(SCORES))
    callback, module = ensemble(), scripted(SCORES)
    trainer([callback]).fit(module, ckpt_path=saver.last_model_path)
    assert same_weights(torch.load(callback.path, weights_only=True)["state_dict"], mean_of(diary, [1, 3, 4]))
    assert same_weights(module.state_dict(), diary.weights[5])


def test_a_dry_run_writes_nothing(trainer, scripted, tmp_path):
    trainer([ensemble()], fast_dev_run=True).fit(scripted())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("when", ["__init__", "configure_model"])
def test_running_statistics_are_refused(trainer, scripted, when):
    class Normed(scripted):
        pass

    def add(self, *args):
        if when == "__init__":
            scripted.__init__(self, *args)
        self.norm = torch.nn.BatchNorm1d(2)

    setattr(Normed, when, add)
    with pytest.raises(MisconfigurationError, match=r"running statistics of `norm` \(BatchNorm1d\).*eval\(\)"):
        trainer([ensemble(statistics_batches=0)]).fit(Normed())


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode")
def test_frozen_running_statistics_are_accepted(trainer, scripted):
    module = scripted()
    module.norm = torch.nn.BatchNorm1d(2).eval().requires_grad_(False)
    callback = ensemble()
    trainer([callback], max_epochs=1).fit(module)
    assert callback.path.is_file()


@pytest.mark.parametrize("sanity_steps", [0, 2])
def test_a_metric_never_logged_is_named_with_those_that_are(trainer, scripted, sanity_steps):
    callback = CheckpointEnsemble(TopK(2, monitor="val/f1"))
    with pytest.raises(MisconfigurationError, match=r"`val/f1`.*does not log.*`val/loss`, `val/score`"):
        trainer([callback], num_sanity_val_steps=sanity_steps).fit(scripted())


def test_a_folder_that_cannot_be_written(trainer, scripted, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MisconfigurationError, match=r"CheckpointEnsemble cannot write.*file.*`dirpath`"):
        trainer([ensemble(dirpath=tmp_path / "file")]).fit(scripted())


def test_two_instances_work_side_by_side(trainer, scripted, tmp_path):
    low, high = ensemble(), CheckpointEnsemble(TopK(2, monitor="val/loss"))
    small = ensemble(k=1, dirpath=tmp_path / "small")
    trainer([low, high, small], max_epochs=3).fit(scripted([3.0, 2.0, 1.0]))
    assert len({low.path, high.path, small.path}) == 3
    assert [len(callback.scores) for callback in (low, high, small)] == [3, 2, 1]


def test_two_instances_in_one_folder_are_refused(trainer, scripted, tmp_path):
    both = [ensemble(dirpath=tmp_path), CheckpointEnsemble(TopK(2, monitor="val/loss"), dirpath=tmp_path)]
    with pytest.raises(MisconfigurationError, match="each its own `dirpath`"):
        trainer(both).fit(scripted())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"`k`.*got 0"),
        ({"k": 2.0}, r"`k`.*got 2.0"),
        ({"monitor": "val/score"}, "better low or high"),
        ({"mode": "best"}, r"got 'best'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(MisconfigurationError, match=message):
        TopK(**options)


def test_members_must_be_a_policy():
    with pytest.raises(MisconfigurationError, match=r"got 3.*TopK"):
        CheckpointEnsemble(3)
