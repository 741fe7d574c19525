"""LoRA and DoRA beside a base in few bits: the formulas over the dequantised weights, bytes, files, and refusals."""

import copy
import gc
import pickle
import weakref

import lightning as L
import pytest
import torch
from torch import nn

from lightning_tricks.errors import CheckpointError, MisconfigurationError, UnsupportedError
from lightning_tricks.functional import fingerprint, pack_weight, packed_linear, quantize_int8, quantize_nf4
from lightning_tricks.functional.dropout_masks import draw_mask
from lightning_tricks.functional.packed_weight import by_bitsandbytes
from lightning_tricks.layers import PackedLinear
from lightning_tricks.mixins import IA3, BitFit, DoRA, LoRA, LoRAMixin, trainable_report
from lightning_tricks.mixins._merge_folder import merge_folder
from lightning_tricks.storage import WeightsFile, write_weights
from tests.mixins.models import QUIET, Classifier, Encoder, Holder, moved, trainer
from tests.mixins.test_adapter_files import peft_load

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.*float.*")]

KINDS = ["nf4", "int8", "bf16"]
METHODS = {
    "LoRA": LoRA(rank=2, alpha=3, targets=("query", "value")),
    "rsLoRA": LoRA(rank=2, alpha=3, targets=("query", "value"), rslora=True),
    "PiSSA": LoRA(rank=2, alpha=3, targets=("query", "value"), init="pissa"),
    "part": LoRA(rank=2, alpha=3, targets=("query", "value:2-4,4-6")),
    "DoRA": DoRA(rank=2, alpha=3, targets=("query", "value")),
}


def rounded(weight, kind):
    """What the weight is afterwards, by the quantisers, which have tests of their own."""
    if kind == "bf16":
        return weight.bfloat16().to(weight.dtype)
    if kind == "nf4":
        return quantize_nf4(weight).dequantize().to(weight.dtype)
    codes, scales = quantize_int8(weight)
    return (codes.float() * scales).to(weight.dtype)


def written_out(layer, weight, x, name="default"):
    """The layer by the papers' formulas, for torch to differentiate: over `weight`, (outputs, inputs)."""
    options, (down, up) = layer.adapters[name], layer.factors(name)
    full = weight + options.scale * up.t() @ down
    if options.decomposed:
        lengths = layer.own("lora_magnitude", name)
        full = full * (lengths / full.detach().norm(dim=1))[:, None]  # section 4.3: the norm is a constant
    return x @ full.t() + layer.bias


def linear(transposed, inputs=12, outputs=9):
    if not transposed:
        return nn.Linear(inputs, outputs)
    from transformers.pytorch_utils import Conv1D

    return Conv1D(outputs, inputs)


def one_layer(kind, policy_type, transposed=False, dtype=torch.float32, **options):
    net = nn.ModuleDict({"it": linear(transposed)}).to(dtype)
    before = (net["it"].weight.t() if transposed else net["it"].weight).detach().clone()
    moved(holder := Holder(net, policy_type(rank=3, alpha=5, targets=("it",), **options), base=kind))
    return holder.net["it"].to(dtype), rounded(before, kind)


# -- the formulas ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [4, 40])  # below and above the number of inputs, where ways part
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("policy", [LoRA, DoRA])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_outputs_and_gradients_are_those_over_the_dequantised_weights(
    kind, policy, transposed, tokens, dtype, tolerance
):
    layer, weight = one_layer(kind, policy, transposed, dtype)
    torch.testing.assert_close(layer.as_matrix(layer.weight), weight, rtol=0, atol=0)
    x, y = (torch.randn(2, tokens // 2, 12, dtype=dtype, requires_grad=True) for _ in range(2))
    y.data.copy_(x.data)
    direction = torch.randn(2, tokens // 2, 9, dtype=dtype)
    parameters = list(layer.adapter_parameters("default").values())
    out, expected = layer(x), written_out(layer, weight, y)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    found = torch.autograd.grad((out * direction).sum(), [x, *parameters])
    for one, other in zip(found, torch.autograd.grad((expected * direction).sum(), [y, *parameters]), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradcheck(kind):
    layer, _ = one_layer(kind, LoRA, dtype=torch.float64)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    inputs = (x, *(factor.detach().clone().requires_grad_() for factor in (layer.lora_A, layer.lora_B)))

    def apply(x, down, up):
        return torch.func.functional_call(layer, {"lora_A": down, "lora_B": up}, (x,))

    assert torch.autograd.gradcheck(apply, inputs)


@pytest.mark.parametrize("policy", [LoRA, DoRA])
def test_bf16_computes_in_bf16_and_gives_the_precision_of_its_inputs(policy):
    layer, weight = one_layer("bf16", policy)
    x = torch.randn(40, 12, requires_grad=True)
    out, expected = layer(x), written_out(layer, weight, x)
    assert (out.dtype, layer.lora_A.dtype) == (torch.float32, torch.float32)
    assert not torch.equal(out, expected), "this would be fp32"
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)
    parameters = list(layer.adapter_parameters("default").values())
    for one, other in zip(
        torch.autograd.grad(out.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        assert (one - other).abs().max() < 0.05 * other.abs().max()


def test_dropout_spares_the_base():
    layer, weight = one_layer("nf4", LoRA, dropout=0.5)
    with torch.no_grad():
        layer.lora_B.zero_()
    x = torch.randn(40, 12)
    torch.testing.assert_close(layer.train()(x), x @ weight.t() + layer.bias)
    moved(nn.ModuleList([layer]))
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), written_out(layer, weight, x), rtol=1e-5, atol=1e-5)


def test_dora_drops_inputs_of_the_change_alone():
    layer, weight = one_layer("nf4", DoRA, dropout=0.25)
    x = torch.randn(40, 12)
    torch.manual_seed(1)
    found = layer.train()(x)
    torch.manual_seed(1)
    mask, scale = draw_mask(x, 0.25)
    dropped = x * mask * scale
    change = written_out(layer, weight, dropped) - layer.bias - dropped @ weight.t()
    torch.testing.assert_close(found, x @ weight.t() + layer.bias + change, rtol=1e-4, atol=1e-4)


def test_several_adapters_share_the_base_and_add_up():
    net = Encoder()
    model = Holder(net, METHODS["LoRA"], name="one", base="nf4")
    model.adapt(net, LoRA(rank=3, alpha=2, targets=("value",)), name="two", base="nf4")
    moved(model)
    model.use_adapters({"one": 0.5, "two": 2.0})
    layer, x = net.layer[0].value, torch.randn(9, 6)
    expected = x @ layer.weight.t() + layer.bias
    for name, share in (("one", 0.5), ("two", 2.0)):
        down, up = layer.factors(name)
        expected = expected + share * layer.adapters[name].scale * x @ down.t() @ up
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    with model.adapters_disabled():
        torch.testing.assert_close(layer(x), x @ layer.weight.t() + layer.bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_at_first_it_is_the_base_of_few_bits(kind, method):
    base, x = Encoder(), torch.randn(5, 6)
    expected = copy.deepcopy(base)
    for block in expected.layer:
        for layer in (block.query, block.value):
            layer.weight.data = rounded(layer.weight.data, kind)
    model = Holder(base, METHODS[method], base=kind)
    tolerance = 0.05 if kind == "bf16" else 1e-5
    torch.testing.assert_close(model.net(x), expected(x), rtol=tolerance, atol=tolerance)
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"} | ({"lora_magnitude"} if method == "DoRA" else set())


# -- memory ------------------------------------------------------------------------------------------------------------


def big(kind):
    net = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 64))
    reference = weakref.ref(net[0].weight)
    holder = Holder(net, LoRA(rank=4, targets=("0",)), base=kind)
    gc.collect()
    return holder, reference


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4.127), ("int8", 8.0625), ("bf16", 16)])
def test_the_base_really_shrinks(kind, bits):
    holder, reference = big(kind)
    assert reference() is None, "the weight is still there"
    held = sum(t.untyped_storage().nbytes() for t in [*holder.parameters(), *holder.buffers()])
    adapter, rest = 4 * 4 * (512 + 256), 4 * (256 + 256 * 64 + 64)
    assert held - adapter - rest == pytest.approx(512 * 256 * bits / 8, rel=1e-3)
    report = trainable_report(holder)
    assert report.weights == held
    assert (report.trained, report.total) == (4 * (512 + 256), 512 * 256 + rest // 4 + 4 * (512 + 256))
    full = 4 * (512 * 256) + rest + adapter
    assert report.saved == full - held
    assert report.gradients == (adapter, full)
    assert f"(all trained: {full:,}); gradients" in str(report)


@pytest.mark.parametrize("policy", [LoRA, DoRA])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_unpacked_weight_does_not_wait_for_the_backward_pass(kind, policy):
    layer, _ = one_layer(kind, policy)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = layer(torch.randn(40, 12, requires_grad=True))
    assert out.requires_grad
    assert any(t.dtype == torch.uint8 for t in kept)
    assert not any(t.is_floating_point() and t.numel() == 12 * 9 for t in kept)


# -- files -------------------------------------------------------------------------------------------------------------


class Small(Classifier):
    """As `Classifier`, with its targets in few bits."""

    def __init__(self, base_seed: int = 0, base: str | None = "nf4", method: str = "LoRA") -> None:
        L.LightningModule.__init__(self)
        self.save_hyperparameters()
        self.encoder, self.head = Encoder(base_seed), nn.Linear(6, 4)
        self.adapt(self.encoder, METHODS[method], base=base)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_hold_the_adapter_and_resume(kind, tmp_path):
    L.seed_everything(0, verbose=False)
    straight = Small(base=kind)
    half, resumed = copy.deepcopy(straight), Small(base=kind)
    trainer(max_steps=-1, max_epochs=2).fit(straight)
    ours = trainer(max_steps=-1, max_epochs=1)
    ours.fit(half)
    ours.save_checkpoint(tmp_path / "half.ckpt")
    checkpoint = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert not [key for key in checkpoint["state_dict"] if "weight_" in key or key.endswith("query.weight")]
    assert set(checkpoint["lightning_tricks"]["base"]) >= {"encoder.layer.0.query.weight", "encoder.pooler.weight"}
    trainer(max_steps=-1, max_epochs=2).fit(resumed, ckpt_path=tmp_path / "half.ckpt")
    for (name, one), (_, other) in zip(resumed.named_parameters(), straight.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert straight.encoder.layer[0].query.lora_B.abs().max() > 1e-3
    again = Small.load_from_checkpoint(tmp_path / "half.ckpt", strict=True, base=kind)
    assert torch.equal(again.encoder.layer[1].value.lora_B, half.encoder.layer[1].value.lora_B)


def test_checkpoints_know_their_base_and_how_it_was_kept(tmp_path):
    ours = trainer()
    ours.fit(Small())
    ours.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"`encoder\.layer\.0\.query\.(weight|bias)` is not the tensor that"):
        Small.load_from_checkpoint(tmp_path / "a.ckpt", base_seed=1)
    for other in ("int8", None):
        words = f"`encoder` was adapted with base=nf4 in this checkpoint, here with base={other or 'given'}"
        with pytest.raises(CheckpointError, match=words):
            Small.load_from_checkpoint(tmp_path / "a.ckpt", base=other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_adapters_go_to_peft_to_the_original_base_and_back(kind, method, tmp_path):
    base, x = Encoder(), torch.randn(5, 6)
    model = moved(Holder(copy.deepcopy(base), METHODS[method], base=kind))
    model.save_adapter(tmp_path / "adapter")
    onto_original, onto_same = Holder(copy.deepcopy(base)), Holder(copy.deepcopy(base))
    onto_original.load_adapter(tmp_path / "adapter", module=onto_original.net)
    theirs = peft_load(copy.deepcopy(base), tmp_path / "adapter")
    torch.testing.assert_close(theirs(x), onto_original.net(x), rtol=1e-5, atol=1e-5)
    onto_same.load_adapter(tmp_path / "adapter", module=onto_same.net, base=kind)
    torch.testing.assert_close(onto_same.net(x), model.net(x), rtol=1e-5, atol=1e-5)
    other = Holder(copy.deepcopy(base))
    with torch.no_grad():
        other.net.layer[0].query.weight[0, 0] += 1e-3
    with pytest.raises(CheckpointError, match=r"`layer\.0\.query\.weight` is not the tensor"):
        other.load_adapter(tmp_path / "adapter", module=other.net, base=kind)


def test_an_adapter_that_peft_wrote_is_read_beside_few_bits(tmp_path):
    base, x = Encoder(), torch.randn(5, 6)
    moved(plain := Holder(copy.deepcopy(base), METHODS["LoRA"])).save_adapter(tmp_path)
    model = Holder(base, METHODS["LoRA"], base="int8")
    model.load_adapter(tmp_path, module=model.net)
    assert torch.equal(model.net.layer[0].query.lora_B, plain.net.layer[0].query.lora_B)
    torch.testing.assert_close(model.net(x), plain.net(x), rtol=0.1, atol=0.1)


def test_it_merges_into_the_original_file(tmp_path):
    base = Encoder()
    model = moved(Holder(copy.deepcopy(base), METHODS["LoRA"], base="nf4"))
    model.save_adapter(tmp_path / "adapter")
    state = base.state_dict()
    layout = {key: (value.dtype, tuple(value.shape)) for key, value in state.items()}
    write_weights(tmp_path / "base.safetensors", layout, state.items(), {})
    assert merge_folder(tmp_path / "adapter", tmp_path / "base.safetensors", tmp_path / "merged.safetensors") == 4
    layer = model.net.layer[0].query
    expected = base.layer[0].query.weight + layer.adapters["default"].scale * layer.lora_B.t() @ layer.lora_A
    found = WeightsFile(tmp_path / "merged.safetensors").tensor("layer.0.query.weight")
    torch.testing.assert_close(found, expected.detach())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
def test_a_merge_is_refused_and_the_export_is_of_the_dequantised_weights(kind, method, tmp_path):
    base, x = Encoder(), torch.randn(5, 6)
    model = moved(Holder(copy.deepcopy(base), METHODS[method], base=kind))
    with pytest.raises(MisconfigurationError, match=rf"into `net\.layer\.0\.query`: the weight is kept in {kind}"):
        model.merge_adapters()
    with pytest.raises(MisconfigurationError, match="which loses most of the update"):
        model.net.layer[0].query.merge()
    assert not model.adapters_merged
    model.export_merged(tmp_path / "merged.safetensors", module=model.net)
    file = WeightsFile(tmp_path / "merged.safetensors")
    assert set(file.names) == set(base.state_dict())
    merged = Encoder()
    merged.load_state_dict({name: file.tensor(name) for name in file.names})
    tolerance = 0.05 if kind == "bf16" else 1e-5
    torch.testing.assert_close(merged(x), model.net(x), rtol=tolerance, atol=tolerance)
    with model.adapters_disabled():
        model.export_merged(tmp_path / "base.safetensors", module=model.net)
    found = WeightsFile(tmp_path / "base.safetensors").tensor("layer.0.query.weight")
    assert torch.equal(found, rounded(base.layer[0].query.weight.detach(), kind))


def test_most_of_a_small_update_would_be_lost():
    """The reason for the refusal, as a figure: FACTS of rounding."""
    weight = torch.randn(256, 256) / 16
    base = rounded(weight, "nf4")
    update = 2e-3 * torch.randn(256, 4) @ torch.randn(4, 256)
    kept = rounded(base + update, "nf4") - base
    assert (kept - update).norm() / update.norm() > 0.8


# -- a module like others ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_copies_and_pickles(kind):
    model = moved(Holder(Encoder(), METHODS["LoRA"], base=kind))
    x, expected = torch.randn(5, 6), None
    expected = model.net(x)
    other = Holder(Encoder(seed=1), METHODS["LoRA"], base=kind)
    other.net.load_state_dict(model.net.state_dict(), strict=True)
    assert torch.equal(other.net(x), expected)
    assert torch.equal(copy.deepcopy(model).net(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model.net))(x), expected)
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_"):
        other.net.load_state_dict(Encoder().state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_casts_leave_the_bytes_alone(kind):
    model = moved(Holder(Encoder(), METHODS["LoRA"], base=kind))
    before = model.net.layer[0].query.kept.clone()
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        model.to(dtype)
        assert torch.equal(model.net.layer[0].query.kept, before)
        assert model.net(torch.randn(5, 6, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
def test_autocast(kind, method):
    model, x = moved(Holder(Encoder(), METHODS[method], base=kind)), torch.randn(40, 6)
    expected = model.net(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = model.net.layer[0].query(x)
        assert out.dtype == torch.bfloat16
        found = model.net(x)
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)
    found.float().square().sum().backward()
    assert model.net.layer[0].query.lora_A.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_inference(kind, method):
    model, x = moved(Holder(Encoder(), METHODS[method], base=kind)).eval(), torch.randn(5, 6)
    expected = model.net(x)
    with torch.no_grad():
        assert torch.equal(model.net(x), expected)
    with torch.inference_mode():
        assert torch.equal(model.net(x), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does so itself
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
def test_compiles_into_one_graph_and_stays_compiled(kind, method):
    torch.compiler.reset()
    model, x = moved(Holder(Encoder(), METHODS[method], base=kind)), torch.randn(7, 6, requires_grad=True)
    compiled = torch.compile(model.net, backend="aot_eager", fullgraph=True)
    for mode in (True, False):
        model.train(mode)
        compiled(x).sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(x).sum().backward()
        torch.testing.assert_close(compiled(x), model.net(x))


def test_functional_transforms_and_second_derivatives():
    layer, weight = one_layer("nf4", LoRA)
    x = torch.randn(5, 12)
    torch.testing.assert_close(torch.func.vmap(layer)(x), written_out(layer, weight, x), rtol=1e-5, atol=1e-5)
    out = packed_linear(x.requires_grad_(), layer.kept, layer.packing)
    for y in (out, layer(x)):
        with pytest.raises(UnsupportedError, match="cannot run on `create_graph=True`"):
            torch.autograd.grad(y.square().sum(), x, create_graph=True)


def test_the_base_alone_passes_gradients_on():
    layer, weight = one_layer("nf4", LoRA)
    layer.active = {}
    layer.bias.requires_grad_(True)
    x = torch.randn(2, 5, 12, requires_grad=True)
    direction = torch.randn(2, 5, 9)
    found = torch.autograd.grad((layer(x) * direction).sum(), [x, layer.bias])
    expected = torch.autograd.grad(((x @ weight.t() + layer.bias) * direction).sum(), [x, layer.bias])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert layer(torch.randn(12)).shape == (9,)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (9, 64), (300, 67)])
def test_bytes_are_read_wherever_they_begin(kind, shape):
    weight = torch.randn(shape)
    packed, packing = pack_weight(weight, kind)
    for offset in (0, 1, 2, 3):
        elsewhere = torch.cat((torch.zeros(offset, dtype=torch.uint8), packed))[offset:]
        assert torch.equal(packing.unpack(elsewhere), rounded(weight, kind))


# -- refusals ----------------------------------------------------------------------------------------------------------


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.query, self.out = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)


def tied():
    net = Table()
    net.out.weight = net.table.weight
    return net


def spoilt():
    net = Table()
    with torch.no_grad():
        net.query.weight[2, 3] = float("nan")
    return net


@pytest.mark.parametrize(
    ("build", "policy", "base", "words"),
    [
        (Table, LoRA(rank=2, targets=("query",)), "fp4", "`base` must be 'nf4', 'int8', 'bf16' or None, got 'fp4'"),
        (Table, IA3(targets=("query",)), "nf4", "is for LoRA and DoRA, .* not for IA3"),
        (Table, BitFit(), "int8", "not for BitFit"),
        (Table, LoRA(rank=2, targets=("table", "query")), "nf4", "linear layers, and `table` is a Embedding"),
        (tied, LoRA(rank=2, targets=("out",)), "int8", r"weight of `out` is that of `net\.table\.weight` too"),
        (spoilt, LoRA(rank=2, targets=("out", "query")), "nf4", "weight of `query` cannot be kept in nf4.*NaN or infi"),
    ],
)
def test_what_cannot_be_kept_in_few_bits_is_refused_and_nothing_changes(build, policy, base, words):
    model = Holder(build())
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(MisconfigurationError, match=words):
        model.adapt(model.net, policy, base=base)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(p.requires_grad for p in model.parameters())
    assert not model.adapter_names


def test_adapters_of_one_layer_share_one_base():
    model = Holder(Encoder(), METHODS["LoRA"], name="one")
    with pytest.raises(MisconfigurationError, match=r"`layer\.0\.query` holds an adapter already, .* it was given"):
        model.adapt(model.net, METHODS["rsLoRA"], name="two", base="nf4")
    model = Holder(Encoder(), METHODS["LoRA"], name="one", base="nf4")
    with pytest.raises(MisconfigurationError, match=r"with its weight kept nf4: .* here 'int8'"):
        model.adapt(model.net, METHODS["rsLoRA"], name="two", base="int8")
    model.adapt(model.net, METHODS["rsLoRA"], name="two")
    assert isinstance(model.net.layer[0].query, PackedLinear)
    assert list(model.net.layer[0].query.adapters) == ["one", "two"]


def test_the_same_again_changes_nothing_and_something_else_is_refused():
    model = Holder(Encoder(), METHODS["LoRA"], base="nf4")
    before = model.net.layer[0].query.kept
    model.adapt(model.net, METHODS["LoRA"], base="nf4")
    assert model.net.layer[0].query.kept is before
    with pytest.raises(MisconfigurationError, match="base='nf4', and cannot be with"):
        model.adapt(model.net, METHODS["LoRA"])


def test_the_mixin_of_lora_takes_it_too():
    class Net(LoRAMixin, L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.ModuleDict({"query": nn.Linear(8, 8), "value": nn.Linear(8, 8), "pooler": nn.Linear(8, 8)})
            self.weight = self.net["query"].weight.detach().clone()
            self.adapt(self.net, base="int8", trainable=("pooler",))

    model = Net()
    assert model.net["query"].packing.kind == "int8"
    assert model.net["query"].original == fingerprint(model.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitsandbytes_unpacks_the_same_values(dtype):
    pytest.importorskip("bitsandbytes", reason="not run: needs bitsandbytes (pip install --no-deps bitsandbytes)")
    rounded = quantize_nf4(torch.randn(96, 200))
    own = rounded.dequantize(dtype)
    assert (by_bitsandbytes(rounded, dtype) - own).abs().max() <= torch.finfo(dtype).eps * own.abs().max()


def test_unpacking_stays_on_the_device_of_the_bytes():
    weight = torch.randn(64, 128)
    for kind in ("nf4", "int8", "bf16"):
        packed, packing = pack_weight(weight, kind)
        found = packing.unpack(packed.to("meta"), torch.bfloat16)
        assert (found.device.type, found.dtype, found.shape) == ("meta", torch.bfloat16, weight.shape)
