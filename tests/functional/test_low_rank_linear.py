"""The fused kernels of LoRA and DoRA against the formulas in float64, and what may surround them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_tricks.errors import UnsupportedError
from lightning_tricks.functional import dora_linear, low_rank_linear, low_rank_row_norms
from lightning_tricks.functional.dropout_masks import draw_mask


def tensors(tokens=(7,), width=5, out=4, dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    x = torch.randn(*tokens, width, dtype=dtype, requires_grad=True)
    weight, shift = torch.randn(out, width, dtype=dtype), torch.randn(out, dtype=dtype) if bias else None
    down = torch.randn(2, width, dtype=dtype, requires_grad=True)
    up = torch.randn(2, out, dtype=dtype, requires_grad=True)
    return x, weight, shift, down, up


def written_out(x, weight, bias, down, up, scale):
    return F.linear(x, weight + scale * up.t() @ down, bias)


def dora_written_out(x, weight, bias, down, up, magnitude, scale):
    full = weight + scale * up.t() @ down
    return F.linear(x, magnitude[:, None] * full / full.norm(dim=1, keepdim=True).detach(), bias)


def gradients(out, inputs):
    torch.manual_seed(1)
    return torch.autograd.grad((out * torch.randn(out.shape, dtype=out.dtype)).sum(), inputs)


@pytest.mark.parametrize("tokens", [(7,), (2, 3), (), (0,), (40,)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_low_rank_equals_the_product_written_out(tokens, transposed, bias, dtype):
    x, weight, shift, down, up = tensors(tokens, bias=bias, dtype=dtype)
    given = weight.t().contiguous() if transposed else weight
    out = low_rank_linear(x, given, shift, down, up, 1.5, transposed=transposed)
    expected = written_out(x, weight, shift, down, up, 1.5)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients(out, (x, down, up)), gradients(expected, (x, down, up)))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kernel", ["lora", "dora"])
def test_a_weight_that_is_trained_too_gets_its_gradient(transposed, kernel):
    x, weight, shift, down, up = tensors()
    given = (weight.t().contiguous() if transposed else weight).requires_grad_(True)
    plain, shift = given.t() if transposed else given, shift.requires_grad_(True)
    if kernel == "lora":
        out = low_rank_linear(x, given, shift, down, up, 1.5, transposed=transposed)
        expected = written_out(x, plain, shift, down, up, 1.5)
    else:
        magnitude = torch.rand(4, dtype=torch.float64)
        out = dora_linear(x, given, shift, down, up, magnitude, 1.5, transposed=transposed)
        expected = dora_written_out(x, plain, shift, down, up, magnitude, 1.5)
    torch.testing.assert_close(
        gradients(out, (given, shift)), gradients(expected, (given, shift)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("tokens", [(7,), (2, 3), (40,), (600,)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_dora_equals_the_paper_written_out(tokens, transposed, bias):
    x, weight, shift, down, up = tensors(tokens, bias=bias, dtype=torch.float32)
    magnitude = torch.rand(4, requires_grad=True)
    given = weight.t().contiguous() if transposed else weight
    out = dora_linear(x, given, shift, down, up, magnitude, 1.5, transposed=transposed)
    double = [t.double() if t is not None else None for t in (x, weight, shift, down, up, magnitude)]
    expected = dora_written_out(*double, 1.5)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    wanted = (x, down, up, magnitude)
    torch.manual_seed(1)
    factor = torch.randn(out.shape)
    ours = torch.autograd.grad((out * factor).sum(), wanted)
    theirs = torch.autograd.grad((expected * factor).sum(), wanted)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-5 * float(other.abs().max()))


def test_row_norms_are_those_of_the_full_matrix():
    _, weight, _, down, up = tensors(dtype=torch.float32)
    torch.testing.assert_close(low_rank_row_norms(weight, down, up, 0.7), (weight + 0.7 * up.t() @ down).norm(dim=1))


def test_a_row_of_zeros_stays_finite_under_dora():
    x, weight, _, down, _ = tensors(dtype=torch.float32)
    weight[1] = 0
    up, magnitude = torch.zeros(2, 4, requires_grad=True), weight.norm(dim=1).requires_grad_(True)
    out = dora_linear(x, weight, None, down, up, magnitude, 1.0)
    assert out[:, 1].abs().max() == 0
    assert all(gradient.isfinite().all() for gradient in gradients(out, (x, down, up, magnitude)))


def test_an_operation_in_place_may_follow():
    x, weight, shift, down, up = tensors(dtype=torch.float32)
    magnitude = torch.rand(4, requires_grad=True)
    for kernel in (
        lambda: low_rank_linear(x, weight, shift, down, up, 1.5),
        lambda: dora_linear(x, weight, shift, down, up, magnitude, 1.5),
    ):
        wanted = (x, down, up) if "low" in str(kernel.__code__.co_names) else (x, down, up, magnitude)
        in_place = gradients(F.relu(kernel(), inplace=True), wanted)
        torch.testing.assert_close(in_place, gradients(F.relu(kernel()), wanted))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_draws_the_same_masks(use_reentrant):
    x, weight, shift, down, up = tensors((50,), dtype=torch.float32)

    def layer(x):
        return low_rank_linear(x, weight, shift, down, up, 1.5, dropout=0.5)

    torch.manual_seed(3)
    plain = layer(x)
    torch.manual_seed(3)
    again = checkpoint(layer, x, use_reentrant=use_reentrant)
    assert torch.equal(plain, again)
    for out in (plain, again):
        out.square().sum().backward()
        torch.manual_seed(4)  # the recomputation restores the state it needs
    torch.testing.assert_close(down.grad / 2, torch.autograd.grad(_at_seed(layer, x, 3).square().sum(), down)[0])


def _at_seed(layer, x, seed):
    torch.manual_seed(seed)
    return layer(x)


@pytest.mark.parametrize(("asked", "done"), [(0.1, 26 / 256), (0.5, 0.5), (0.999, 255 / 256), (0.001, 0.0)])
def test_dropout_drops_the_share_that_it_says_and_scales_what_is_left(asked, done):
    identity = torch.eye(16)
    out = low_rank_linear(torch.ones(4096, 16), torch.zeros(16, 16), None, identity, identity, 1.0, dropout=asked)
    dropped, kept = out == 0, out[out != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - done)))
    assert abs(float(dropped.float().mean()) - done) < 0.01


MANY_ROWS = (40_000,)  # more than are masked at a time


@pytest.mark.parametrize("tokens", [(64,), (3, 5), (0,), MANY_ROWS], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_dropout_are_those_of_the_mask_that_was_drawn(tokens, transposed):
    x, weight, shift, down, up = tensors(tokens)
    given = weight.t().contiguous() if transposed else weight
    out = _at_seed(lambda x: low_rank_linear(x, given, shift, down, up, 1.5, dropout=0.25, transposed=transposed), x, 5)
    dropped = x * _scaled_mask(x, 5)
    expected = F.linear(x, weight, shift) + 1.5 * dropped @ down.t() @ up
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients(out, (x, down, up)), gradients(expected, (x, down, up)))


@pytest.mark.parametrize("tokens", [(64,), (3, 5), (0,), MANY_ROWS], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_dora_drops_inputs_of_what_differs_from_the_plain_layer(tokens, transposed, bias):
    x, weight, shift, down, up = tensors(tokens, bias=bias)
    magnitude = torch.rand(4, dtype=torch.float64, requires_grad=True)
    weight.requires_grad_(True)
    given = weight.t() if transposed else weight

    def layer(x):
        return dora_linear(x, given, shift, down, up, magnitude, 1.5, dropout=0.25, transposed=transposed)

    out, dropped = _at_seed(layer, x, 5), x * _scaled_mask(x, 5)
    differs = dora_written_out(dropped, weight, None, down, up, magnitude, 1.5) - F.linear(dropped, weight)
    expected = F.linear(x, weight, shift) + differs
    torch.testing.assert_close(out, expected)
    trained = (x, weight, down, up, magnitude)
    torch.testing.assert_close(gradients(out, trained), gradients(expected, trained))


def _scaled_mask(x, seed):
    torch.manual_seed(seed)
    mask, scale = draw_mask(x.reshape(-1, x.shape[-1]), 0.25)
    return mask.view(x.shape).to(x.dtype) * scale


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_at_its_precision_and_trains_fp32(weight_dtype):
    x, weight, shift, down, up = tensors((3, 9), dtype=torch.float32)
    magnitude = torch.rand(4, requires_grad=True)
    expected = written_out(x, weight, shift, down, up, 1.5)
    with torch.autocast("cpu", torch.bfloat16):
        out = low_rank_linear(x, weight.to(weight_dtype), shift.to(weight_dtype), down, up, 1.5)
        decomposed = dora_linear(x, weight.to(weight_dtype), shift.to(weight_dtype), down, up, magnitude, 1.5)
        assert out.dtype == decomposed.dtype == torch.bfloat16
        for gradient in (*gradients(out, (x, down, up)), *gradients(decomposed, (x, down, up, magnitude))):
            assert gradient.dtype == torch.float32
    torch.testing.assert_close(out.float(), expected, rtol=3e-2, atol=0.1)


def test_a_backward_pass_inside_autocast_of_a_forward_outside():
    x, weight, shift, down, up = tensors(dtype=torch.float32)
    plain = gradients(low_rank_linear(x, weight, shift, down, up, 1.5), (x, down, up))
    out = low_rank_linear(x, weight, shift, down, up, 1.5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(gradients(out, (x, down, up)), plain)


@pytest.mark.parametrize("kernel", ["lora", "dora"])
def test_a_second_derivative_is_refused_by_name(kernel):
    x, weight, shift, down, up = tensors()
    name = "A low-rank adapter" if kernel == "lora" else "DoRA"
    out = (
        low_rank_linear(x, weight, shift, down, up, 1.5)
        if kernel == "lora"
        else dora_linear(x, weight, shift, down, up, torch.rand(4), 1.5)
    )
    with pytest.raises(UnsupportedError, match=f"{name} cannot run on `create_graph=True`"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


class Net(nn.Module):
    def __init__(self, kernel, dropout):
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(6, 4).requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(2, 4))
        self.length = nn.Parameter(torch.rand(4))
        self.kernel, self.dropout = kernel, dropout

    def forward(self, x):
        weight, bias = self.base.weight, self.base.bias
        dropout = self.dropout if self.training else 0.0
        if self.kernel == "dora":
            return dora_linear(x, weight, bias, self.down, self.up, self.length, 2.0, dropout=dropout)
        return low_rank_linear(x, weight, bias, self.down, self.up, 2.0, dropout=dropout)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does so itself
@pytest.mark.parametrize(("kernel", "dropout"), [("lora", 0.0), ("lora", 0.5), ("dora", 0.0), ("dora", 0.5)])
@pytest.mark.slow
def test_compiles_into_one_graph_and_stays_compiled(kernel, dropout):
    torch.compiler.reset()
    net, x = Net(kernel, dropout), torch.randn(30, 6, requires_grad=True)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for _ in range(2):  # each mode once, then both again
        for mode in (True, False):
            net.train(mode)
            compiled(x).sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        net.train()
        compiled(x).sum().backward()
        net.eval()
        out = compiled(x)
    torch.testing.assert_close(out, net(x))
    ours = torch.autograd.grad(out.square().sum(), (net.down, net.up, x))
    torch.testing.assert_close(ours, torch.autograd.grad(net(x).square().sum(), (net.down, net.up, x)))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_several_adapters_at_once_with_vmap(dropout):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(7, 5, generator=generator), torch.randn(4, 5, generator=generator)
    down, up = torch.randn(3, 2, 5, generator=generator), torch.randn(3, 2, 4, generator=generator)

    def one(down, up):
        torch.manual_seed(1)
        return low_rank_linear(x, weight, None, down, up, 0.5, dropout=dropout)

    together = torch.vmap(one, randomness="same")(down, up)
    apart = torch.stack([one(*pair) for pair in zip(down, up, strict=True)])
    torch.testing.assert_close(together, apart)
