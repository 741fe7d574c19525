"""When early stopping stops: Keras' rules as a table, several metrics, smoothing, relative deltas, other patiences."""

import math
import os
import signal

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_tricks.callbacks import EarlyStopping, Epochs, Seconds, Steps, Watch
from lightning_tricks.callbacks import early_stopping as module_under_test
from lightning_tricks.errors import MisconfigurationError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),  # resumed without the ModelCheckpoint
]

# Keras' EarlyStopping, restated: a value improves if it is better than the best by more than `min_delta`; each epoch
# counts as waited, and an improvement that also beats the baseline sets the count to 0; without an improvement, the
# count at `patience` or above stops. Columns: options, values by epoch, the last epoch (from 0), the best epoch.
KERAS = [
    ({"patience": 1}, [5, 4, 3, 2], 3, 3),
    ({"patience": 1}, [5, 4, 4, 3], 2, 1),
    ({"patience": 2}, [5, 4, 4, 3, 3, 3], 5, 3),
    ({"patience": 2}, [5, 6, 4, 6, 3, 6, 6, 1], 6, 4),
    ({"patience": 3}, [1, 2, 3, 4, 0], 3, 0),
    ({"patience": 1, "mode": "max"}, [1, 2, 3, 3, 9], 3, 2),
    ({"patience": 2, "mode": "max"}, [1, 0, 2, 1, 1, 9], 4, 2),
    ({"patience": 1, "min_delta": 0.5}, [5, 4.4, 4, 1], 2, 1),
    ({"patience": 2, "min_delta": 0.5}, [5, 4.75, 4.4, 4.4, 4.25, 1], 4, 2),
    ({"patience": 1, "min_delta": 0.5}, [5, 4.5, 1], 1, 0),  # exactly the delta is none
    ({"patience": 2, "baseline": 3}, [5, 4, 3.5, 3.6, 1], 3, 2),  # better, but never than the baseline
    ({"patience": 2, "baseline": 3}, [5, 2, 4, 4, 1], 3, 1),
    ({"patience": 3, "baseline": 3}, [5, 4, 3.5, 2, 4, 4, 4, 1], 6, 3),
    ({"patience": 2, "baseline": 3, "mode": "max"}, [1, 2, 2.5, 2.5, 9], 3, 2),
    ({"patience": 2}, [5, math.nan, math.nan, 1], 2, 0),
]


def stopping(watch=None, **options):
    return EarlyStopping("val/score" if watch is None else watch, **options)


def rule(patience=1, mode="min", **watch):
    return EarlyStopping(Watch("val/score", mode, **watch), patience=patience)


@pytest.mark.parametrize(("options", "values", "last", "best"), KERAS)
def test_keras_rules(trainer, scripted, diary, same_weights, options, values, last, best):
    early, module = rule(**options), scripted(values)
    run = trainer([early, diary], max_epochs=len(values))
    run.fit(module)
    assert (run.current_epoch - 1, early.best_step) == (last, 2 * (best + 1))
    assert same_weights(module.state_dict(), diary.weights[best])


def test_a_relative_delta_is_a_share_of_the_best(trainer, scripted):
    early = stopping(Watch("val/score", "min", min_delta=0.1, relative=True), patience=2)
    run = trainer([early], max_epochs=9)
    run.fit(scripted([100.0, 91.0, 89.0, 81.0, 80.5, 1.0]))
    assert (early.best_score, run.current_epoch) == (89.0, 5)


def test_a_smoothed_metric_is_judged_and_free_of_bias(trainer, scripted):
    values = [4.0, 2.0, 3.0, 3.0, 3.0]
    early = stopping(Watch("val/score", "min", smoothing=0.5), patience=3)
    trainer([early], max_epochs=5).fit(scripted(values))
    total = weight = 0.0
    expected = []
    for value in values:
        total, weight = 0.5 * total + 0.5 * value, 0.5 * weight + 0.5
        expected.append(total / weight)
    judged = [point[2] for point in early._trackers[0].points]
    assert judged == pytest.approx(expected)
    assert early.best_score == pytest.approx(min(expected))
    assert early.best_step == 2 * (1 + expected.index(min(expected)))


@pytest.mark.parametrize(("options", "values", "last", "best"), [row for row in KERAS if "baseline" in row[0]])
def test_a_baseline_may_be_given_beside_the_name(trainer, scripted, options, values, last, best):
    early = EarlyStopping("val/score", **{"mode": "min", **options})
    run = trainer([early], max_epochs=len(values))
    run.fit(scripted(values))
    assert (run.current_epoch - 1, early.best_step) == (last, 2 * (best + 1))


def test_smoothing_may_be_given_beside_the_name(trainer, scripted):
    both = [stopping(mode="min", smoothing=0.5, patience=3), stopping(Watch("val/score", "min", smoothing=0.5))]
    for early in both:
        trainer([early], max_epochs=5).fit(scripted([4.0, 2.0, 3.0, 3.0, 3.0]))
    assert both[0]._trackers[0].points == both[1]._trackers[0].points
    assert both[0].best_score != 2.0


def test_a_value_that_is_not_finite_leaves_the_smoothed_ones_alone():
    early = stopping(Watch("val/score", "min", smoothing=0.5), patience=9)
    for value in (4.0, math.nan, 2.0):
        early._trackers[0].see(value, early._now)
    assert early._trackers[0].points[-1][2] == pytest.approx((0.5 * 2 + 0.25 * 4) / 0.75)


class TwoScores(Callback):
    """Logs a second metric."""

    def __init__(self, values):
        self.values = values

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("val/f1", self.values[min(trainer.current_epoch, len(self.values) - 1)])


@pytest.mark.parametrize(("stop_when", "epochs"), [("any", 3), ("all", 5)])
def test_several_metrics(trainer, scripted, diary, same_weights, stop_when, epochs):
    early = EarlyStopping([Watch("val/score", "min"), "val/f1"], patience=2, stop_when=stop_when)
    module = scripted([3.0, 4.0, 4.0, 4.0, 4.0, 0.0])
    run = trainer([TwoScores([1.0, 2.0, 3.0, 3.0, 3.0]), early, diary], max_epochs=6)
    run.fit(module)
    assert run.current_epoch == epochs
    assert same_weights(module.state_dict(), diary.weights[0])  # the best of the first metric
    assert ("val/f1" in early.stopped_reason) == (stop_when == "all")


def test_a_target_that_is_reached_stops(trainer, scripted):
    early = stopping(Watch("val/score", "min", target=1.5), patience=9)
    run = trainer([early], max_epochs=6)
    run.fit(scripted([3.0, 1.5, 1.0]))
    assert (run.current_epoch, early.stopped_reason) == (2, "`val/score` reached 1.5")


@pytest.mark.parametrize(
    ("patience", "steps", "words"),
    [(Epochs(2), 5, "2 epochs"), (Steps(3), 4, "3 steps"), (Steps(4), 5, "4 steps"), (3, 4, "3 validations")],
)
def test_patience_in_other_units(trainer, scripted, patience, steps, words):
    """Two validations an epoch, the first of which is the best."""

    class Scores(scripted):
        def validation_step(self, batch, _):
            self.log("val/score", 1.0 if self.global_step < 2 else 2.0, batch_size=4)

    early = stopping(mode="min", patience=patience)
    run = trainer([early], max_epochs=9, val_check_interval=1)
    run.fit(Scores())
    assert (run.global_step, early.stopped_reason) == (steps, f"`val/score` did not improve for {words}")


def test_patience_in_seconds_goes_on_after_a_resume(trainer, scripted, monkeypatch, tmp_path):
    clock = [0.0]

    class Time(Callback):
        def on_validation_start(self, trainer, *_):
            clock[0] += 10.0 * (not trainer.sanity_checking)

    monkeypatch.setattr(module_under_test.time, "monotonic", lambda: clock[0])
    saver = ModelCheckpoint(tmp_path / "saved", save_last=True)
    first = stopping(mode="min", patience=Seconds(25))
    trainer([Time(), first, saver], max_epochs=2, enable_checkpointing=True).fit(scripted([1.0, 2.0]))
    assert first.stopped_reason is None
    clock[0] = 1e6
    second = stopping(mode="min", patience=Seconds(25))
    run = trainer([Time(), second], max_epochs=9)
    run.fit(scripted([1.0, 2.0]), ckpt_path=saver.last_model_path)
    assert (run.current_epoch, second.stopped_reason) == (4, "`val/score` did not improve for 30 seconds")


@pytest.mark.parametrize("how", ["Ctrl-C", "a signal"])
def test_the_best_weights_are_restored_after_an_interruption(trainer, scripted, diary, same_weights, tmp_path, how):
    class Interrupt(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 6:
                if how == "Ctrl-C":
                    raise KeyboardInterrupt
                os.kill(os.getpid(), signal.SIGTERM)

    class Save(Callback):
        """Comes after, and must find the weights to resume from."""

        def on_exception(self, trainer, pl_module, exception):
            self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}

    early, save, module = stopping(mode="min", patience=9), Save(), scripted([3.0, 1.0, 2.0])
    run = trainer([early, diary, Interrupt(), save], max_epochs=5)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        run.fit(module)
    signal.signal(signal.SIGINT, handler)  # which Lightning ignores from then on
    assert same_weights(module.state_dict(), diary.weights[1])
    assert not same_weights(save.weights, diary.weights[1])
    assert len(run.callbacks) == 4


def test_says_at_the_end_why_it_stopped(trainer, scripted, told):
    trainer([stopping(mode="min", patience=Epochs(1))]).fit(scripted([1.0, 2.0]))
    assert (
        "EarlyStopping stopped, as `val/score` did not improve for 1 epochs; best `val/score` 1.0 at step 2; its"
        " weights are restored." in told.text
    )


def test_says_at_the_end_that_it_did_not_stop(trainer, scripted, told):
    trainer([stopping(mode="min")], max_epochs=2).fit(scripted([1.0, 2.0]))
    assert "EarlyStopping did not stop the fit; best `val/score` 1.0 at step 2" in told.text


def test_the_plot_shows_the_curve_the_best_and_the_stop(trainer, scripted):
    pytest.importorskip("matplotlib", reason="not run: needs matplotlib")
    early = stopping(Watch("val/score", "min", smoothing=0.5), patience=2)
    trainer([early]).fit(scripted([1.0, 2.0, 3.0]))
    _, axes = early.plot()
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert drawn["val/score"] == [[2.0, 1.0], [4.0, 2.0], [6.0, 3.0]]
    assert drawn["best"] == [[2.0, 1.0]]
    assert [x for x, _ in drawn["stopped"]] == [6, 6]
    assert [x for x, _ in drawn["smoothed"]] == [2, 4, 6]
    assert early.plot(axes)[1] is axes


def test_several_metrics_are_resumed(trainer, scripted, tmp_path):
    def make():
        return EarlyStopping([Watch("val/score", "min", smoothing=0.3), "val/f1"], patience=3, stop_when="all")

    scores, other = [3.0, 2.0, 4.0, 4.0, 4.0, 4.0], TwoScores([1.0, 3.0, 2.0, 2.0, 2.0, 2.0])
    whole = make()
    run = trainer([other, whole], max_epochs=9)
    run.fit(scripted(scores))
    saver = ModelCheckpoint(tmp_path / "saved", save_last=True)
    trainer([other, make(), saver], max_epochs=3, enable_checkpointing=True).fit(scripted(scores))
    again = make()
    resumed = trainer([other, again], max_epochs=9)
    resumed.fit(scripted(scores), ckpt_path=saver.last_model_path)
    assert resumed.global_step == run.global_step
    without_times = [{**t.state_dict(), "since": t.since[:3], "now": t.now[:3]} for t in again._trackers]
    assert without_times == [{**t.state_dict(), "since": t.since[:3], "now": t.now[:3]} for t in whole._trackers]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Epochs(0), "`Epochs` needs a whole number, 1 or more, got 0"),
        (lambda: Steps(1.5), "got 1.5"),
        (lambda: Seconds(0), "above 0, got 0"),
        (lambda: Watch("val/loss", smoothing=1.0), "`smoothing` must be at least 0 and below 1, got 1.0"),
        (lambda: Watch("val/loss", min_delta=-1), "`min_delta`.*got -1"),
        (lambda: Watch("val/loss", baseline=math.nan), "`baseline` must be a finite number or null, got nan"),
        (lambda: Watch("val/loss", target=math.inf), "`target` must be a finite number or null, got inf"),
        (lambda: EarlyStopping(smoothing=1.0), "`smoothing` must be at least 0 and below 1, got 1.0"),
        (
            lambda: EarlyStopping(Watch("val/loss"), smoothing=0.5),
            r"`smoothing`, got 0.5, is for .*name alone: ",
        ),
        (lambda: EarlyStopping(["val/loss", "val/f1"], baseline=0.5), r"`baseline`, got 0.5.*Watch\(..., baseline=0.5"),
        (lambda: EarlyStopping(["val/f1", Watch("val/loss")], smoothing=0.5), "`smoothing`, got 0.5, is for"),
        (lambda: EarlyStopping([Watch("val/loss")], min_delta=0.1), r"`min_delta`, got 0.1, is for .*by its name: "),
        (lambda: EarlyStopping(Watch("val/loss"), mode="max"), "`mode`, got 'max', is for"),
        (lambda: EarlyStopping([]), "must name a metric"),
        (lambda: EarlyStopping(["val/loss", "val/loss"]), "each once"),
        (lambda: EarlyStopping(stop_when="one"), "`stop_when` must be 'any' or 'all', got 'one'"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(MisconfigurationError, match=message):
        make()
