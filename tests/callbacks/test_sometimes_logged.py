"""A metric that not every validation logs: Lightning keeps its old value, which is nobody's score."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_tricks.callbacks import CheckpointEnsemble, EarlyStopping, Epochs, GreedySoup, LastK, TopK, Watch
from lightning_tricks.errors import MisconfigurationError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),  # resumed without the ModelCheckpoint
    pytest.mark.filterwarnings("ignore:.*which the validation at step"),  # but where a test looks for it
]


@pytest.fixture
def sometimes(scripted):
    """Logs no score where the script has None; always the loss."""

    class Sometimes(scripted):
        def validation_step(self, batch, _):
            score = self.scores[min(self.current_epoch, len(self.scores) - 1)]
            if score is not None:
                self.log("val/score", score, batch_size=4)
            self.log("val/loss", self.loss(batch), batch_size=4)

    return Sometimes


def stopping(patience=2, **options):
    return EarlyStopping("val/score", mode="min", patience=patience, **options)


def test_a_validation_without_it_is_no_wait(trainer, sometimes, diary, same_weights):
    early, module = stopping(), sometimes([3.0, None, None, 2.0, None, 4.0, None, 1.0, 5.0, 5.0, 0.0])
    run = trainer([early, diary], max_epochs=11)
    run.fit(module)
    assert [point[:2] for point in early._trackers[0].points] == [(2, 3), (8, 2), (12, 4), (16, 1), (18, 5), (20, 5)]
    assert (early.best_score, early.wait_count, run.current_epoch) == (1.0, 2, 10)
    assert same_weights(module.state_dict(), diary.weights[7])


def test_no_weights_get_an_old_score(trainer, sometimes, diary):
    callback = CheckpointEnsemble(TopK(3, monitor="val/score", mode="min"))
    trainer([callback, diary]).fit(sometimes([1.0, None, 3.0, None, None, 2.0]))
    assert callback.scores == [1.0, 2.0, 3.0]
    assert [m["epoch"] for m in torch.load(callback.path)["lightning_tricks"]["ensemble"]] == [0, 2, 5]


def test_says_once_when_it_was_last_seen(trainer, sometimes, told):
    early = stopping(patience=9)
    message = r"EarlyStopping monitors `val/score`, which the validation at step 6 did not log; .*last seen at step 4"
    with pytest.warns(UserWarning, match=message) as warned:
        trainer([early]).fit(sometimes([3.0, 2.0, None, None, 1.0, None]))
    assert len([each for each in warned if "did not log" in str(each.message)]) == 1
    assert "`val/score` was logged by 3 of 6 validations, last seen at step 10" in told.text


@pytest.mark.parametrize("sanity_steps", [0, 2])
@pytest.mark.parametrize("make", [stopping, lambda: CheckpointEnsemble(TopK(2, monitor="val/score", mode="min"))])
def test_it_must_be_there_from_the_first_validation_on(trainer, sometimes, make, sanity_steps):
    run = trainer([make()], num_sanity_val_steps=sanity_steps)
    message = r"`val/score`, which validation does not log. It logs: `val/loss`.*from the first validation on"
    with pytest.raises(MisconfigurationError, match=message):
        run.fit(sometimes([None, 1.0]))
    assert run.current_epoch == 0


def test_a_metric_of_training_is_none_of_validation(trainer, scripted):
    class Trained(scripted):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            self.log("train/loss", loss)
            return loss

    run = trainer([EarlyStopping("train/loss")], num_sanity_val_steps=0)
    with pytest.raises(MisconfigurationError, match="`train/loss`, which validation does not log"):
        run.fit(Trained())


class Reader(Callback):
    """Reads the metrics in between, as ModelCheckpoint does: Lightning then hands the value out anew."""

    def read(self, trainer, *_):
        dict(trainer.callback_metrics)

    on_validation_start = on_validation_batch_end = on_validation_epoch_end = on_validation_end = read
    on_train_batch_end = on_train_epoch_end = read


@pytest.mark.parametrize("last", [False, True])
def test_other_callbacks_may_read_it(trainer, sometimes, last):
    early = stopping(patience=9)
    callbacks = [early, Reader()] if last else [Reader(), early]
    trainer(callbacks, num_sanity_val_steps=0).fit(sometimes([3.0, None, 3.0, 3.0, None, None]))
    assert [point[0] for point in early._trackers[0].points] == [2, 6, 8]


def test_a_metric_that_a_callback_puts_there(trainer, scripted):
    class Puts(Callback):
        def on_validation_epoch_end(self, trainer, _):
            if trainer.current_epoch % 2 == 0:
                trainer.callback_metrics["val/f1"] = torch.tensor(0.5)

    early = EarlyStopping("val/f1", patience=9)
    trainer([Puts(), early]).fit(scripted())
    assert [point[0] for point in early._trackers[0].points] == [2, 6, 10]


def test_a_metric_of_one_of_several_loaders(trainer, scripted):
    class Two(scripted):
        def validation_step(self, batch, index, dataloader_idx=0):
            if dataloader_idx == 0 or self.current_epoch % 2 == 0:
                self.log("val/score", 1.0, batch_size=4)

        def on_validation_epoch_end(self):
            self.log("val/other", 1.0)

        def val_dataloader(self):
            return [super().val_dataloader(), super().val_dataloader()]

    early = EarlyStopping("val/score/dataloader_idx_1", mode="min", patience=9)
    trainer([early]).fit(Two())
    assert [point[0] for point in early._trackers[0].points] == [2, 6, 10]


def test_of_two_metrics_each_has_its_own_count(trainer, sometimes):
    early = EarlyStopping([Watch("val/loss"), Watch("val/score", "min")], patience=3, stop_when="any")
    run = trainer([early], max_epochs=9)
    run.fit(sometimes([1.0, None, 2.0, None, 2.0, None, None, 2.0, 2.0]))
    assert run.current_epoch == 8
    assert early.stopped_reason == "`val/score` did not improve for 3 validations"


def test_patience_in_epochs_ends_at_a_validation_that_logs_it(trainer, sometimes):
    early = stopping(patience=Epochs(2))
    run = trainer([early], max_epochs=9)
    run.fit(sometimes([1.0, 2.0, None, None, 2.0, 2.0]))
    assert (run.current_epoch, early.stopped_reason) == (5, "`val/score` did not improve for 4 epochs")


@pytest.mark.parametrize("kind", ["stopping", "ensemble"])
def test_a_resumed_fit_knows_that_it_was_seen(trainer, sometimes, tmp_path, kind):
    def make():
        if kind == "stopping":
            return stopping(patience=9)
        return CheckpointEnsemble(TopK(9, monitor="val/score", mode="min"))

    scores = [1.0, 2.0, None, None, 3.0]
    saver = ModelCheckpoint(tmp_path / "saved", save_last=True)
    trainer([make(), saver], max_epochs=2, enable_checkpointing=True).fit(sometimes(scores))
    callback = make()
    with pytest.warns(UserWarning, match="at step 6 did not log; it was last seen at step 4"):
        trainer([callback], max_epochs=5).fit(sometimes(scores), ckpt_path=saver.last_model_path)
    assert "by 3 of 5 validations" in callback._monitor.gaps()


def test_a_new_fit_has_seen_nothing(trainer, sometimes):
    early = stopping(patience=9)
    trainer([early], max_epochs=1).fit(sometimes([1.0]))
    with pytest.raises(MisconfigurationError, match="does not log"):
        trainer([early], num_sanity_val_steps=0).fit(sometimes([None]))


def test_a_soup_needs_it_at_the_end_only(trainer, sometimes):
    callback = CheckpointEnsemble(LastK(2), GreedySoup("val/score", mode="min"))
    trainer([callback], max_epochs=3).fit(sometimes([1.0, None, 2.0]))
    assert callback.results["ensemble"]["val/score"] == 2.0
