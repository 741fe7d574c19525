"""Policies that learn from past norms, in real fits: spikes, warm-up, norms that are not finite, resumed fits."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from lightning_tricks.callbacks import ClippingPolicy, GradientClipping, Percentile, ZScore
from lightning_tricks.errors import MisconfigurationError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),  # resumed without the ModelCheckpoint
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]

POLICIES = {
    "percentile": lambda **options: Percentile(50, window=8, warmup=4, **options),
    "zscore": lambda **options: ZScore(2.0, decay=0.9, warmup=4, **options),
}
each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
SCALES = (1.0, 1.2, 0.8, 1.1, 0.9, 1.0, 1.3, 0.7, 1.1, 1.0, 0.9, 1.2)  # norms of usual steps


class Given(LightningModule):
    """Its gradient in each step is the batch: the norm is the scale that the data give."""

    def __init__(self, scales, batch=1):
        super().__init__()
        self.scales, self.batch = list(scales), batch
        self.weight = torch.nn.Parameter(torch.zeros(4))

    def training_step(self, batch, _):
        return (batch[0].mean() * self.weight / 2).sum()  # the gradient is scale / 2 in each of 4 elements

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.tensor(self.scales)), batch_size=self.batch)


class Notes(Callback):
    """What was logged of each optimizer step, and the norm that the optimizer got."""

    def __init__(self):
        self.rows, self.step = [], 0

    def on_train_start(self, trainer, pl_module):
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step > self.step:  # the gradients of the step are still there
            logged = {name.split("/")[1]: value.item() for name, value in trainer.callback_metrics.items()}
            self.rows.append({**logged, "left": pl_module.weight.grad.norm().item()})
            self.step = trainer.global_step


def fit(trainer, scales, policy, batch=1, **options):
    notes = Notes()
    module = Given(scales, batch)
    trainer([GradientClipping(policy), notes], **{"max_epochs": 1, **options}).fit(module)
    return module, notes.rows


def column(rows, name):
    return [row[name] for row in rows]


# -- what they do ----------------------------------------------------------------------------------------------------


def test_percentile_clips_at_that_of_the_last_norms(trainer):
    _, rows = fit(trainer, SCALES, Percentile(50, window=8, warmup=4))
    norms = np.array(SCALES, dtype=np.float32)
    wanted = [np.percentile(norms[max(0, step - 7) : step + 1], 50) for step in range(4, 12)]
    assert column(rows, "limit") == pytest.approx([math.inf] * 4 + wanted)
    assert column(rows, "left") == pytest.approx(np.minimum(norms, [math.inf] * 4 + wanted).tolist())
    assert 0 < sum(column(rows, "clipped")) < 8


@each_policy
def test_a_spike_is_clipped(trainer, policy):
    _, rows = fit(trainer, [*SCALES, 1000.0, 1.0], policy())
    assert (rows[12]["total"], rows[12]["clipped"]) == (1000.0, 1.0)
    assert rows[12]["left"] == pytest.approx(rows[12]["limit"])
    assert rows[12]["left"] < 1.5
    assert rows[13]["left"] > 0.9, "the spike has moved the limit of what came after it"


@each_policy
def test_warm_up_clips_nothing_or_at_its_own_limit(trainer, policy):
    _, free = fit(trainer, [50.0, *SCALES], policy())
    assert column(free[:4], "limit") == [math.inf] * 4
    assert column(free[:4], "clipped") == [0.0] * 4
    assert free[0]["left"] == 50.0
    _, limited = fit(trainer, [50.0, *SCALES], policy(warmup_limit=2.0))
    assert column(limited[:4], "limit") == [2.0] * 4
    assert limited[0]["left"] == pytest.approx(2.0)
    assert limited[4]["limit"] != 2.0


@each_policy
def test_accumulated_batches_are_one_decision(trainer, policy):
    whole, rows = fit(trainer, SCALES, policy(), batch=2)
    parts, accumulated = fit(trainer, SCALES, policy(), batch=1, accumulate_grad_batches=2)
    assert len(accumulated) == len(rows) == 6
    for name in ("total", "limit", "left"):
        assert column(accumulated, name) == pytest.approx(column(rows, name))
    torch.testing.assert_close(parts.weight, whole.weight)


# -- traps -----------------------------------------------------------------------------------------------------------


@each_policy
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("when", [2, 10], ids=["in the warm-up", "after it"])
def test_a_norm_that_is_not_finite_enters_no_statistics(trainer, policy, bad, when):
    scales = [*SCALES[:when], bad, *SCALES[when:], 1000.0]
    _, rows = fit(trainer, scales, policy())
    _, without = fit(trainer, [*SCALES, 1000.0], policy())
    assert rows[when]["clipped"] == 0.0
    del rows[when]
    for name in ("total", "limit", "left", "clipped"):
        assert column(rows, name) == column(without, name)
    assert rows[-1]["left"] < 1.5, "the spike after it was not clipped"


@each_policy
def test_an_infinite_norm_leaves_finite_gradients_finite(trainer, policy):
    class OneInfinite(Given):
        def on_after_backward(self):
            if self.global_step == 6:
                self.weight.grad[0] = math.inf

    module = OneInfinite(SCALES)
    trainer([GradientClipping(policy())], max_epochs=1).fit(module)
    assert module.weight[1:].isfinite().all()
    torch.testing.assert_close(module.weight[1], module.weight[3])


@each_policy
def test_the_norm_is_of_unscaled_gradients(trainer, policy):
    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    _, rows = fit(trainer, SCALES, policy(), plugins=[plugin])
    _, plain = fit(trainer, SCALES, policy())
    assert column(rows, "total") == pytest.approx(column(plain, "total"), rel=2e-3)
    assert column(rows, "limit") == pytest.approx(column(plain, "limit"), rel=5e-3)


@each_policy
@pytest.mark.parametrize("saved_after", [2, 7], ids=["in the warm-up", "after it"])
def test_a_resumed_fit_has_the_same_limits_bit_for_bit(trainer, policy, saved_after, tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 4 * saved_after:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    notes, module = Notes(), Given(SCALES[:4])
    scales = {"max_epochs": 12, "reload_dataloaders_every_n_epochs": 1}

    class Changing(Given):
        def train_dataloader(self):
            self.scales = [scale * (1 + 0.1 * self.current_epoch) for scale in SCALES[:4]]
            return super().train_dataloader()

    module = Changing(())
    trainer([GradientClipping(policy()), notes, Save()], **scales).fit(module)
    again, resumed = Notes(), Changing(())
    trainer([GradientClipping(policy()), again], **scales).fit(resumed, ckpt_path=tmp_path / "saved.ckpt")
    for name in ("total", "limit", "left", "clipped"):
        assert column(again.rows, name) == column(notes.rows[4 * saved_after :], name)
    assert torch.equal(resumed.weight, module.weight)


class Two(LightningModule):
    """Two optimizers, stepped by hand; the gradients of the second are a hundred times those of the first."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(4))
        self.other = torch.nn.Parameter(torch.zeros(4))

    def configure_optimizers(self):
        return [torch.optim.SGD([parameter], lr=0.1) for parameter in (self.weight, self.other)]

    def training_step(self, batch, _):
        self.manual_backward((batch[0].mean() * (self.weight + 100 * self.other) / 2).sum())
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    train_dataloader = Given.train_dataloader
    scales, batch = SCALES, 1


@each_policy
def test_each_optimizer_has_its_own_statistics(trainer, policy, tmp_path):
    clipping = GradientClipping(policy())
    run = trainer([clipping], max_epochs=1)
    run.fit(Two())
    _, alone = fit(trainer, SCALES, policy())
    logged = run.callback_metrics
    assert logged["grad_norm/limit/optimizer_0"].item() == pytest.approx(alone[-1]["limit"])
    assert logged["grad_norm/limit/optimizer_1"].item() == pytest.approx(100 * alone[-1]["limit"])

    run.save_checkpoint(tmp_path / "saved.ckpt")
    resumed = GradientClipping(policy())
    trainer([resumed], max_epochs=1).fit(Two(), ckpt_path=tmp_path / "saved.ckpt")
    saved, restored = clipping.state_dict()["policies"], resumed.state_dict()["policies"]
    assert saved.keys() == restored.keys() == {0, 1}
    for index, state in saved.items():
        assert all(torch.equal(value, restored[index][name]) for name, value in state.items())


class Forbidden(TorchDispatchMode):
    """Raises where a value is read back from the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.name() not in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::item"), function.name()
        return function(*args, **(kwargs or {}))


@each_policy
def test_nothing_waits_for_the_device(trainer, policy):
    class Watched(GradientClipping):
        def on_before_optimizer_step(self, *args):
            with Forbidden():
                super().on_before_optimizer_step(*args)

    with pytest.raises(AssertionError, match="_local_scalar_dense"), Forbidden():
        float(torch.ones(()))
    run = trainer([Watched(policy())], max_epochs=1)
    run.fit(Given(SCALES))
    assert "grad_norm/limit" in run.callback_metrics


def test_the_cards_policy_of_ones_own(trainer, tmp_path):
    card = (Path(__file__).parents[2] / "docs/cards/gradient_clipping.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL) if "class " in block]
    names = {}
    exec(code, names)
    _, rows = fit(trainer, SCALES, names["clipping"].policy)
    assert column(rows, "left") == pytest.approx([0.1 * 1.01**step for step in range(1, 13)])


# -- options ---------------------------------------------------------------------------------------------------------


@each_policy
def test_is_a_policy(policy):
    assert isinstance(policy(), ClippingPolicy)


@pytest.mark.parametrize("q", [0, 100, -5, 101, math.nan, True, "95"])
def test_percentages_that_make_no_sense(q):
    with pytest.raises(MisconfigurationError, match=f"below 100, got {q!r}"):
        Percentile(q)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q": 99, "warmup": 50}, "`warmup` must be a whole number, 100 or more, got 50: a single outlier"),
        ({"warmup": 100, "window": 100}, "`window` must be a whole number, 101 or more, got 100"),
        ({"warmup": 25.0}, "got 25.0"),
        ({"warmup_limit": 0}, "`warmup_limit` must be a finite number above 0, got 0"),
    ],
)
def test_percentile_options_that_make_no_sense(options, message):
    with pytest.raises(MisconfigurationError, match=message):
        Percentile(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0}, "`threshold` must be a finite number above 0, got 0"),
        ({"threshold": math.nan}, "got nan"),
        ({"decay": 1.0}, "`decay` must be above 0 and below 1, got 1.0"),
        ({"warmup": 1}, "`warmup` must be a whole number, 2 or more, got 1"),
        ({"warmup_limit": -1.0}, "`warmup_limit` must be a finite number above 0, got -1.0"),
    ],
)
def test_zscore_options_that_make_no_sense(options, message):
    with pytest.raises(MisconfigurationError, match=message):
        ZScore(**options)


@pytest.mark.parametrize("window", [6, 8, 20])
def test_a_window_may_be_resized_between_fits(window):
    old, new = Percentile(50, window=8, warmup=4), Percentile(50, window=window, warmup=4)
    for scale in SCALES:
        old.limit(torch.tensor(scale))
    new.load_state_dict(old.state_dict())
    kept = torch.tensor(SCALES)[-min(window, 8) :]
    assert torch.equal(new.state_dict()["norms"][-len(kept) :], kept)
    assert len(new.state_dict()["norms"]) == window
