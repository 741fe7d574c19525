"""AdapterMixin: several adapters by name, switched, weighted, disabled, merged; and what it refuses."""

import copy

import lightning as L
import pytest
import torch
from torch import nn

from lightning_tricks.errors import CheckpointError, MisconfigurationError
from lightning_tricks.layers import adapted_layers
from lightning_tricks.mixins import AdapterMixin, DoRA, LoRA
from tests.mixins.models import QUIET, Classifier, Encoder, trainer

pytestmark = QUIET


SECOND = LoRA(rank=3, targets=("query", "pooler"))


class Two(AdapterMixin, L.LightningModule):
    """Two adapters that overlap in one layer, away from their start."""

    def __init__(self, second=SECOND):
        super().__init__()
        self.encoder = Encoder()
        self.adapt(self.encoder, LoRA(rank=2, targets=("query", "value")), name="one")
        if second is not None:
            self.adapt(self.encoder, second, name="two")
        for _, layer in adapted_layers(self):
            for name in layer.adapters:
                for parameter in layer.adapter_parameters(name).values():
                    nn.init.normal_(parameter, std=0.3)


def update(layer, name):
    """The change of the weight, by the paper."""
    options = layer.adapters[name]
    return options.alpha / options.rank * layer.own("lora_B", name).t() @ layer.own("lora_A", name)


def written_out(model, weights):
    """A plain encoder with the weighted updates in its weights."""
    plain = Encoder()
    for path, layer in adapted_layers(model.encoder):
        with torch.no_grad():
            for name, weight in weights.items():
                if name in layer.adapters:
                    plain.get_submodule(path).weight += weight * update(layer, name)
    return plain


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("weights", [{"one": 1.0}, {"two": 1.0}, {"one": 0.25, "two": -2.0}])
def test_names_switch_and_weights_combine(weights):
    model = Two()
    model.use_adapters(weights)
    assert model.active_adapters == weights
    torch.testing.assert_close(model.encoder(X), written_out(model, weights)(X))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"{path}.{kind}_{name}"
        for path, layer in adapted_layers(model)
        for name in weights
        if name in layer.adapters
        for kind in ("lora_A", "lora_B")
    }


def test_the_one_adapted_last_is_active():
    assert Two().active_adapters == {"two": 1.0}
    assert Two().adapter_names == ("one", "two")


def test_disabled_is_the_base_and_only_inside_the_block():
    model = Two()
    expected = model.encoder(X)
    with model.adapters_disabled():
        assert torch.equal(model.encoder(X), Encoder()(X))
        assert model.active_adapters == {}
    assert torch.equal(model.encoder(X), expected)
    with pytest.raises(ZeroDivisionError), model.adapters_disabled():
        raise ZeroDivisionError
    assert model.active_adapters == {"two": 1.0}


@pytest.mark.parametrize("weights", [{"one": 1.0}, {"one": 0.5, "two": 0.5}])
def test_merging_changes_nothing_and_unmerging_restores_the_bytes(weights):
    model = Two()
    model.use_adapters(weights)
    expected, before = model.encoder(X), {name: p.clone() for name, p in model.named_parameters()}
    model.merge_adapters()
    assert model.adapters_merged
    torch.testing.assert_close(model.encoder(X), expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(model.encoder.layer[0].query.weight, before["encoder.layer.0.query.weight"])
    model.unmerge_adapters()
    assert torch.equal(model.encoder(X), expected)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_dora_is_alone():
    model = Two(DoRA(rank=2, targets=("query",)))
    model.use_adapters("one")
    for weights in ({"one": 1.0, "two": 1.0}, {"two": 0.5}):
        with pytest.raises(MisconfigurationError, match="it cannot be weighted or combined"):
            model.use_adapters(weights)
    assert model.active_adapters == {"one": 1.0}, "a refusal changes nothing"


def test_what_is_refused():
    model = Two()
    with pytest.raises(MisconfigurationError, match="there is no adapter 'three': there are one, two"):
        model.use_adapters("three")
    with pytest.raises(MisconfigurationError, match=r"there is no adapter \{\}"):
        model.use_adapters({})
    with pytest.raises(MisconfigurationError, match="no adapters are merged"):
        model.unmerge_adapters()
    with pytest.raises(MisconfigurationError, match="has been adapted already under the name 'one'"):
        model.adapt(model.encoder, LoRA(rank=1), name="one")
    with pytest.raises(MisconfigurationError, match="letters, digits and underscores, got 'a b'"):
        model.adapt(model.encoder, LoRA(rank=1), name="a b")
    with pytest.raises(MisconfigurationError, match="must be a method, such as LoRA"):
        model.adapt(model.encoder)


def test_what_is_refused_while_merged():
    model = Two()
    model.merge_adapters()
    for call in (
        model.merge_adapters,
        lambda: model.use_adapters("one"),
        lambda: model.adapt(model.encoder, LoRA(rank=1), name="three"),
        lambda: model.adapters_disabled().__enter__(),
        lambda: model.setup("fit"),
    ):
        with pytest.raises(MisconfigurationError, match=r"adapters are merged: call `unmerge_adapters\(\)` before"):
            call()
    with pytest.raises(MisconfigurationError, match="saving now would apply them twice"):
        model.state_dict()
    with pytest.raises(MisconfigurationError, match="loading now would apply them twice"):
        model.load_state_dict({})


def test_tied_weights_are_not_merged():
    class Tied(AdapterMixin, L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.ModuleDict({"table": nn.Embedding(7, 4), "out": nn.Linear(4, 7, bias=False)})
            self.net["out"].weight = self.net["table"].weight
            self.adapt(self.net, LoRA(rank=2, targets=("table",)))

    model = Tied()
    with pytest.raises(MisconfigurationError, match=r"`net\.table` is that of `net\.out\.weight` too"):
        model.merge_adapters()
    assert not model.adapters_merged


def test_a_frozen_head_is_told_of():
    class Headed(AdapterMixin, L.LightningModule):
        def __init__(self, trainable=()):
            super().__init__()
            self.net = nn.ModuleDict({"body": nn.Linear(4, 4), "classifier": nn.Linear(4, 2)})
            self.adapt(self.net, LoRA(rank=2, targets=("body",)), trainable=trainable)

    with pytest.warns(UserWarning, match="`classifier` is inside the adapted module and frozen"):
        Headed()
    Headed(trainable=("classifier",))


def test_checkpoints_hold_every_adapter_and_resume(tmp_path):
    class Named(Classifier):
        def __init__(self, base_seed=0, rank=2):
            super().__init__(base_seed, rank)
            self.adapt(self.encoder, LoRA(rank=3, targets=("pooler",)), name="two")

    model = Named()
    ours = trainer()
    ours.fit(model)
    ours.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert {"encoder.layer.0.query.lora_A", "encoder.pooler.lora_B_two"} <= set(state)
    assert "encoder.pooler.weight" not in state
    assert state["encoder.pooler.lora_B_two"].abs().max() > 0
    assert not state["encoder.layer.0.query.lora_B"].any(), "at rest, and so not trained"
    loaded = Named.load_from_checkpoint(tmp_path / "a.ckpt", strict=True)
    for (name, one), (_, other) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    with pytest.raises(CheckpointError, match=r"was adapted with rank=2 in this checkpoint, here with rank=1"):
        Named.load_from_checkpoint(tmp_path / "a.ckpt", rank=1)


def test_checkpoints_of_before_there_were_names_load(tmp_path):
    ours = trainer()
    ours.fit(model := Classifier())
    ours.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    del checkpoint["lightning_tricks"]["adapters"]
    checkpoint["lightning_tricks"]["lora"] = {"encoder": {"rank": 2, "alpha": 4.0}}
    torch.save(checkpoint, tmp_path / "old.ckpt")
    loaded = Classifier.load_from_checkpoint(tmp_path / "old.ckpt")
    assert torch.equal(loaded.head.weight, model.head.weight)
    with pytest.raises(CheckpointError, match="alpha=4 in this checkpoint, here with alpha=8"):
        Classifier.load_from_checkpoint(tmp_path / "old.ckpt", alpha=8.0)


def test_switching_during_a_fit_is_refused():
    class Switching(Classifier):
        def on_train_start(self):
            self.use_adapters("default")

    with pytest.raises(MisconfigurationError, match="a fit is running"):
        trainer().fit(Switching())


@pytest.mark.parametrize("merged", [False, True])
def test_copies_are_apart(merged):
    model = Two()
    if merged:
        model.merge_adapters()
    other = copy.deepcopy(model)
    if merged:
        other.unmerge_adapters()
    other.use_adapters("one")
    assert model.active_adapters == {"two": 1.0}
    assert model.adapters_merged == merged


def test_groups_have_the_learning_rates_of_lora_plus_and_keep_the_weight_decay():
    class Plus(Classifier):
        def __init__(self, plus):
            L.LightningModule.__init__(self)
            self.encoder, self.head = Encoder(), nn.Linear(6, 4)
            self.adapt(self.encoder, LoRA(rank=2, plus=plus))

    model = Plus(16.0)
    slow, fast = model.parameter_groups(lr=1e-3, weight_decay=0.1)
    assert (slow["lr"], fast["lr"]) == (1e-3, 16e-3)
    assert slow["weight_decay"] == fast["weight_decay"] == 0.1
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].rpartition(".")[2] for p in fast["params"]} == {"lora_B"}
    assert len(slow["params"]) + len(fast["params"]) == sum(p.requires_grad for p in model.parameters())
    (only,) = Plus(None).parameter_groups(lr=1e-3)
    assert only["lr"] == 1e-3
    model.requires_grad_(False)
    assert model.parameter_groups(lr=1e-3) == []
