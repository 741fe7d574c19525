"""Bottleneck adapters and their fusion, against the papers' formulas."""

import copy

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.layers import Bottlenecks, adapted_layers
from lightning_tricks.mixins import AdapterFusion, AdapterMixin, Bottleneck, LoRA
from tests.mixins.models import QUIET, Classifier, Encoder, trainer
from tests.mixins.test_lora_layers import gpt2

pytestmark = QUIET


class Bare(AdapterMixin, L.LightningModule):
    def __init__(self, net=None, *policies):
        super().__init__()
        self.net = Encoder() if net is None else net
        for number, policy in enumerate(policies):
            self.adapt(self.net, policy, name=f"n{number}")


def moved(model):
    for _, layer in adapted_layers(model):
        for name in layer.adapters:
            for parameter in layer.adapter_parameters(name).values():
                nn.init.normal_(parameter, std=0.3)
    return model


def written_out(place, name, read, activation=F.relu):
    inner = activation(F.linear(read, place.own("down", name), place.own("down_bias", name)))
    return F.linear(inner, place.own("up", name), place.own("up_bias", name))


def plain(layer, x):
    return F.linear(x, layer.weight, layer.bias)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(("activation", "function"), [("relu", F.relu), ("gelu", F.gelu), ("tanh", torch.tanh)])
def test_adds_what_the_papers_say(parallel, activation, function):
    base, x = nn.ModuleDict({"up": nn.Linear(4, 6)}), torch.randn(5, 4)
    policy = Bottleneck(width=3, targets=("up",), activation=activation, parallel=parallel, scale=2.0)
    model = Bare(base, policy)
    layer = model.net["up"]
    assert torch.equal(layer(x), plain(layer, x)), "a new one adds nothing"
    moved(model)
    h = plain(layer, x)
    expected = h + 2 * written_out(layer.bottlenecks, "n0", x if parallel else h, function)
    torch.testing.assert_close(layer(x), expected)
    with model.adapters_disabled():
        assert torch.equal(layer(x), h)


def test_counts_as_the_paper_does():
    d, width = 6, 4
    model = Bare(None, Bottleneck(width=width, targets=("query", "value")))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 4 * (2 * d * width + width + d)


def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        num_hidden_layers=11, hidden_size=8, num_attention_heads=2, intermediate_size=16, vocab_size=20
    )
    return transformers.BertModel(config)


@pytest.mark.parametrize(
    ("build", "houlsby", "pfeiffer"),
    [
        (bert, {"encoder.layer.10.attention.output.dense", "encoder.layer.10.output.dense"}, 11),
        (lambda: gpt2(layers=2), {"h.1.attn.c_proj", "h.1.mlp.c_proj"}, 2),
        (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), {"self_attn", "linear2"}, 1),
    ],
)
def test_placements_are_resolved(build, houlsby, pfeiffer):
    found = Bottleneck(width=2).plan(build(), "default")
    assert houlsby <= set(found)
    assert len(found) == 2 * pfeiffer
    assert len(Bottleneck(width=2, targets="pfeiffer").plan(build(), "default")) == pfeiffer


def test_attention_that_gives_several_things():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 8)
    model = Bare(copy.deepcopy(layer), Bottleneck(width=2))
    torch.testing.assert_close(model.net(x), layer(x))
    moved(model)
    trained = model.net(x)
    assert (trained - layer(x)).abs().max() > 1e-2
    with torch.no_grad():  # torch's fused kernel would go past them
        torch.testing.assert_close(model.eval().net(x), trained)


def test_weights_add_up_and_names_switch():
    model, x = moved(Bare(None, *[Bottleneck(width=2, targets=("pooler",))] * 2)), torch.randn(3, 6)
    layer = model.net.pooler
    h = plain(layer, x)
    model.use_adapters({"n0": 0.5, "n1": -1.0})
    expected = h + 0.5 * written_out(layer.bottlenecks, "n0", h) - written_out(layer.bottlenecks, "n1", h)
    torch.testing.assert_close(layer(x), expected)


def test_fusion_is_the_papers_attention():
    policies = [*[Bottleneck(width=2, targets=("pooler",))] * 2, AdapterFusion(adapters=("n0", "n1"))]
    model, x = moved(Bare(None, *policies)), torch.randn(3, 6)
    place = model.net.pooler.bottlenecks
    h = plain(model.net.pooler, x)
    z = torch.stack([written_out(place, name, h) for name in ("n0", "n1")], 1)
    scores = torch.einsum("bi,bni->bn", h @ place.query_n2.t(), z @ place.key_n2.t())
    expected = h + torch.einsum("bn,bni->bi", scores.softmax(1), z @ place.value_n2.t())
    torch.testing.assert_close(model.net.pooler(x), expected)
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"query_n2", "key_n2", "value_n2"}, "the adapters themselves are frozen"
    with pytest.raises(MisconfigurationError, match="a fusion weighs its adapters by itself"):
        model.use_adapters({"n2": 1.0, "n0": 1.0})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bottleneck(width=0), "`width` must be a whole number"),
        (lambda: Bottleneck(activation="sine"), "`activation` must be"),
        (lambda: Bottleneck(scale=0), "`scale` must be positive"),
        (lambda: AdapterFusion(adapters=("one",)), "two or more names"),
        (lambda: Bare(None, Bottleneck()), "end is not known: name the modules"),
        (lambda: Bare(None, Bottleneck(targets=("keys",))), "'keys' selects no module of Encoder"),
        (lambda: Bare(None, Bottleneck(targets=("norm",))), "has no linear layer"),
        (lambda: Bare(None, AdapterFusion(adapters=("a", "b"))), "there are none: adapt it with `Bottleneck`"),
        (lambda: Bare(None, Bottleneck(targets=("pooler",))).merge_adapters(), "Bottleneck cannot be merged: it is"),
        (lambda: Bare(None, Bottleneck(targets=("pooler",))).save_adapter("x", name="n0"), "peft has no Bottleneck"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(MisconfigurationError, match=message):
        make()


def test_checkpoints_resume_and_copies_are_apart(tmp_path):
    class Fitted(Classifier):
        def __init__(self, width=2):
            L.LightningModule.__init__(self)
            self.save_hyperparameters()
            self.encoder, self.head = Encoder(), nn.Linear(6, 4)
            self.adapt(self.encoder, Bottleneck(width=width, targets=("query", "pooler")))

    trainer().fit(model := Fitted())
    model.trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Fitted.load_from_checkpoint(tmp_path / "a.ckpt")
    x = torch.randn(3, 6)
    assert torch.equal(loaded(x), model(x))
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert "encoder.pooler.bottlenecks.up" in state
    assert "encoder.pooler.weight" not in state
    other = copy.deepcopy(model)
    nn.init.normal_(other.encoder.pooler.bottlenecks.up)
    assert not torch.equal(other(x), model(x))
    assert torch.equal(loaded(x), model(x))


def test_beside_low_rank_adapters():
    model = Bare(None, LoRA(rank=2, targets=("query",)), Bottleneck(width=2, targets=("query",)))
    assert isinstance(model.net.layer[0].query.bottlenecks, Bottlenecks)
    model.use_adapters({"n0": 1.0, "n1": 1.0})
    assert model.active_adapters == {"n0": 1.0, "n1": 1.0}
