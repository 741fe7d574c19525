"""UnitwiseAdaptive on one device, against the paper's definition in float64."""

import math

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_tricks.callbacks import GradientClipping, GradientPolicy, UnitwiseAdaptive
from lightning_tricks.errors import MisconfigurationError, UnsupportedError

RATIO = 0.02


class Image(L.LightningModule):
    """A convolution, a linear layer beside one that starts at zero, a head; trained by SGD that notes gradients."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 5, (2, 3))
        self.linear = nn.Linear(5 * 5 * 2, 4)
        self.head = nn.Linear(4, 1)
        self.fresh = nn.Linear(5 * 5 * 2, 4, bias=False)
        nn.init.zeros_(self.fresh.weight)
        self.raw, self.clipped, self.spoil = [], [], None

    def training_step(self, batch, index):
        hidden = torch.tanh(self.convolution(batch[0])).flatten(1)
        return 50 * (self.head(self.linear(hidden) + self.fresh(hidden)) - batch[1]).square().mean()

    def on_after_backward(self):
        if self.spoil is not None:
            self.spoil(self)
        self.raw.append(self.gradients())

    def optimizer_step(self, epoch, index, optimizer, closure):
        super().optimizer_step(epoch, index, optimizer, closure)
        self.clipped.append(self.gradients())

    def gradients(self):
        return {name: parameter.grad.clone() for name, parameter in self.named_parameters()}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        tensors = torch.randn(8, 3, 6, 4, generator=generator), torch.randn(8, 1, generator=generator)
        return DataLoader(TensorDataset(*tensors), batch_size=4)


def papers(weight, gradient, ratio=RATIO, floor=1e-3):
    """Equation 3 of the paper, one unit after the other: a vector is one, else each output is."""
    weight, gradient = weight.double(), gradient.double()
    if weight.ndim <= 1:
        allowed = ratio * max(float(weight.norm()), floor)
        return gradient * allowed / gradient.norm() if gradient.norm() > allowed else gradient
    return torch.stack(
        [papers(w.flatten(), g.flatten(), ratio, floor).view_as(g) for w, g in zip(weight, gradient, strict=True)]
    )


def fit(trainer, policy, **options):
    module = Image()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    run = trainer([GradientClipping(policy)], **{"max_steps": 1, "max_epochs": 1, "limit_val_batches": 0, **options})
    run.fit(module)
    return run, module, before


@pytest.mark.parametrize("ratio", [12.0, 40.0])
def test_is_the_papers_on_a_convolution_a_linear_layer_and_a_bias(trainer, ratio):
    run, module, before = fit(trainer, UnitwiseAdaptive(ratio))
    clipped = 0
    for name, weight in before.items():
        raw = module.raw[0][name]
        wanted = papers(weight, raw, ratio).float()
        torch.testing.assert_close(module.clipped[0][name], wanted, rtol=1e-5, atol=0)
        rows = (wanted - raw).flatten(1) if raw.ndim > 1 else (wanted - raw)[None]
        clipped += int(rows.any(1).sum())
    units = 5 + 1 + 4 + 1 + 4 + 1 + 1
    assert 0 < clipped < units, "all or none: choose another ratio"
    assert run.callback_metrics["grad_norm/clipped"] == pytest.approx(clipped / units)


def test_a_unit_is_not_a_tensor(trainer):
    """Some outputs of one convolution are clipped and others are not."""
    _, unclipped, before = fit(trainer, UnitwiseAdaptive(1e6))
    raw = unclipped.raw[0]["convolution.weight"]
    ratios = raw.flatten(1).norm(dim=1) / before["convolution.weight"].flatten(1).norm(dim=1)
    _, module, _ = fit(trainer, UnitwiseAdaptive(float(ratios.median())))
    raw, clipped = module.raw[0]["convolution.weight"], module.clipped[0]["convolution.weight"]
    same = [torch.equal(*pair) for pair in zip(raw, clipped, strict=True)]
    assert 0 < sum(same) < 5


def test_weights_that_start_at_zero_learn(trainer):
    _, module, before = fit(trainer, UnitwiseAdaptive(RATIO), max_steps=-1, max_epochs=3)
    assert not before["fresh.weight"].any()
    torch.testing.assert_close(module.clipped[0]["fresh.weight"].norm(dim=1), torch.full((4,), RATIO * 1e-3))
    assert module.fresh.weight.detach().norm(dim=1).min() > RATIO * 1e-3 * 0.01 * 2


@pytest.mark.parametrize(
    ("exclude", "kept"),
    [(["head"], {"head.weight", "head.bias"}), (["*.bias"], {f"{n}.bias" for n in ("convolution", "linear", "head")})],
)
def test_what_is_excluded_is_left_alone(trainer, exclude, kept):
    _, module, before = fit(trainer, UnitwiseAdaptive(1e-5, exclude=exclude))
    untouched = {name for name in before if torch.equal(module.raw[0][name], module.clipped[0][name])}
    assert untouched == kept


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_unit_that_is_not_finite_spoils_no_other(trainer, bad):
    module = Image()
    module.spoil = lambda own: own.convolution.weight.grad[1, 0, 0].fill_(bad)
    trainer([GradientClipping(UnitwiseAdaptive(RATIO))], max_steps=1, limit_val_batches=0).fit(module)
    raw, clipped = module.raw[0]["convolution.weight"], module.clipped[0]["convolution.weight"]
    assert torch.equal(raw[1], clipped[1]) or bad != bad
    assert torch.equal(clipped.isfinite(), raw.isfinite())
    assert clipped[2].norm() < raw[2].norm()
    assert torch.isfinite(module.clipped[0]["linear.weight"]).all()


def test_a_gradient_of_zero_stays(trainer):
    module = Image()
    module.spoil = lambda own: [parameter.grad.zero_() for parameter in own.parameters()]
    trainer([GradientClipping(UnitwiseAdaptive(RATIO))], max_steps=1, limit_val_batches=0).fit(module)
    assert not any(gradient.any() for gradient in module.clipped[0].values())


def test_channels_last_is_clipped_in_place(trainer):
    module = Image()
    module.convolution.to(memory_format=torch.channels_last)
    weight = module.convolution.weight.detach().clone()
    trainer([GradientClipping(UnitwiseAdaptive(RATIO))], max_steps=1, limit_val_batches=0).fit(module)
    wanted = papers(weight, module.raw[0]["convolution.weight"]).float()
    torch.testing.assert_close(module.clipped[0]["convolution.weight"], wanted, rtol=1e-5, atol=0)


class Tokens(Image):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 3, sparse=True)

    def training_step(self, batch, index):
        return super().training_step(batch, index) + self.table(torch.tensor([1, 1])).sum()


def test_sparse_gradients_are_refused_unless_excluded(trainer):
    with pytest.raises(UnsupportedError, match="leave `sparse=True` out of the embedding, or exclude it"):
        trainer([GradientClipping(UnitwiseAdaptive(RATIO))], max_steps=1, limit_val_batches=0).fit(Tokens())
    policy = UnitwiseAdaptive(RATIO, exclude=["table"])
    trainer([GradientClipping(policy)], max_steps=1, limit_val_batches=0).fit(Tokens())


def test_is_a_policy():
    assert isinstance(UnitwiseAdaptive(), GradientPolicy)


@pytest.mark.parametrize("ratio", [0, -1.0, math.nan, math.inf, True, "0.01"])
def test_ratios_that_make_no_sense(ratio):
    with pytest.raises(MisconfigurationError, match=f"`ratio` must be a finite number above 0, got {ratio!r}"):
        UnitwiseAdaptive(ratio)


def test_names_to_exclude_that_make_no_sense(trainer):
    with pytest.raises(MisconfigurationError, match="must be a list of names, got 'head'"):
        UnitwiseAdaptive(exclude="head")
    with pytest.raises(MisconfigurationError, match="`exclude` of UnitwiseAdaptive: `tail` selects no trained param"):
        fit(trainer, UnitwiseAdaptive(exclude=["tail"]))
