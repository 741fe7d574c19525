"""Early stopping: when it stops, what it restores, and that an interruption changes neither."""

import math

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_tricks.callbacks import EarlyStopping
from lightning_tricks.data import TricksDataLoader
from lightning_tricks.errors import MisconfigurationError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),  # resumed without the ModelCheckpoint
]


def stopping(**options):
    return EarlyStopping("val/score", **{"mode": "min", "patience": 2, **options})


def test_stops_when_the_patience_is_exhausted(trainer, scripted, diary, same_weights):
    early, module = stopping(), scripted([3.0, 1.0, 2.0, 2.0, 0.0])
    run = trainer([early, diary], max_epochs=5)
    run.fit(module)
    assert run.current_epoch == 4
    assert (early.best_score, early.best_step) == (1.0, 4)
    assert early.stopped_reason == "`val/score` did not improve for 2 validations"
    assert same_weights(module.state_dict(), diary.weights[1])


def test_restores_the_best_weights_when_max_epochs_ends_the_fit(trainer, scripted, diary, same_weights):
    early, module = stopping(), scripted([3.0, 1.0, 2.0])
    trainer([early, diary], max_epochs=3).fit(module)
    assert early.stopped_reason is None
    assert same_weights(module.state_dict(), diary.weights[1])


def test_restores_the_best_weights_when_another_callback_stops(trainer, scripted, diary, same_weights):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.current_epoch == 1

    early, module = stopping(), scripted([1.0, 2.0])
    trainer([early, diary, Stop()]).fit(module)
    assert same_weights(module.state_dict(), diary.weights[0])


def test_keeps_the_last_weights_when_asked(trainer, scripted, diary, same_weights, tmp_path):
    early, module = stopping(restore_best=False), scripted([1.0, 2.0, 2.0])
    trainer([early, diary]).fit(module)
    assert same_weights(module.state_dict(), diary.weights[2])
    assert early.best_path is None
    assert not (tmp_path / "early_stopping").exists()


def test_higher_is_better_and_min_delta_counts(trainer, scripted):
    early = stopping(mode="max", min_delta=0.5)
    run = trainer([early])
    run.fit(scripted([1.0, 1.4, 1.6, 1.9, 2.0]))
    assert (early.best_score, early.best_step, run.current_epoch) == (pytest.approx(1.6), 6, 5)


def test_nan_is_never_the_best(trainer, scripted, diary, same_weights):
    early, module = stopping(patience=3), scripted([math.nan, 2.0, math.nan, -math.inf, math.nan])
    trainer([early, diary]).fit(module)
    assert early.best_score == 2.0
    assert same_weights(module.state_dict(), diary.weights[1])


def test_a_run_of_nan_alone_restores_nothing(trainer, scripted, diary, same_weights):
    early, module = stopping(), scripted([math.nan])
    with pytest.warns(UserWarning, match="no validation gave a finite `val/score`, so that there are no best weights"):
        trainer([early, diary]).fit(module)
    assert (early.best_score, early.best_path) == (None, None)
    assert same_weights(module.state_dict(), diary.weights[1])


def test_a_fit_that_ends_before_its_first_validation_says_that_nothing_is_restored(trainer, scripted):
    with pytest.warns(UserWarning, match="there are no best weights to restore"):
        trainer([stopping()], max_epochs=-1, max_steps=1, num_sanity_val_steps=0).fit(scripted())


def test_nothing_was_to_be_restored(trainer, scripted):
    trainer([stopping(restore_best=False)], max_epochs=1).fit(scripted([math.nan]))


def test_recovery_before_min_epochs_continues(trainer, scripted):
    early = stopping(patience=1)
    run = trainer([early], min_epochs=3)
    run.fit(scripted([1.0, 2.0, 0.5, 0.4, 0.3, 0.2]))
    assert run.current_epoch == 6
    assert early.stopped_reason is None


def test_without_recovery_stops_at_min_epochs(trainer, scripted):
    early = stopping(patience=1)
    run = trainer([early], min_epochs=4)
    run.fit(scripted([1.0, 2.0, 2.0, 2.0, 2.0]))
    assert run.current_epoch == 4


def test_without_recovery_stops_at_min_steps(trainer, scripted):
    early = stopping(patience=1)
    run = trainer([early], min_steps=7)
    run.fit(scripted([1.0, 2.0]))
    assert run.global_step == 8


def test_stops_in_mid_epoch_when_validation_is_there(trainer, scripted):
    early = stopping(patience=1)
    run = trainer([early], val_check_interval=1)
    run.fit(scripted([1.0]))
    assert run.global_step == 2


def test_the_sanity_check_is_not_a_score(trainer, scripted):
    early = stopping()
    trainer([early], max_epochs=1).fit(scripted([5.0]))
    assert early.best_score == 5.0


@pytest.mark.parametrize("sanity_steps", [0, 2])
def test_a_metric_never_logged_is_named_with_those_that_are(trainer, scripted, sanity_steps):
    run = trainer([EarlyStopping("val/f1")], num_sanity_val_steps=sanity_steps)
    with pytest.raises(MisconfigurationError, match=r"`val/f1`.*does not log.*`val/loss`, `val/score`"):
        run.fit(scripted())
    assert run.current_epoch == 0


def test_a_fit_without_validation_is_refused(trainer, scripted):
    with pytest.raises(MisconfigurationError, match="limit_val_batches"):
        trainer([stopping()], limit_val_batches=0).fit(scripted())


def test_a_module_silent_in_the_sanity_check_is_accepted(trainer, scripted):
    class Silent(scripted):
        def validation_step(self, batch, index):
            if not self.trainer.sanity_checking:
                super().validation_step(batch, index)

    early = stopping()
    trainer([early], max_epochs=1).fit(Silent([5.0]))
    assert early.best_score == 5.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, r"`patience`.*got 0.*patience=1"),
        ({"patience": 1.5}, r"`patience`.*got 1.5"),
        ({"patience": True}, r"`patience`.*got True"),
        ({"min_delta": -1.0}, r"`min_delta`.*got -1.0"),
        ({"min_delta": math.nan}, r"`min_delta`.*got nan"),
        ({"mode": "up"}, r"`mode`.*got 'up'"),
        ({"mode": "auto"}, r"`val/score` is better low or high"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(MisconfigurationError, match=message):
        stopping(**options)


@pytest.mark.parametrize(("name", "mode"), [("val_loss", "min"), ("val/macro_f1", "max")])
def test_the_mode_comes_from_the_name(name, mode):
    assert EarlyStopping(name).mode == mode


def test_a_folder_that_cannot_be_written(trainer, scripted, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MisconfigurationError, match=r"EarlyStopping cannot write.*file/best.*`dirpath`"):
        trainer([stopping(dirpath=tmp_path / "file" / "best")]).fit(scripted())


def interrupted(trainer, scripted, crash, tmp_path, scores, every, **options):
    """Crash in the given epoch's validation, resume from the last checkpoint; return callback, module and Trainer."""
    saver = ModelCheckpoint(tmp_path / "saved", every_n_epochs=every, save_top_k=-1, save_last=True)
    with pytest.raises(KeyError, match="crash"):
        trainer([stopping(), crash, saver], enable_checkpointing=True).fit(scripted(scores))
    early, module = stopping(**options), scripted(scores)
    resumed = trainer([early])
    resumed.fit(module, ckpt_path=saver.last_model_path)
    return early, module, resumed


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("epoch", [2, 3, 4])
@pytest.mark.parametrize("scores", [[6.0, 5.0, 4.0, 3.0, 2.0, 1.0], [5.0, 1.0, 3.0, 2.0, 0.0]])
def test_interrupted_and_resumed_equals_uninterrupted(
    trainer, scripted, crash_after_epoch, same_weights, tmp_path, scores, epoch, every
):
    whole, expected = stopping(dirpath=tmp_path / "whole"), scripted(scores)
    run = trainer([whole])
    run.fit(expected)
    crash = crash_after_epoch(min(epoch, run.current_epoch - 1))
    early, module, resumed = interrupted(trainer, scripted, crash, tmp_path, scores, every)
    assert same_weights(module.state_dict(), expected.state_dict())
    assert (early.best_score, early.best_step, early.wait_count) == (
        whole.best_score,
        whole.best_step,
        whole.wait_count,
    )
    assert resumed.global_step == run.global_step
    assert len(list((tmp_path / "early_stopping").iterdir())) <= 2  # the best, and what the last checkpoint lists


def test_resuming_takes_the_new_patience_and_keeps_the_count(trainer, scripted, tmp_path):
    saver = ModelCheckpoint(tmp_path / "saved", save_last=True)
    scores = [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    trainer([stopping(), saver], enable_checkpointing=True).fit(scripted(scores))
    early = stopping(patience=4)
    resumed = trainer([early], max_epochs=7)
    resumed.fit(scripted(scores), ckpt_path=saver.last_model_path)
    assert (early.best_score, early.best_step, early.wait_count, resumed.current_epoch) == (1.0, 2, 4, 5)


def test_resuming_a_stopped_run_trains_no_further(trainer, scripted, tmp_path, diary, same_weights):
    saver = ModelCheckpoint(tmp_path / "saved", save_last=True)
    run = trainer([stopping(), saver, diary], enable_checkpointing=True)
    run.fit(scripted([1.0, 2.0]))
    early, module = stopping(), scripted([1.0, 2.0])
    resumed = trainer([early])
    resumed.fit(module, ckpt_path=saver.last_model_path)
    assert resumed.global_step == run.global_step
    assert same_weights(module.state_dict(), diary.weights[0])


def test_resuming_a_finished_run_restores_the_best_weights(trainer, scripted, tmp_path, diary, same_weights):
    saver = ModelCheckpoint(tmp_path / "saved", save_last=True)
    scores = [3.0, 1.0, 2.0]
    trainer([stopping(), saver, diary], enable_checkpointing=True, max_epochs=3).fit(scripted(scores))
    module = scripted(scores)
    trainer([stopping()], max_epochs=3).fit(module, ckpt_path=saver.last_model_path)
    assert same_weights(module.state_dict(), diary.weights[1])


def test_best_weights_that_are_gone_are_reported(trainer, scripted, tmp_path):
    saver = ModelCheckpoint(tmp_path / "saved", save_last=True)
    trainer([stopping(), saver], enable_checkpointing=True, max_epochs=2).fit(scripted([1.0, 3.0, 2.0]))
    early = stopping(dirpath=tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match=r"best score, 1.0, are not in .*elsewhere"):
        trainer([early], max_epochs=3).fit(scripted([1.0, 3.0, 2.0]), ckpt_path=saver.last_model_path)
    assert early.best_score == 2.0


def test_two_instances_work_side_by_side(trainer, scripted, tmp_path):
    saver = ModelCheckpoint(tmp_path / "saved", save_last=True)
    scores = [1.0, 2.0, 2.0, 2.0]
    one, two = stopping(), EarlyStopping("val/loss", patience=9)
    trainer([one, two, saver], enable_checkpointing=True).fit(scripted(scores))
    assert (one.best_step, two.best_step) == (2, 6)
    assert one.best_path != two.best_path
    again, other = stopping(), EarlyStopping("val/loss", patience=9)
    trainer([again, other]).fit(scripted(scores), ckpt_path=saver.last_model_path)
    assert (again.best_score, other.best_score) == (one.best_score, two.best_score)


def test_two_runs_in_one_folder_keep_apart(trainer, scripted):
    first, second = stopping(), stopping()
    trainer([first], max_epochs=1).fit(scripted([1.0]))
    trainer([second], max_epochs=1).fit(scripted([1.0]))
    assert first.best_path != second.best_path
    assert first.best_path.is_file()


def test_a_new_trainer_starts_afresh(trainer, scripted):
    early = stopping()
    trainer([early], max_epochs=1).fit(scripted([1.0]))
    trainer([early], max_epochs=1).fit(scripted([7.0]))
    assert early.best_score == 7.0


def test_testing_a_checkpoint_leaves_the_result_of_the_fit(trainer, scripted, tmp_path):
    class Tested(scripted):
        def test_step(self, batch):
            self.log("test/loss", self.loss(batch), batch_size=4)

        test_dataloader = scripted.train_dataloader

    early, module = stopping(), Tested([3.0, 1.0])
    saver = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, filename="{epoch}")
    run = trainer([early, saver], enable_checkpointing=True, max_epochs=2)
    run.fit(module)
    run.test(module, ckpt_path=tmp_path / "saved" / "epoch=0.ckpt", verbose=False)
    assert early.best_score == 1.0


def test_a_dry_run_writes_nothing(trainer, scripted, tmp_path):
    trainer([stopping()], fast_dev_run=True).fit(scripted())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("crash_at", [3, 4, 5, 7])
def test_resuming_in_mid_epoch_counts_each_validation_once(trainer, scripted, tmp_path, same_weights, crash_at):
    class Scores(scripted):
        """Validates twice an epoch, with a score for each."""

        def validation_step(self, batch, _):
            self.log("val/score", [9.0, 5.0, 7.0, 4.0, 6.0, 6.0, 6.0][self.global_step // 2], batch_size=2)

        def train_dataloader(self):
            return TricksDataLoader(super().train_dataloader().dataset, batch_size=2, shuffle=True, seed=0)

    class Crash(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == crash_at:
                raise KeyError("crash")

    def saver(name):
        return ModelCheckpoint(tmp_path / name, save_last=True, save_on_train_epoch_end=False)

    options = {"max_epochs": 3, "val_check_interval": 2, "num_sanity_val_steps": 0, "enable_checkpointing": True}
    whole, expected = stopping(patience=9, dirpath=tmp_path / "whole"), Scores()
    trainer([whole, saver("a")], **options).fit(expected)
    cut = saver("b")
    with pytest.raises(KeyError, match="crash"):
        trainer([stopping(patience=9), cut, Crash()], **options).fit(Scores())
    early, module = stopping(patience=9), Scores()
    trainer([early], **{**options, "enable_checkpointing": False}).fit(module, ckpt_path=cut.last_model_path)
    assert (early.best_score, early.best_step, early.wait_count) == (whole.best_score, whole.best_step, 3)
    assert same_weights(module.state_dict(), expected.state_dict())
