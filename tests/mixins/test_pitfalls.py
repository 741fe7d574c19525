"""What is known to go wrong with adapters, on whole modules: checkpointing, compiling, inference, batch norms."""

import warnings

import lightning as L
import pytest
import torch
from torch import nn

from lightning_tricks.errors import UnsupportedError
from lightning_tricks.mixins import (
    IA3,
    AdapterFusion,
    AdapterMixin,
    Bottleneck,
    DoRA,
    LoRA,
    PrefixTuning,
    PromptTuning,
)
from tests.mixins.models import QUIET, Encoder, moved, trainer
from tests.mixins.test_prompts import IDS, MASK, decoder

transformers = pytest.importorskip("transformers")
pytestmark = QUIET

METHODS = {
    "LoRA": LoRA(rank=2, targets=("query", "value")),
    "dropout": LoRA(rank=2, targets=("query", "value"), dropout=0.25),
    "DoRA": DoRA(rank=2, targets=("query", "value")),
    "IA3": IA3(targets=("query",), feedforward=("value",)),
    "Bottleneck": Bottleneck(width=2, targets=("query",)),
}


class Bare(AdapterMixin, L.LightningModule):
    def __init__(self, net, *policies):
        super().__init__()
        self.net = net
        for number, policy in enumerate(policies):
            self.adapt(self.net, policy, name=f"n{number}" if number else "default")


@pytest.mark.parametrize("method", METHODS)
def test_inference_without_gradients_is_the_same(method):
    model, x = moved(Bare(Encoder(), METHODS[method])).eval(), torch.randn(5, 6)
    expected = model.net(x)
    assert (expected - Encoder()(x)).abs().max() > 1e-3, "the adapter adds nothing"
    with torch.no_grad():
        assert torch.equal(model.net(x), expected)
    with torch.inference_mode():
        assert torch.equal(model.net(x), expected)


@pytest.mark.parametrize("method", ["LoRA", "dropout", "DoRA"])
def test_a_gradient_penalty_is_refused_by_name(method):
    model, x = Bare(Encoder(), METHODS[method]), torch.randn(5, 6, requires_grad=True)
    with pytest.raises(UnsupportedError, match="cannot run on `create_graph=True`"):
        torch.autograd.grad(model.net(x).sum(), x, create_graph=True)


def conv1d():
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(5, 6), nn.ReLU(inplace=True), Conv1D(4, 5))


def table():
    return nn.Sequential(nn.Embedding(9, 6), nn.Tanh(), nn.Linear(6, 4))


def vectors():
    return {"input": torch.randn(7, 6, requires_grad=True)}


FUSED = [*[Bottleneck(width=2, targets=("pooler",))] * 2, AdapterFusion(adapters=("default", "n1"))]
NETS = {
    **{name: (Encoder, [policy], lambda: {"x": torch.randn(7, 6)}) for name, policy in METHODS.items()},
    "fusion": (Encoder, FUSED, lambda: {"x": torch.randn(7, 6)}),
    "embedding": (table, [LoRA(rank=2, targets=("0", "2"))], lambda: {"input": torch.randint(0, 9, (3, 4))}),
    "Conv1D": (conv1d, [LoRA(rank=2, targets=("0", "2"))], vectors),
    "DoRA of Conv1D": (conv1d, [DoRA(rank=2, targets=("0", "2"))], vectors),
    "prompt": (decoder, [PromptTuning(tokens=3)], lambda: {"input_ids": IDS, "attention_mask": MASK}),
    "prefix": (decoder, [PrefixTuning(tokens=3)], lambda: {"input_ids": IDS, "attention_mask": MASK}),
}
TWO_GRAPHS = ("dropout", "prompt", "prefix")  # what drops out in training alone, as decoders' own layers do


def whole_loss(output):
    return (output.logits if hasattr(output, "logits") else output).square().sum()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does so itself
@pytest.mark.parametrize("case", NETS)
def test_compiles_into_one_graph_and_stays_compiled(case):
    build, policies, inputs = NETS[case]
    torch.compiler.reset()
    model, x = moved(Bare(build(), *policies)), inputs()
    if isinstance(model.net, transformers.PreTrainedModel):
        model.net.config.use_cache = False
        nn.init.normal_(next(p for p in model.parameters() if p.requires_grad))
    # A function around the net, as a `forward` would be: what hangs on the net itself is to be in the graph as well.
    compiled = torch.compile(lambda **inputs: model.net(**inputs), backend="aot_eager", fullgraph=True)
    for mode in (True, False) if case in TWO_GRAPHS else (True,):
        model.train(mode)
        whole_loss(compiled(**x)).backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for mode in (False, True):
            model.train(mode)
            model.zero_grad()
            found = whole_loss(compiled(**x))
            found.backward()
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
            if not (mode and case in TWO_GRAPHS):
                model.zero_grad()
                expected = whole_loss(model.net(**x))
                expected.backward()
                torch.testing.assert_close(found, expected)
                torch.testing.assert_close(gradients, {name: model.get_parameter(name).grad for name in gradients})
                assert all(gradient.any() for gradient in gradients.values())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*use_reentrant")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_activations_behind_frozen_embeddings_train(use_reentrant):
    """The blocks' inputs need no gradient then, and reentrant checkpoints would give their adapters none."""

    class Fitted(Bare):
        def training_step(self, batch, _):
            return self.net(input_ids=batch[0], labels=batch[0], use_cache=False).loss

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

        def train_dataloader(self):
            ids = torch.randint(1, 50, (4, 6))
            return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids), batch_size=4)

    net = decoder().train()
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model = Fitted(net, LoRA(rank=2, targets=("c_attn",)))
    trainer(max_steps=1).fit(model)
    assert all(block.attn.c_attn.lora_B.abs().max() > 0 for block in net.transformer.h)


def test_batch_norms_of_a_frozen_base_keep_their_statistics():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = Bare(net, LoRA(rank=2, targets=("0",)))
    before = net[1].running_mean.clone()
    for mode in (False, True):
        model.train(mode)
        model.net(torch.randn(9, 4) + 3)
        assert torch.equal(net[1].running_mean, before)
    assert "net.1.running_mean" in model.state_dict()


def test_keys_of_the_base_stay():
    plain = set(Encoder().state_dict())
    for policy in METHODS.values():
        model = Bare(Encoder(), policy)
        assert plain <= {name for name, _ in [*model.net.named_parameters(), *model.net.named_buffers()]}


@pytest.mark.parametrize("grouped", [False, True])
def test_lora_plus_without_its_groups_is_told_of(grouped):
    class Fitted(Bare):
        def training_step(self, batch, _):
            return self.net(batch).square().sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameter_groups(lr=0.01) if grouped else self.parameters(), lr=0.01)

    data = torch.utils.data.DataLoader(torch.randn(4, 6), batch_size=4)
    for policy in (LoRA(rank=2, plus=16), LoRA(rank=2)):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            trainer(max_steps=1).fit(Fitted(Encoder(), policy), data)
        told = [str(one.message) for one in told if "has no effect" in str(one.message)]
        assert len(told) == (policy.plus is not None and not grouped)
        assert not told or "LoRA(plus=16) of 'default'" in told[0]
