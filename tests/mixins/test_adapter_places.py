"""Where and when adapters can be, on every engine and device: what would be wrong in silence, or raw, is refused."""

import logging

import pytest
import torch
from torch import nn

from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.mixins import BitFit, Bottleneck, LoRA, PrefixTuning, PromptTuning, trainable_report
from tests.mixins.models import QUIET, Classifier, Encoder, Holder, moved, trainer
from tests.mixins.test_prompts import IDS, decoder

pytestmark = QUIET


# -- prefixes and what is computed again -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*use_reentrant")
def test_a_prefix_is_not_trained_with_activations_computed_again():
    model = Holder(decoder(), PrefixTuning(tokens=2))
    model.net.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(MisconfigurationError, match=r"GPT2LMHeadModel trains with it: turn it off \(`gradient_check"):
        model.net(input_ids=IDS)
    model.eval()
    model.net(input_ids=IDS)
    prompted = Holder(decoder(), PromptTuning(tokens=2))
    prompted.net.gradient_checkpointing_enable()
    prompted.train()
    prompted.net(input_ids=IDS, labels=IDS).loss.backward()
    assert prompted.net.prompts.prompt.grad.abs().max() > 0


def test_a_prefix_is_not_trained_with_blocks_that_hooks_compute_again():
    from lightning_tricks.engines._activation_checkpointing import checkpoint_blocks

    model = Holder(decoder(), PrefixTuning(tokens=2)).train()
    checkpoint_blocks(model, ["GPT2Block"])
    with pytest.raises(MisconfigurationError, match="a prefix goes through the cache, which activation checkpointing"):
        model.net(input_ids=IDS)


# -- batch normalisation ---------------------------------------------------------------------------------------------


class Normed(Holder):
    def __init__(self, policy, **options):
        net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False))
        super().__init__(net, policy, **options)

    def training_step(self, batch, _):
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch, _):
        self.net(batch[0])

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 4) + 3), batch_size=4)

    val_dataloader = train_dataloader

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:Found 2 module.s. in eval mode at the start of training")
def test_statistics_of_a_frozen_base_stay_what_they_were():
    model = Normed(LoRA(rank=2, targets=("0",)))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    trainer(max_epochs=2, max_steps=-1).fit(model)
    assert model.net[0].lora_B.abs().max() > 0
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert model.train().training
    assert not model.net[1].training
    assert not model.net[3].training
    frozen = Normed(None)
    frozen.freeze_base(frozen.net)
    frozen.train()
    frozen.net(torch.randn(9, 4) + 3)
    assert frozen.net[1].num_batches_tracked == 0


@pytest.mark.parametrize("policy", [BitFit(), LoRA(rank=2, targets=("0",))])
def test_statistics_beside_trained_weights_move(policy):
    options = {} if isinstance(policy, BitFit) else {"trainable": ("1",)}
    model = Normed(policy, **options).train()
    model.net(torch.randn(9, 4) + 3)
    assert model.net[1].num_batches_tracked == 1
    assert model.net[3].num_batches_tracked == 0


# -- bottlenecks -----------------------------------------------------------------------------------------------------


def test_a_bottleneck_is_not_put_where_nobody_calls():
    model = Holder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    with pytest.raises(MisconfigurationError, match=r"`self_attn\.out_proj` belongs to torch\.nn\.MultiheadAttention"):
        model.adapt(model.net, Bottleneck(width=2, targets=("out_proj",)))
    assert all(p.requires_grad for p in model.parameters())
    model.adapt(model.net, Bottleneck(width=2, targets=("self_attn",)))


class Named(nn.Module):
    def __init__(self, key):
        super().__init__()
        self.key, self.inner = key, Inner()

    def forward(self, x):
        return self.inner(**{self.key: x})


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, hidden_states=None, other=None):
        return self.up(other if hidden_states is None else hidden_states)


def test_a_parallel_adapter_reads_what_is_given_by_keyword():
    model, x = Holder(Named("hidden_states"), Bottleneck(width=2, targets=("inner",), parallel=True)), torch.randn(3, 4)
    moved(model)
    expected = model.net(x)
    model.net.forward = lambda x: model.net.inner(x)
    assert torch.equal(model.net(x), expected)
    assert not torch.equal(model.net.inner.up(x), expected)
    model = Holder(Named("other"), Bottleneck(width=2, targets=("inner",), parallel=True))
    with pytest.raises(MisconfigurationError, match="reads what its Inner reads, which was called with other"):
        model.net(x)
    sequential = moved(Holder(Named("other"), Bottleneck(width=2, targets=("inner",))))
    assert not torch.equal(sequential.net(x), sequential.net.inner.up(x)), "it needs no input"


def test_bottlenecks_are_made_where_their_host_is():
    net = nn.ModuleDict({"block": nn.Sequential(nn.Linear(4, 4, device="meta"))})
    model = Holder(net)
    for name in ("one", "two"):
        model.adapt(net, Bottleneck(width=2, targets=("block",)), name=name)
        assert {p.device.type for p in model.parameters()} == {"meta"}


def test_what_pissa_subtracts_is_taken_where_the_factors_are():
    layer = Holder(Encoder(), LoRA(rank=2, init="pissa")).net.layer[0].query
    layer.to("meta")
    down, up = torch.ones(2, 6), torch.ones(2, 6)
    layer.lora_A_start, layer.lora_B_start = layer.lora_A_start.to("meta"), layer.lora_B_start.to("meta")
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):  # a copy, and no mixed operation
        layer.assemble("default", down, up)


# -- the report ------------------------------------------------------------------------------------------------------


class Late(Classifier):
    def __init__(self):
        super(Classifier, self).__init__()
        self.encoder = None

    def configure_model(self):
        if self.encoder is None:
            self.encoder, self.head = Encoder(), nn.Linear(6, 4)
            self.adapt(self.encoder, LoRA(rank=2))


def test_the_report_counts_what_configure_model_adapts(caplog):
    logging.getLogger("lightning.pytorch").propagate = True
    with caplog.at_level(logging.INFO):
        trainer(max_steps=1).fit(model := Late())
    assert caplog.text.count(f"Late: {trainable_report(model)}") == 1


# -- loading under a strategy ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero_2", "zero_3"])
def test_loading_after_the_strategy_took_the_module_is_refused_by_name(strategy, group, tmp_path):
    torch.manual_seed(0)
    module = moved(Classifier())
    module.save_adapter(tmp_path)
    options = {"strategy": strategy, "devices": group.world, "folder": str(tmp_path)}
    for answer in group.call("tests.mixins.loading_jobs:load_too_late", **options):
        assert answer["steps"] == 1, "in configure_model it can be"
        if strategy == "ddp":
            assert answer["default"] == "none"
            assert "a fit is running, whose optimizer holds" in answer["rest"]
        else:
            state = "kept a second time, in fp32, by" if strategy == "zero_2" else "spread over ranks by"
            assert f"is {state} the strategy: call `load_adapter` in `__init__`" in answer["default"]
            assert "call `load_adapter` in `__init__` or" in answer["rest"] or "a fit is running" in answer["rest"]
        assert answer["new"] != "none"
