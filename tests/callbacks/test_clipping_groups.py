"""Limits for parts of the model, on one device, against torch's own clipping of each part."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_tricks.callbacks import FixedNorm, GradientClipping, Percentile, UnitwiseAdaptive, Value
from lightning_tricks.errors import MisconfigurationError

pytestmark = [pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")]


class Parts(LightningModule):
    """Three parts, whose raw and clipped gradients are noted."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))
        self.middle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 1)
        self.raw, self.clipped = [], []

    def training_step(self, batch, index):
        return 10 * (self.head(self.middle(self.encoder(batch[0]))) - batch[1]).square().mean()

    def on_after_backward(self):
        self.raw.append(self.gradients())

    def optimizer_step(self, epoch, index, optimizer, closure):
        super().optimizer_step(epoch, index, optimizer, closure)
        self.clipped.append(self.gradients())

    def gradients(self):
        return {name: parameter.grad.clone() for name, parameter in self.named_parameters()}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self):
        x = torch.randn(24, 3, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True) * 3), batch_size=4)


def fit(trainer, policies, module=None, **options):
    module = module or Parts()
    run = trainer([GradientClipping(policies)], **{"max_epochs": 1, "limit_val_batches": 0, **options})
    run.fit(module)
    return run, module


def torchs(raw, prefix, limit):
    """What torch's clipping makes of the gradients of one part."""
    own = {name: nn.Parameter(gradient) for name, gradient in raw.items() if name.startswith(prefix)}
    for parameter in own.values():
        parameter.grad = parameter.detach().clone()
    norm = nn.utils.clip_grad_norm_(own.values(), limit)
    return {name: parameter.grad for name, parameter in own.items()}, float(norm)


def test_each_part_has_its_own_norm_and_limit(trainer):
    run, module = fit(trainer, {"encoder.*": 1.0, "head": FixedNorm(0.5)})
    for raw, clipped in zip(module.raw, module.clipped, strict=True):
        for prefix, limit in (("encoder", 1.0), ("head", 0.5), ("middle", 1e9)):
            wanted, norm = torchs(raw, prefix, limit)
            assert norm > limit or prefix == "middle"
            for name, gradient in wanted.items():
                torch.testing.assert_close(clipped[name], gradient)
    logged = run.callback_metrics
    assert logged["grad_norm/encoder.*"] == pytest.approx(torchs(module.raw[-1], "encoder", 1.0)[1])
    assert logged["grad_norm/limit/head"] == 0.5
    assert logged["grad_norm/clipped/head"] == 1.0
    whole = torch.stack([gradient.norm() for gradient in module.raw[-1].values()]).norm()
    assert logged["grad_norm/total"] == pytest.approx(float(whole))


def test_the_first_part_that_selects_a_parameter_has_it(trainer):
    _, module = fit(trainer, {"head": 0.5, "*": 2.0})
    rest = {name: gradient for name, gradient in module.raw[0].items() if not name.startswith("head")}
    wanted, norm = torchs(rest, "", 2.0)
    assert norm > 2.0
    for name, gradient in wanted.items():
        torch.testing.assert_close(module.clipped[0][name], gradient)


def test_policies_of_any_kind(trainer):
    _, module = fit(
        trainer, {"encoder": Value(0.1), "middle": UnitwiseAdaptive(0.01), "head": Percentile(50, warmup=2)}
    )
    raw, clipped = module.raw[0], module.clipped[0]
    assert torch.equal(clipped["encoder.0.weight"], raw["encoder.0.weight"].clamp(-0.1, 0.1))
    assert clipped["middle.weight"].norm() < raw["middle.weight"].norm()
    assert torch.equal(clipped["head.weight"], raw["head.weight"])  # in the warm-up


def test_statistics_of_each_part_survive_a_resume(trainer, tmp_path):
    def policies():
        return {"encoder": Percentile(50, window=5, warmup=2), "head": Percentile(50, window=5, warmup=2)}

    whole = GradientClipping(policies())
    trainer([whole], max_epochs=2, limit_val_batches=0).fit(Parts())
    first = trainer([GradientClipping(policies())], max_epochs=1, limit_val_batches=0)
    first.fit(Parts())
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = GradientClipping(policies())
    trainer([resumed], max_epochs=2, limit_val_batches=0).fit(Parts(), ckpt_path=tmp_path / "half.ckpt")
    found, wanted = resumed.state_dict()["policies"][0], whole.state_dict()["policies"][0]
    assert found.keys() == wanted.keys() == {"encoder", "head"}
    for part, state in wanted.items():
        assert torch.equal(found[part]["norms"], state["norms"])
    assert not torch.equal(wanted["encoder"]["norms"], wanted["head"]["norms"])


class Two(Parts):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        first = [*self.encoder.parameters(), *self.middle.parameters()]
        return [torch.optim.SGD(parameters, lr=0.01) for parameters in (first, self.head.parameters())]

    def training_step(self, batch, index):
        first, second = self.optimizers()
        self.manual_backward(super().training_step(batch, index))
        first.step()
        second.step()
        self.clipped.append(self.gradients())
        first.zero_grad()
        second.zero_grad()

    def optimizer_step(self, *args):
        raise AssertionError("not called by hand")


def test_two_optimizers_have_their_own_limits(trainer):
    run, module = fit(trainer, {"middle": 0.25, "head": 0.5, "*": 1.0}, Two())
    for prefix, limit in (("encoder", 1.0), ("middle", 0.25), ("head", 0.5)):
        for name, gradient in torchs(module.raw[0], prefix, limit)[0].items():
            torch.testing.assert_close(module.clipped[0][name], gradient)
    assert {"grad_norm/limit/middle/optimizer_0", "grad_norm/limit/head/optimizer_1"} <= run.callback_metrics.keys()
    assert "grad_norm/limit/head/optimizer_0" not in run.callback_metrics


def test_a_part_over_two_optimizers_has_a_norm_in_each(trainer):
    _, module = fit(trainer, {"*": 1.0}, Two())
    own = {name: gradient for name, gradient in module.raw[0].items() if not name.startswith("head")}
    for name, gradient in {**torchs(own, "", 1.0)[0], **torchs(module.raw[0], "head", 1.0)[0]}.items():
        torch.testing.assert_close(module.clipped[0][name], gradient)


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        ({"encodr": 1.0}, "the part of GradientClipping `encodr` selects no trained parameter of Parts: pass a prefix"),
        ({"*": 1.0, "head": 0.5}, "the part of GradientClipping `head` selects no trained parameter"),
        ({"head": UnitwiseAdaptive(exclude=["encoder"])}, "`exclude` of UnitwiseAdaptive: `encoder` selects no"),
    ],
)
def test_parts_that_select_nothing(trainer, policies, message):
    with pytest.raises(MisconfigurationError, match=message.replace("*", r"\*")):
        fit(trainer, policies)


@pytest.mark.parametrize("limit", [0, -1.0, float("nan")])
def test_limits_that_make_no_sense(limit):
    with pytest.raises(MisconfigurationError, match="must be a finite number above 0"):
        GradientClipping({"head": limit})


def test_no_part_at_all():
    with pytest.raises(MisconfigurationError, match="was given no part"):
        GradientClipping({})
