"""LoRAMixin: what it adapts, freezes and refuses, and that it learns what peft learns."""

import copy
import warnings

import lightning as L
import pytest
import torch
from torch import nn

from lightning_tricks.data.packages import minilm_folder
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.layers import LoRALinear
from lightning_tricks.mixins import LoRA, LoRAMixin
from tests.mixins.models import QUIET, Classifier, Encoder, trainer

pytestmark = QUIET


class Bare(LoRAMixin, L.LightningModule):
    """Holds an encoder and adapts nothing by itself."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder


def names_of(module, *, trained):
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad == trained}


# -- the policy ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "`rank` must be a whole number of 1 or more, got 0"),
        ({"rank": -2}, "got -2"),
        ({"rank": 2.5}, "got 2.5"),
        ({"rank": True}, "got True"),
        ({"alpha": 0}, "`alpha` must be positive and finite, got 0"),
        ({"alpha": float("nan")}, "got nan"),
        ({"dropout": 1.0}, r"`dropout` must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"got -0.1"),
        ({"targets": ()}, "`targets` must name at least one layer"),
        ({"targets": ("query", "")}, "`targets` must name at least one layer"),
        ({"targets": "query"}, r"write targets=\('query',\)"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(MisconfigurationError, match=message):
        LoRA(**options)


def test_targets_may_be_a_list():
    assert LoRA(targets=["a", "b"]) == LoRA(targets=("a", "b"))


# -- what is adapted, and what is trained ------------------------------------------------------------------------


def test_freezes_all_but_adapters_and_what_is_outside():
    model = Classifier()
    adapters = {f"encoder.layer.{i}.{name}.lora_{ab}" for i in (0, 1) for name in ("query", "value") for ab in "AB"}
    assert names_of(model, trained=True) == adapters | {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        (("pooler",), {"pooler.weight", "pooler.bias"}),
        (("pooler.bias",), {"pooler.bias"}),
        (("norm",), {f"layer.{i}.norm.{name}" for i in (0, 1) for name in ("weight", "bias")}),
        (("layer.1.norm", "pooler.b*"), {"layer.1.norm.weight", "layer.1.norm.bias", "pooler.bias"}),
        (("layer.0.query",), {"layer.0.query.weight", "layer.0.query.bias"}),
    ],
)
def test_trainable_names_stay_trained(trainable, expected):
    encoder = Classifier(trainable=trainable).encoder
    assert {name for name in names_of(encoder, trained=True) if "lora" not in name} == expected


def test_a_trainable_name_that_selects_nothing_is_refused():
    with pytest.raises(MisconfigurationError, match=r"trainable 'head' selects no parameter of Encoder.*layer, pooler"):
        Classifier(trainable=("pooler", "head"))
    with pytest.raises(MisconfigurationError, match=r"write trainable=\('pooler',\)"):
        Classifier(trainable="pooler")


def test_a_refusal_leaves_the_module_as_it_was():
    model = Bare(Encoder())
    for options in ({"policy": LoRA(targets=("query", "keys"))}, {"policy": LoRA(), "trainable": ("head",)}):
        with pytest.raises(MisconfigurationError):
            model.adapt(model.encoder, **options)
    assert not names_of(model, trained=False)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())


def test_parameters_are_counted_by_the_formula():
    """`rank * (in + out)` a layer: GPT-2 Medium's q and v (24 layers of 1024), rank 4, get 393,216."""
    with torch.device("cpu"), torch.no_grad():
        blocks = nn.ModuleList(
            nn.ModuleDict({"query": nn.Linear(1024, 1024, bias=False), "value": nn.Linear(1024, 1024)})
            for _ in range(24)
        )
    model = Bare(blocks)
    model.adapt(blocks, LoRA(rank=4))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 24 * 2 * 4 * (1024 + 1024) == 393_216


def test_what_is_not_in_the_module_is_refused():
    model = Bare(Encoder())
    with pytest.raises(MisconfigurationError, match="the Encoder to adapt is not a module of Bare: assign it first"):
        model.adapt(Encoder(), LoRA())


def test_weights_without_values_are_refused():
    with torch.device("meta"):
        encoder = Encoder()
    model = Bare(encoder)
    with pytest.raises(MisconfigurationError, match=r"`layer.0.query` is on the meta device"):
        model.adapt(model.encoder, LoRA(rank=2))


def test_adapting_again_alike_changes_nothing_and_otherwise_is_refused():
    model = Bare(Encoder())
    model.adapt(model.encoder, LoRA(rank=2))
    before = dict(model.named_parameters())
    model.adapt(model.encoder, LoRA(rank=2))
    assert dict(model.named_parameters()) == before
    with pytest.raises(MisconfigurationError, match="`encoder` has been adapted already"):
        model.adapt(model.encoder, LoRA(rank=4))


def test_two_modules_and_the_whole():
    two = Bare(nn.ModuleDict({"a": Encoder(), "b": Encoder()}))
    two.adapt(two.encoder["a"], LoRA(rank=2, targets=("query",)))
    two.adapt(two.encoder["b"], LoRA(rank=4, targets=("pooler",)))
    assert [m.lora_rank for m in two.modules() if isinstance(m, LoRALinear)] == [2, 2, 4]
    whole = Bare(Encoder())
    whole.adapt(whole, LoRA(rank=2), trainable=("pooler",))
    assert "encoder.pooler.weight" in names_of(whole, trained=True)


def test_a_new_adapter_changes_nothing():
    model, x = Classifier(), torch.randn(4, 6)
    assert torch.equal(model.encoder(x), Encoder()(x))


def test_copies_are_apart():
    model = Classifier()
    other = copy.deepcopy(model)
    nn.init.normal_(other.encoder.layer[0].query.lora_B)
    other.encoder.pooler.requires_grad_(True)
    assert not model.encoder.layer[0].query.lora_B.any()
    assert other.state_dict().keys() - model.state_dict().keys() == {"encoder.pooler.weight", "encoder.pooler.bias"}


def test_training_moves_what_is_trained_and_nothing_else():
    model = Classifier(trainable=("pooler.bias",))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer().fit(model)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == names_of(model, trained=True)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_trains_in_bf16(precision):
    model = Classifier()
    trainer(precision=precision).fit(model)
    assert model.encoder.layer[0].query.lora_B.float().abs().max() > 0


# -- peft as the oracle ------------------------------------------------------------------------------------------


def peft_of(module, policy):
    """The same module under peft, and its adapters' matrices by the layer's name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft's own imports
        from peft import LoraConfig, inject_adapter_in_model
    config = LoraConfig(r=policy.rank, lora_alpha=policy.alpha, target_modules=list(policy.targets))
    return inject_adapter_in_model(config, module)


def copy_adapters(ours, theirs):
    """Give both the same adapters, away from their start."""
    for name, layer in ours.named_modules():
        if isinstance(layer, LoRALinear):
            nn.init.normal_(layer.lora_B, std=0.05)
            twin = theirs.get_submodule(name)
            with torch.no_grad():
                twin.lora_A["default"].weight.copy_(layer.lora_A)
                twin.lora_B["default"].weight.copy_(layer.lora_B.t())


def worst_difference(ours, theirs):
    """Of the adapters' gradients, each relative to its largest value."""
    worst = 0.0
    for name, layer in ours.named_modules():
        if isinstance(layer, LoRALinear):
            twin = theirs.get_submodule(name)
            for mine, other in (
                (layer.lora_A.grad, twin.lora_A["default"].weight.grad),
                (layer.lora_B.grad, twin.lora_B["default"].weight.grad.t()),
            ):
                worst = max(worst, float((mine - other).abs().max() / other.abs().max()))
    return worst


@pytest.mark.parametrize("targets", [("query", "value"), ("pooler",)])
def test_outputs_and_gradients_are_those_of_peft(targets):
    policy, x = LoRA(rank=2, alpha=3, targets=targets), torch.randn(8, 6)
    model, theirs = Bare(Encoder()), peft_of(Encoder(), policy)
    model.adapt(model.encoder, policy)
    copy_adapters(model.encoder, theirs)
    torch.testing.assert_close(model.encoder(x), theirs(x), rtol=1e-6, atol=1e-6)
    out, expected = model.double().encoder(x.double()), theirs.double()(x.double())
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert worst_difference(model.encoder, theirs) < 1e-12


@pytest.mark.slow
def test_a_real_encoder_learns_what_peft_learns():
    from transformers import AutoModel

    policy = LoRA(rank=8, alpha=16, targets=("query", "value"))
    base = AutoModel.from_pretrained(str(minilm_folder())).eval()
    model, theirs = Bare(copy.deepcopy(base)), peft_of(copy.deepcopy(base), policy)
    model.eval().adapt(model.encoder, policy)
    ids = torch.randint(1000, 20000, (4, 16))
    assert torch.equal(model.encoder(input_ids=ids)[0], base(input_ids=ids)[0])
    copy_adapters(model.encoder, theirs)
    torch.testing.assert_close(model.encoder(input_ids=ids)[0], theirs(input_ids=ids)[0], rtol=1e-5, atol=1e-5)
    theirs.double()
    model.double()  # rounding, six layers deep, would hide a difference
    losses = [encoder(input_ids=ids)[0].square().mean() for encoder in (model.encoder, theirs)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-10, atol=1e-10)
    assert worst_difference(model.encoder, theirs) < 1e-10
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 12 * 8 * (384 + 384)
