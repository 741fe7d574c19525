"""Gradient clipping: once per optimizer step, at the policy's limit, logged."""

import math

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_tricks.callbacks import ClippingPolicy, FixedNorm, GradientClipping, Value
from lightning_tricks.errors import MisconfigurationError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),  # resumed without the ModelCheckpoint
]


class NotingSGD(torch.optim.SGD):
    """Notes the gradients of each step, as the optimizer gets them."""

    def step(self, closure):
        loss = closure()
        self.seen.append(torch.cat([p.grad.flatten().clone() for g in self.param_groups for p in g["params"]]))
        super().step()
        return loss


@pytest.fixture
def sgd(scripted):
    class SGD(scripted):
        """Trains by plain SGD, noting gradients in `seen`."""

        batch = 4

        def __init__(self):
            super().__init__()
            self.seen = []

        def sgd(self, *parameters):
            optimizer = NotingSGD(parameters, lr=0.01)
            optimizer.seen = self.seen
            return optimizer

        def configure_optimizers(self):
            return self.sgd(*self.parameters())

        def train_dataloader(self):
            return DataLoader(super().train_dataloader().dataset, batch_size=self.batch)

    return SGD


def steps(trainer, module, limit, **options):
    """The gradients of each optimizer step, unclipped (limit None) or clipped."""
    callbacks = [] if limit is None else [GradientClipping(limit)]
    trainer(callbacks, max_epochs=1, limit_val_batches=0, **options).fit(module)
    return module.seen


def test_a_large_norm_is_brought_to_the_limit(trainer, sgd):
    raw, clipped = steps(trainer, sgd(), None)[0], steps(trainer, sgd(), 0.1)[0]
    assert raw.norm() > 0.1
    torch.testing.assert_close(clipped, raw * 0.1 / raw.norm())


def test_a_small_norm_is_left_alone(trainer, sgd):
    for raw, clipped in zip(steps(trainer, sgd(), None), steps(trainer, sgd(), FixedNorm(1e4)), strict=True):
        assert torch.equal(raw, clipped)


def test_equals_torch_at_every_step(trainer, sgd):
    ours = sgd()
    trainer([GradientClipping(0.2)], max_epochs=3, limit_val_batches=0).fit(ours)
    theirs = sgd()
    trainer([], max_epochs=3, limit_val_batches=0, gradient_clip_val=0.2).fit(theirs)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_accumulated_batches_are_clipped_as_one(trainer, sgd):
    class Halves(sgd):
        batch = 2

    whole, accumulated = steps(trainer, sgd(), 0.1), steps(trainer, Halves(), 0.1, accumulate_grad_batches=2)
    torch.testing.assert_close(accumulated, whole)


def logged(trainer, module, policy, tmp_path, **options):
    logger = CSVLogger(tmp_path)
    options = {"max_epochs": 1, "limit_val_batches": 0, "log_every_n_steps": 1, **options}
    trainer([GradientClipping(policy)], logger=logger, **options).fit(module)
    header, *rows = (
        line.split(",") for line in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().split()
    )
    return [{name: row[header.index(name)] for name in header if name.startswith("grad_norm")} for row in rows]


def test_logs_once_per_optimizer_step(trainer, sgd, tmp_path):
    class Halves(sgd):
        batch = 2

    raw = steps(trainer, Halves(), None, accumulate_grad_batches=2)
    rows = logged(trainer, Halves(), 1e4, tmp_path, accumulate_grad_batches=2)
    assert [float(row["grad_norm/total"]) for row in rows] == pytest.approx([grad.norm().item() for grad in raw])
    assert [row["grad_norm/limit"] for row in rows] == ["10000.0", "10000.0"]
    assert [row["grad_norm/clipped"] for row in rows] == ["0.0", "0.0"]


def test_logs_that_a_step_was_clipped(trainer, sgd, tmp_path):
    rows = logged(trainer, sgd(), 1e-3, tmp_path)
    assert [row["grad_norm/clipped"] for row in rows] == ["1.0", "1.0"]


def test_an_infinite_norm_leaves_finite_gradients_finite(trainer, sgd, tmp_path):
    class Huge(sgd):
        def on_after_backward(self):
            self.layer.bias.grad.fill_(math.inf)

    seen = steps(trainer, Huge(), 0.1)
    assert torch.isfinite(seen[0][:2]).all()
    rows = logged(trainer, Huge(), 0.1, tmp_path)
    assert rows[0]["grad_norm/clipped"] == "0.0"


class Doubling:
    """Doubles its limit at each step."""

    def __init__(self):
        self.value = 1.0

    def limit(self, norm):
        self.value *= 2
        return torch.full_like(norm, self.value)

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def test_a_policy_may_keep_state(trainer, sgd, tmp_path):
    policy = Doubling()
    assert isinstance(policy, ClippingPolicy)
    run = trainer([GradientClipping(policy)], max_epochs=1, limit_val_batches=0)
    run.fit(sgd())
    run.save_checkpoint(tmp_path / "saved.ckpt")
    resumed = Doubling()
    options = {"max_epochs": 2, "limit_val_batches": 0}
    trainer([GradientClipping(resumed)], **options).fit(sgd(), ckpt_path=tmp_path / "saved.ckpt")
    assert (policy.value, resumed.value) == (4.0, 16.0)


def test_each_optimizer_is_clipped_on_its_own(trainer, sgd, tmp_path):
    class Two(sgd):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return [self.sgd(self.layer.weight), self.sgd(self.layer.bias)]

        def training_step(self, batch, index):
            self.manual_backward(self.loss(batch))
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    weight, bias, *_ = steps(trainer, Two(), 1e-3)
    rows = logged(trainer, Two(), 1e-3, tmp_path)
    assert {"grad_norm/total/optimizer_0", "grad_norm/total/optimizer_1"} <= rows[0].keys()
    assert [weight.norm().item(), bias.norm().item()] == pytest.approx([1e-3, 1e-3])


@pytest.mark.parametrize("limit", [0, 0.0, -1.0, math.nan, math.inf, True, "1"])
def test_limits_that_make_no_sense(limit):
    with pytest.raises(MisconfigurationError, match=f"above 0, got {limit!r}"):
        GradientClipping(limit)
    with pytest.raises(MisconfigurationError, match=f"above 0, got {limit!r}"):
        FixedNorm(limit)
    with pytest.raises(MisconfigurationError, match=f"above 0, got {limit!r}"):
        Value(limit)


def test_a_trainer_that_clips_as_well_is_refused(trainer, sgd):
    with pytest.raises(MisconfigurationError):
        trainer([GradientClipping(1.0)], gradient_clip_val=0.5).fit(sgd())


def test_a_number_is_a_fixed_norm():
    assert repr(GradientClipping(2).policy) == repr(FixedNorm(2.0)) == "FixedNorm(limit=2.0)"


# -- by value --------------------------------------------------------------------------------------------------------


def test_by_value_equals_torch(trainer, sgd, tmp_path):
    ours, theirs = sgd(), sgd()
    trainer([GradientClipping(Value(0.3))], max_epochs=3, limit_val_batches=0).fit(ours)
    options = {"gradient_clip_val": 0.3, "gradient_clip_algorithm": "value"}
    trainer([], max_epochs=3, limit_val_batches=0, **options).fit(theirs)
    for one, other in zip(ours.seen, theirs.seen, strict=True):
        assert torch.equal(one, other)
    assert max(gradient.abs().max() for gradient in ours.seen) == 0.3


def test_by_value_logs_the_norm_before_and_whether_it_clipped(trainer, sgd, tmp_path):
    raw = steps(trainer, sgd(), None)
    rows = logged(trainer, sgd(), Value(raw[0].abs().max().item() * 0.99), tmp_path / "some")
    assert float(rows[0]["grad_norm/total"]) == pytest.approx(raw[0].norm().item())
    assert rows[0]["grad_norm/clipped"] == "1.0"
    assert logged(trainer, sgd(), Value(100.0), tmp_path / "none")[0]["grad_norm/clipped"] == "0.0"


def test_by_value_brings_an_infinite_element_to_the_limit(trainer, sgd):
    class Huge(sgd):
        def on_after_backward(self):
            self.layer.bias.grad.fill_(-math.inf)

    seen = steps(trainer, Huge(), Value(0.1))
    assert seen[0][2] == pytest.approx(-0.1)


def test_by_value_clips_sparse_gradients(trainer, sgd):
    class Sparse(sgd):
        def on_after_backward(self):
            self.layer.weight.grad = self.layer.weight.grad.to_sparse()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

    module, before = Sparse(), sgd().layer.weight.detach().clone()
    trainer([GradientClipping(Value(1e-3))], max_steps=1, limit_val_batches=0).fit(module)
    torch.testing.assert_close((module.layer.weight - before).abs(), torch.full((1, 2), 1e-3), rtol=1e-3, atol=0)
