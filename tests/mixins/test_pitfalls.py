"""What is known to go wrong with adapters, on whole modules: checkpointing, compiling, inference, batch norms."""

import lightning as L
import pytest
import torch
from torch import nn

from lightning_tricks.errors import UnsupportedError
from lightning_tricks.mixins import IA3, AdapterMixin, Bottleneck, DoRA, LoRA
from tests.mixins.models import QUIET, Encoder, trainer
from tests.mixins.test_prompts import decoder

pytestmark = QUIET

METHODS = {
    "LoRA": LoRA(rank=2, targets=("query", "value")),
    "dropout": LoRA(rank=2, targets=("query", "value"), dropout=0.25),
    "DoRA": DoRA(rank=2, targets=("query", "value")),
    "IA3": IA3(targets=("query",), feedforward=("value",)),
    "Bottleneck": Bottleneck(width=2, targets=("query",)),
}


class Bare(AdapterMixin, L.LightningModule):
    def __init__(self, net, policy):
        super().__init__()
        self.net = net
        self.adapt(self.net, policy)


@pytest.mark.parametrize("method", METHODS)
def test_inference_without_gradients_is_the_same(method):
    model, x = Bare(Encoder(), METHODS[method]).eval(), torch.randn(5, 6)
    expected = model.net(x)
    with torch.no_grad():
        assert torch.equal(model.net(x), expected)
    with torch.inference_mode():
        assert torch.equal(model.net(x), expected)


@pytest.mark.parametrize("method", ["LoRA", "dropout", "DoRA"])
def test_a_gradient_penalty_is_refused_by_name(method):
    model, x = Bare(Encoder(), METHODS[method]), torch.randn(5, 6, requires_grad=True)
    with pytest.raises(UnsupportedError, match="cannot run on `create_graph=True`"):
        torch.autograd.grad(model.net(x).sum(), x, create_graph=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does so itself
@pytest.mark.parametrize("method", METHODS)
def test_compiles_into_one_graph_and_stays_compiled(method):
    torch.compiler.reset()
    model, x = Bare(Encoder(), METHODS[method]), torch.randn(7, 6, requires_grad=True)
    compiled = torch.compile(model.net, backend="aot_eager", fullgraph=True)
    for mode in (True, False):
        model.train(mode)
        compiled(x).sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        model.train()
        compiled(x).sum().backward()
        model.eval()
        torch.testing.assert_close(compiled(x), model.net(x))


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
