"""GradientNormMonitor on one device; its row of the matrix has it on every engine."""

import itertools
import logging

import pytest
import torch
from lightning.pytorch import Callback

from lightning_tricks.callbacks import GradientClipping, GradientNormMonitor, NonFiniteGuard
from lightning_tricks.callbacks._norm_series import PENDING, POINTS, NormSeries
from lightning_tricks.errors import MisconfigurationError
from tests.callbacks.guard_jobs import LOSS_ALONE, Spoilt

pytestmark = pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")


def norms_of(monitor):
    (series,) = monitor.state_dict()["series"].values()
    return [norm for _, norm, _ in series["points"]]


class Noting(Spoilt):
    """Notes the norm of each step's gradient, whole and of the head."""

    def __init__(self, **options):
        super().__init__(**options)
        self.norms, self.heads = [], []

    def on_after_backward(self):
        gradients = {name: p.grad.flatten().double() for name, p in self.named_parameters()}
        self.norms.append(torch.cat(list(gradients.values())).norm().item())
        head = [value for name, value in gradients.items() if name.startswith("head.")]
        self.heads.append(torch.cat(head).norm().item())


@pytest.mark.parametrize("first", [True, False])
def test_norms_are_those_before_clipping_in_either_order(trainer, first):
    monitor, clip, module = GradientNormMonitor(groups={"top": "head"}), GradientClipping(1e-3), Noting()
    run = trainer([monitor, clip] if first else [clip, monitor], max_epochs=1)
    run.fit(module)
    assert norms_of(monitor) == pytest.approx(module.norms, rel=1e-5)
    assert float(run.callback_metrics["grad_norm/top"]) == pytest.approx(module.heads[-1], rel=1e-5)
    assert float(run.callback_metrics["grad_norm/clipped_share"]) == 1


def test_every_other_step(trainer):
    monitor, module = GradientNormMonitor(every_n_steps=2), Noting()
    trainer([monitor], max_epochs=1).fit(module)
    assert norms_of(monitor) == pytest.approx(module.norms[::2], rel=1e-5)


def test_without_clipping_there_is_no_share(trainer):
    monitor = GradientNormMonitor()
    run = trainer([monitor], max_epochs=1)
    run.fit(Spoilt())
    assert "grad_norm/clipped_share" not in run.callback_metrics


@pytest.mark.parametrize("kind", [1, 2, LOSS_ALONE])
def test_dropped_steps_are_in_no_quantile(trainer, kind):
    monitor = GradientNormMonitor()
    trainer([monitor, NonFiniteGuard()], max_epochs=1).fit(Spoilt(kind, bad=(3,)))
    (series,) = monitor.state_dict()["series"].values()
    assert (series["skipped"], series["sketch"]["count"]) == ([3], 7)
    assert monitor.quantiles([0.0])[0] > 0


def test_statistics_survive_a_resume_bit_for_bit(trainer, tmp_path):
    whole, first, resumed = (GradientNormMonitor() for _ in range(3))
    trainer([whole], max_epochs=2).fit(Spoilt())
    run = trainer([first], max_epochs=1)
    run.fit(Spoilt())
    run.save_checkpoint(tmp_path / "saved.ckpt")
    trainer([resumed], max_epochs=2).fit(Spoilt(), ckpt_path=tmp_path / "saved.ckpt")
    assert repr(resumed.state_dict()) == repr(whole.state_dict())
    assert len(norms_of(resumed)) == 16


def test_too_few_norms_suggest_nothing_and_the_end_says_so(trainer, caplog):
    monitor = GradientNormMonitor()
    with caplog.at_level(logging.INFO, "lightning_tricks"):
        trainer([monitor], max_epochs=1).fit(Spoilt())
    assert monitor.suggest().limit is None
    assert "8 gradient norms are too few to suggest a limit: 100 are needed" in caplog.text


def test_enough_norms_suggest_their_95th_percentile(trainer, caplog):
    monitor, module = GradientNormMonitor(), Noting()
    with caplog.at_level(logging.INFO, "lightning_tricks"):
        trainer([monitor], max_epochs=13).fit(module)
    suggestion = monitor.suggest()
    assert suggestion.count == 104
    assert suggestion.limit == pytest.approx(sorted(module.norms)[98], rel=1e-5)  # 0.95 * 103 is 97.85
    assert suggestion.reason in caplog.text


def test_the_picture(trainer):
    pytest.importorskip("matplotlib", reason="not run: needs matplotlib")
    monitor = GradientNormMonitor()
    trainer([monitor, GradientClipping(0.3), NonFiniteGuard()], max_epochs=1).fit(Spoilt(bad=(3,)))
    figure, axes = monitor.plot()
    assert axes.figure is figure
    norm, limit, skipped = axes.lines
    assert list(norm.get_ydata()) == norms_of(monitor)
    assert list(limit.get_ydata()) == pytest.approx([0.3] * 7)
    assert list(skipped.get_xdata()) == [3, 3]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "norm",
        "5th to 95th percentile",
        "limit",
        "skipped",
    ]
    assert monitor.plot(axes)[1] is axes


def test_the_history_is_bounded_and_keeps_the_peaks():
    series = NormSeries()
    for step in range(3 * POINTS):
        series.add(step, torch.tensor(100.0 if step == 777 else 1.0), None, applied=True)
    series.settle()
    assert len(series.points) <= POINTS
    assert max(series.points, key=lambda point: point[1])[:2] == (777, 100.0)
    assert series.sketch.count == 3 * POINTS


def test_the_device_is_read_once_in_many_steps(monkeypatch):
    reads, original = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: reads.append(1) or original(self))
    series = NormSeries()
    for step in range(PENDING - 1):
        series.add(step, torch.tensor(1.0), None, applied=True)
    assert not reads
    series.add(PENDING, torch.tensor(1.0), None, applied=True)
    assert len(reads) == 1


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_intervals_that_make_no_sense(value):
    with pytest.raises(MisconfigurationError, match=f"above 0, got {value!r}"):
        GradientNormMonitor(every_n_steps=value)


def test_a_group_that_selects_nothing(trainer):
    run = trainer([GradientNormMonitor(groups=["haed"])], max_epochs=1)
    with pytest.raises(MisconfigurationError, match=r"`haed` selects no trained parameter of Spoilt: .* `enter`"):
        run.fit(Spoilt())
    assert run.global_step == 0


def test_a_group_whose_name_is_taken():
    with pytest.raises(MisconfigurationError, match="`total` would be logged as `grad_norm/total`"):
        GradientNormMonitor(groups=["total"])


class Weights(Callback):
    """The weights before each step, and at the end."""

    def __init__(self):
        self.flat = []

    def on_train_batch_start(self, trainer, module, *_):
        self.flat.append(torch.cat([p.detach().flatten().double() for p in module.parameters()]))

    on_train_end = on_train_batch_start


def test_update_ratio_is_the_updates_norm_over_the_weights(trainer):
    weights, ratios = Weights(), []

    class Rows(Callback):
        def on_train_batch_end(self, trainer, *_):
            ratios.append(float(trainer.callback_metrics["update_ratio/total"]))

    monitor = GradientNormMonitor(groups={"top": "head"}, update_ratio_every=2)
    run = trainer([weights, monitor, Rows()], max_epochs=1)
    run.fit(Spoilt())
    wanted = [float((after - before).norm() / before.norm()) for before, after in itertools.pairwise(weights.flat)]
    assert ratios[::2] == pytest.approx(wanted[::2], rel=1e-4)
    assert ratios[1::2] == ratios[::2], "measured in every step"
    assert 0 < float(run.callback_metrics["update_ratio/top"]) != ratios[-1]


def test_update_ratio_of_a_window_counts_its_step(trainer):
    monitor = GradientNormMonitor(update_ratio_every=1)
    run = trainer([monitor], max_epochs=1, accumulate_grad_batches=3)
    run.fit(Spoilt())
    assert run.callback_metrics["update_ratio/total"] > 0


def test_update_ratio_of_a_dropped_step_is_zero(trainer):
    run = trainer([GradientNormMonitor(update_ratio_every=1), NonFiniteGuard()], max_epochs=1, limit_train_batches=2)
    run.fit(Spoilt(bad=(1,)))
    assert run.callback_metrics["update_ratio/total"] == 0


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_intervals_of_the_update_ratio_that_make_no_sense(every):
    with pytest.raises(MisconfigurationError, match=f"`update_ratio_every` must .* above 0, got {every}"):
        GradientNormMonitor(update_ratio_every=every)
