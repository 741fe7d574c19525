"""LoRA and DoRA in every kind of layer, against peft: outputs, gradients, merging."""

import copy
import warnings

import lightning as L
import pytest
import torch
from torch import nn

from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional.dropout_masks import draw_mask
from lightning_tricks.layers import adapted_layers
from lightning_tricks.mixins import DoRA, LoRA, LoRAMixin
from tests.mixins.peft_oracle import peft_of, share_low_rank, worst_gradient


class Bare(LoRAMixin, L.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net


class Convolutions(nn.Module):
    """A small convnet for 1 x 8 x 8 images, and a one-dimensional one on its output."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, stride=2, padding=1)
        self.second = nn.Conv2d(6, 5, 3, padding=1, bias=False)
        self.third = nn.Conv1d(5, 4, 3)
        self.out = nn.Linear(4 * 14, 3)

    def forward(self, x):
        x = torch.relu_(self.second(torch.relu(self.first(x))))
        return self.out(torch.tanh(self.third(x.flatten(2))).flatten(1))


class Recurrent(nn.Module):
    """Tokens through an LSTM with a projection, frozen itself, between adapted layers."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 6, padding_idx=0)
        self.lstm = nn.LSTM(6, 8, proj_size=5, batch_first=True)
        self.project = nn.Linear(5, 7)

    def forward(self, x):
        return self.project(self.lstm(self.table(x))[0])


def images():
    return torch.randn(3, 1, 8, 8)


def tokens():
    return torch.randint(0, 11, (2, 9))


def gpt2(layers=1, width=16):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=layers, n_embd=width, n_head=2, vocab_size=50, n_positions=20)
    return transformers.GPT2Model(config).eval()


CASES = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 4)), ("0", "2"), None),
    "convolutions": (Convolutions, ("first", "second", "third", "out"), images),
    "recurrent": (Recurrent, ("table", "project"), tokens),
}


def compared(build, policy, targets, inputs, **options):
    """Outputs and gradients in float64, ours and peft's."""
    torch.manual_seed(0)
    base = build()
    model = Bare(copy.deepcopy(base))
    model.adapt(model.net, policy)
    theirs = peft_of(base, target_modules=list(targets), r=2, lora_alpha=3, **options)
    x = torch.randn(7, 5) if inputs is None else inputs()
    torch.testing.assert_close(model.net(x), base(x) if options else build_again(build)(x))
    pairs = share_low_rank(model.net, theirs)
    model.double()
    theirs.double()
    x = x.double() if x.is_floating_point() else x
    out, expected = model.net(x), theirs(x)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert worst_gradient(pairs) < 1e-6
    model.merge_adapters()
    torch.testing.assert_close(model.net(x), expected, rtol=1e-6, atol=1e-6)
    model.unmerge_adapters()
    assert torch.equal(model.net(x), out)


def build_again(build):
    torch.manual_seed(0)
    return build()


@pytest.mark.parametrize("options", [{"dilation": 2}, {"padding": 1, "padding_mode": "circular"}, {"stride": 3}])
def test_what_a_convolution_does_its_adapter_does(options):
    """Of the merged weight, written out: peft passes over dilation and padding modes."""
    model = Bare(nn.Sequential(nn.Conv2d(3, 4, 3, **options)))
    model.adapt(model.net, LoRA(rank=2, alpha=3, targets=("0",)))
    layer, x = model.net[0], torch.randn(2, 3, 9, 9)
    nn.init.normal_(layer.lora_B)
    twin = nn.Conv2d(3, 4, 3, **options)
    with torch.no_grad():
        twin.weight.copy_(layer.weight + 1.5 * (layer.lora_B.t() @ layer.lora_A).view(layer.weight.shape))
        twin.bias.copy_(layer.bias)
    torch.testing.assert_close(layer(x), twin(x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:LSTM with projections")  # torch on its own choice of kernel
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("rslora", [False, True])
def test_every_kind_of_layer_is_as_in_peft(kind, rslora):
    build, targets, inputs = CASES[kind]
    policy = LoRA(rank=2, alpha=3, targets=targets, rslora=rslora)
    compared(build, policy, targets, inputs, use_rslora=rslora)


def test_dora_is_as_in_peft():
    build, targets, inputs = CASES["linear"]
    compared(build, DoRA(rank=2, alpha=3, targets=targets), targets, inputs, use_dora=True)


@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_gpt2s_layers_are_as_in_peft(method):
    ids = torch.randint(0, 50, (2, 6))
    base = gpt2()
    model = Bare(copy.deepcopy(base))
    model.net.config.use_cache = False
    model.adapt(model.net, method(rank=2, alpha=3, targets=("c_attn", "c_proj", "c_fc")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it corrects fan_in_fan_out by itself
        theirs = peft_of(base, target_modules=["c_attn", "c_proj", "c_fc"], r=2, lora_alpha=3, use_dora=method is DoRA)
    pairs = share_low_rank(model.net, theirs)
    model.double().eval()
    theirs.double().eval()
    out, expected = model.net(input_ids=ids)[0], theirs(input_ids=ids)[0]
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert worst_gradient(pairs) < 1e-5
    model.merge_adapters()
    torch.testing.assert_close(model.net(input_ids=ids)[0], expected, rtol=1e-6, atol=1e-6)


def test_dora_learns_with_dropout_and_drops_nothing_in_evaluation():
    model = Bare(nn.Sequential(nn.Linear(64, 8)))
    model.adapt(model.net, DoRA(rank=2, alpha=3, targets=("0",), dropout=0.5))
    layer, x = model.net[0], torch.randn(50, 64)
    nn.init.normal_(layer.lora_B, std=0.1)
    torch.manual_seed(1)
    out = layer(x)
    torch.manual_seed(1)
    mask, scale = draw_mask(x, 0.5)
    dropped = x * mask * scale
    full = layer.weight + 1.5 * layer.lora_B.t() @ layer.lora_A
    change = layer.lora_magnitude[:, None] * full / full.norm(dim=1, keepdim=True) - layer.weight
    torch.testing.assert_close(out, layer.plain(x) + dropped @ change.t(), rtol=1e-4, atol=1e-4)
    model.eval()
    torch.testing.assert_close(layer(x), layer.plain(x) + x @ change.t(), rtol=1e-4, atol=1e-4)


def test_parts_of_a_fused_projection():
    model = Bare(nn.ModuleDict({"qkv": nn.Linear(3, 9)}))
    base = copy.deepcopy(model.net["qkv"])
    model.adapt(model.net, LoRA(rank=2, alpha=4, targets=("qkv:q,v",)))
    layer, x = model.net["qkv"], torch.randn(5, 3)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters() if p.requires_grad} == {
        "lora_A": (4, 3),
        "lora_B": (2, 6),
    }
    nn.init.normal_(layer.lora_B)
    expected = base(x)
    expected[:, :3] += 2 * x @ layer.lora_A[:2].t() @ layer.lora_B[:, :3]
    expected[:, 6:] += 2 * x @ layer.lora_A[2:].t() @ layer.lora_B[:, 3:]
    torch.testing.assert_close(layer(x), expected)
    model.merge_adapters()
    torch.testing.assert_close(layer(x), expected)
    assert torch.equal(layer.weight[3:6], base.weight[3:6])


def test_gpt2_medium_has_the_parameters_of_true_q_and_v():
    with torch.device("meta"):
        blocks = nn.ModuleList(nn.ModuleDict({"c_attn": nn.Linear(1024, 3072)}) for _ in range(24))
    plan = LoRA(rank=4, targets=("c_attn:q,v",)).plan(blocks, "default")
    assert len(plan) == 24
    model = Bare(nn.ModuleDict({"c_attn": nn.Linear(1024, 3072)}))
    model.adapt(model.net, LoRA(rank=4, targets=("c_attn:q,v",)))
    assert 24 * sum(p.numel() for p in model.parameters() if p.requires_grad) == 393_216


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("qkv:q,w", "'w' is no part of `qkv`: write q, k or v"),
        ("qkv:0-4,3-9", "overlap, or leave its 9 outputs"),
        ("qkv:0-10", "overlap, or leave"),
        ("other:q", "`other` has 8 outputs and 6 inputs, so that q, k and v are not told to be three"),
    ],
)
def test_parts_that_cannot_be_are_refused(targets, message):
    model = Bare(nn.ModuleDict({"qkv": nn.Linear(3, 9), "other": nn.Linear(6, 8)}))
    with pytest.raises(MisconfigurationError, match=message):
        model.adapt(model.net, LoRA(rank=2, targets=(targets,)))


def test_ranks_by_pattern():
    model = Bare(nn.ModuleDict({"query": nn.Linear(8, 8), "value": nn.Linear(8, 8), "other": nn.Linear(8, 8)}))
    model.adapt(model.net, LoRA(rank={"query": 4, "*": 2}, alpha=4, targets=("query", "value")))
    found = {name: (layer.own("lora_A", "default").shape[0]) for name, layer in adapted_layers(model.net)}
    assert found == {"query": 4, "value": 2}
    for rank, message in (
        ({"query": 4}, "says nothing of `value`"),
        ({"other": 4, "*": 2}, "the rank's pattern 'other' fits none of the targets"),
        ({}, "at least one pattern"),
        ({"*": 0}, "got 0"),
        (9, "`rank` 9 is above the smaller side of `query`, which is 8 x 8"),
    ):
        with pytest.raises(MisconfigurationError, match=message):
            Bare(nn.ModuleDict({"query": nn.Linear(8, 8), "value": nn.Linear(8, 8)})).adapt_all(rank)


def _adapt_all(self, rank):
    self.adapt(self.net, LoRA(rank=rank, targets=("query", "value")))


Bare.adapt_all = _adapt_all


def test_pissa_starts_at_the_principal_part_as_in_peft():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(7, 5))
    model = Bare(copy.deepcopy(base))
    model.adapt(model.net, LoRA(rank=2, alpha=3, targets=("0",), init="pissa"))
    theirs = peft_of(copy.deepcopy(base), target_modules=["0"], r=2, lora_alpha=3, init_lora_weights="pissa")
    layer, twin, x = model.net[0], theirs[0], torch.randn(4, 7)
    product = layer.lora_B.t() @ layer.lora_A
    torch.testing.assert_close(product, twin.lora_B["default"].weight @ twin.lora_A["default"].weight)
    assert torch.equal(layer.weight, base[0].weight), "the base stays what it is"
    torch.testing.assert_close(layer(x), base(x))
    nn.init.normal_(layer.lora_B)
    with torch.no_grad():
        twin.lora_B["default"].weight.copy_(layer.lora_B.t())
        twin.lora_A["default"].weight.copy_(layer.lora_A)
    torch.testing.assert_close(layer(x), theirs(x), rtol=1e-4, atol=1e-4)
    layer(x).square().sum().backward()
    theirs(x).square().sum().backward()
    torch.testing.assert_close(layer.lora_A.grad, twin.lora_A["default"].weight.grad, rtol=1e-3, atol=1e-3)


def test_gaussian_starts_as_in_peft():
    model = Bare(nn.Sequential(nn.Linear(400, 400)))
    model.adapt(model.net, LoRA(rank=4, targets=("0",), init="gaussian"))
    assert float(model.net[0].lora_A.detach().std()) == pytest.approx(1 / 4, rel=0.05)
    assert not model.net[0].lora_B.any()


@pytest.mark.parametrize(
    ("layer", "policy", "message"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), LoRA(rank=1, targets=("0",)), "in 2 groups"),
        (nn.Embedding(5, 4, max_norm=1.0), LoRA(rank=1, targets=("0",)), "`max_norm` or `sparse`"),
        (nn.Embedding(5, 4), LoRA(rank=1, targets=("0",), init="pissa"), "`init='pissa'` is for linear layers"),
        (nn.Conv1d(4, 4, 3), DoRA(rank=1, targets=("0",)), "DoRA is for linear layers"),
        (nn.Linear(4, 4), LoRA(rank=5, targets=("0",)), "`rank` 5 is above"),
    ],
)
def test_layers_that_cannot_be_are_refused_and_stay(layer, policy, message):
    kind = type(layer)
    model = Bare(nn.Sequential(layer))
    with pytest.raises(MisconfigurationError, match=message):
        model.adapt(model.net, policy)
    assert type(layer) is kind
    assert all(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("options", [{"plus": 0.5}, {"plus": float("nan")}, {"init": "zeros"}])
def test_options_are_refused(options):
    with pytest.raises(MisconfigurationError, match=next(iter(options))):
        LoRA(**options)


def test_all_linear_and_attention_are_resolved():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=16, vocab_size=20
    )
    base = transformers.BertForMaskedLM(config)
    attention = [name.rpartition("attention.")[2] for name in LoRA(rank=1, targets="attention").plan(base, "default")]
    assert attention == ["self.query", "self.key", "self.value", "output.dense"]
    everything = list(LoRA(rank=1, targets="all-linear").plan(base, "default"))
    assert len(everything) == 7
    assert "cls.predictions.decoder" not in everything
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert list(LoRA(rank=1, targets="all-linear").plan(layer, "default")) == ["linear1", "linear2"]
    with pytest.raises(MisconfigurationError, match="'attention' selects no layer of Sequential"):
        LoRA(rank=1, targets="attention").plan(nn.Sequential(nn.Linear(2, 2)), "default")


def test_a_matrix_of_a_million_needs_four_thousand():
    model = Bare(nn.Sequential(nn.Linear(1000, 1000, bias=False)))
    model.adapt(model.net, LoRA(rank=2, targets=("0",)))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4_000
    square = Bare(nn.Sequential(nn.Linear(512, 512, bias=False)))
    square.adapt(square.net, LoRA(rank=8, targets=("0",)))
    assert sum(p.numel() for p in square.parameters() if p.requires_grad) / 512**2 == pytest.approx(0.031, abs=5e-4)
