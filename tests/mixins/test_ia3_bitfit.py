"""IA3 against peft and the paper; BitFit trains biases and nothing else."""

import copy
import warnings

import lightning as L
import pytest
import torch
from torch import nn

from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.layers import adapted_layers
from lightning_tricks.mixins import IA3, AdapterMixin, BitFit, LoRA
from tests.mixins.models import QUIET, Encoder, trainer
from tests.mixins.test_lora_layers import gpt2

pytestmark = QUIET


class Bare(AdapterMixin, L.LightningModule):
    def __init__(self, net=None, policy=None):
        super().__init__()
        self.net = Encoder() if net is None else net
        if policy is not None:
            self.adapt(self.net, policy)


def peft_ia3(module, targets, feedforward):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import IA3Config, inject_adapter_in_model

        config = IA3Config(target_modules=[*targets, *feedforward], feedforward_modules=list(feedforward))
        return inject_adapter_in_model(config, module)


@pytest.mark.parametrize("kind", ["linear", "gpt2"])
def test_ia3_is_as_in_peft(kind):
    targets, feedforward = (("query",), ("value",)) if kind == "linear" else (("c_attn",), ("mlp.c_proj",))
    base = Encoder() if kind == "linear" else gpt2()
    model = Bare(copy.deepcopy(base), IA3(targets=targets, feedforward=feedforward)).eval()
    inputs = (torch.randn(5, 6),) if kind == "linear" else (torch.randint(0, 50, (2, 6)),)

    def run(net):
        out = net(*inputs)
        return out if kind == "linear" else out[0]

    torch.testing.assert_close(run(model.net), run(base))
    theirs = peft_ia3(base, targets, feedforward).eval()
    pairs = []
    for path, layer in adapted_layers(model.net):
        with torch.no_grad():
            layer.ia3_l.uniform_(0.5, 1.5)
            twin = theirs.get_submodule(path).ia3_l["default"]
            twin.copy_(layer.ia3_l.view(twin.shape))
        pairs.append((layer.ia3_l, twin))
    out, expected = run(model.net), run(theirs)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for one in (out, expected):
        one.square().sum().backward()
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad.flatten(), rtol=1e-3, atol=1e-3)
    model.merge_adapters()
    torch.testing.assert_close(run(model.net), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapters()
    assert torch.equal(run(model.net), out)


def test_ia3_counts_as_the_paper_does():
    """`d` for each of keys and values, and the inner width for the feed-forward part."""
    block = nn.ModuleDict({"key": nn.Linear(8, 8), "value": nn.Linear(8, 8), "down": nn.Linear(32, 8)})
    model = Bare(block, IA3(targets=("key", "value"), feedforward=("down",)))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 8 + 8 + 32


def test_ia3_adapters_add_their_changes():
    model = Bare(policy=IA3(targets=("query",)))
    model.adapt(model.net, IA3(targets=("query",)), name="two")
    layer, x = model.net.layer[0].query, torch.randn(3, 6)
    nn.init.uniform_(layer.ia3_l)
    nn.init.uniform_(layer.ia3_l_two)
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    model.use_adapters({"default": 0.5, "two": 2.0})
    torch.testing.assert_close(layer(x), plain * (1 + 0.5 * (layer.ia3_l - 1) + 2 * (layer.ia3_l_two - 1)))
    with model.adapters_disabled():
        assert torch.equal(layer(x), plain)


@pytest.mark.parametrize(
    ("net", "policy", "message"),
    [
        (None, IA3(targets=("query",), feedforward=("query",)), "`layer.0.query` is in `targets` and in `feedforward`"),
        (None, IA3(targets=("keys",)), "'keys' selects no layer"),
        (nn.ModuleDict({"key": nn.Embedding(3, 4)}), IA3(targets=("key",)), "IA3 rescales whole linear layers"),
    ],
)
def test_ia3_refuses(net, policy, message):
    with pytest.raises(MisconfigurationError, match=message):
        Bare(net, policy)


def test_one_layer_holds_adapters_of_one_kind():
    model = Bare(policy=IA3(targets=("query",)))
    with pytest.raises(MisconfigurationError, match=r"`layer.0.query` is a ScaledLinear already"):
        model.adapt(model.net, LoRA(rank=2, targets=("query",)), name="two")
    model.adapt(model.net, LoRA(rank=2, targets=("value",)), name="two")


def test_autocast_keeps_the_precision():
    model = Bare(policy=IA3(targets=("query",), feedforward=("value",)))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.net.layer[0].query(torch.randn(2, 6)).dtype == torch.bfloat16


class Fitted(Bare):
    def training_step(self, batch, _):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 6)), batch_size=4)


@pytest.mark.parametrize(
    ("targets", "trained"),
    [
        (("*",), {"query", "value", "norm", "pooler"}),
        (("query", "layer.1.norm"), {"query", "norm"}),
    ],
)
def test_bitfit_trains_biases_alone(targets, trained):
    model = Fitted(policy=BitFit(targets=targets))
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer(max_steps=2).fit(model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name.split(".")[-2] for name in moved} == trained
    assert all(name.endswith(".bias") for name in moved)
    assert {name for name in model.state_dict() if "gain" not in name} == moved


def test_bitfit_is_alone_and_refuses_by_name():
    model = Bare(policy=BitFit())
    with pytest.raises(MisconfigurationError, match="BitFit cannot be merged: it trains the base's own biases"):
        model.merge_adapters()
    with pytest.raises(MisconfigurationError, match="BitFit cannot be switched off"):
        model.adapters_disabled().__enter__()
    with pytest.raises(MisconfigurationError, match="cannot hold BitFit and another adapter"):
        model.adapt(model.net, LoRA(rank=2), name="two")
    with pytest.raises(MisconfigurationError, match="selects no module of Encoder with a bias"):
        Bare(policy=BitFit(targets=("gain",)))
    with pytest.raises(MisconfigurationError, match="holds no bias"):
        Bare(nn.Linear(2, 2, bias=False), BitFit())
