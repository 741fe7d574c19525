"""What the strategies' options must do, as jobs that a `Group` runs on every rank."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_tricks.engines import FSDP2Strategy, ZeroStrategy
from lightning_tricks.errors import MisconfigurationError
from tests.engines.checks import Net, OwnSharding, Probe, Run, fit, weights_of


def prepare() -> None:
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def strategy_of(engine: str, **options):
    return FSDP2Strategy(**options) if engine == "fsdp2" else ZeroStrategy(stage=int(engine[-1]), **options)


def train(engine: str, folder: str, module: Net, **options):
    """A fit under the strategy with these options, every parameter cut under ZeRO-3."""
    run, strategy = Run(engine, Path(folder)), strategy_of(engine, **options)
    if engine == "zero_3":
        strategy.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return fit(run, module, Probe(), max_epochs=1, strategy=strategy)


# -- precision -----------------------------------------------------------------------------------------------------


def precision_in_the_flag(engine: str, folder: str, suffix: str, precision: str) -> None:
    """The flag alone trains as the Trainer's precision does."""
    if engine.startswith("zero"):
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True  # it says no on CPU, where it works
    found = fit(Run(f"{engine}_{suffix}", Path(folder)), Net(batches=3), Probe(), max_epochs=1)
    assert found.precision == precision
    options = {"precision": precision}
    if (engine, precision) == ("fsdp2", "16-mixed"):  # Lightning's Trainer would make bf16-mixed of it, on CPU
        options = {"plugins": [MixedPrecision(precision, "cpu")]}
    wanted = weights_of(fit(Run(engine, Path(folder)), Net(batches=3), Probe(), max_epochs=1, **options))
    for name, value in weights_of(found).items():
        assert torch.equal(value, wanted[name]), name


# -- offload -------------------------------------------------------------------------------------------------------


def offloaded(engine: str, folder: str) -> None:
    """The engine really offloads, and what it trains is what it trains without, bit for bit."""
    trainer = train(engine, folder, Net(batches=3), offload="cpu")
    assert offloads(trainer)
    plain = train(engine, folder, Net(batches=3))
    assert not offloads(plain)
    expected = weights_of(plain)
    for name, value in weights_of(trainer).items():
        assert torch.equal(value, expected[name]), name


def offloads(trainer) -> bool:
    from torch.distributed.fsdp import CPUOffloadPolicy

    strategy = trainer.strategy
    if isinstance(strategy, FSDP2Strategy):
        return isinstance(strategy._offload_policy(), CPUOffloadPolicy)
    optimizer = strategy.deepspeed_engine.optimizer
    if strategy.zero_stage_3:
        return bool(optimizer.offload_optimizer and optimizer.offload_param)
    return bool(optimizer.cpu_offload)


# -- activation checkpointing --------------------------------------------------------------------------------------


class Counted(Net):
    """Counts what its blocks compute. `frozen`: nothing before the blocks' inner layers needs a gradient."""

    def __init__(self, frozen: bool = False, dropout: float = 0.25) -> None:
        super().__init__(batches=4, optimizer="sgd")
        self.calls = 0
        for block in self.blocks:
            block.wide.register_forward_pre_hook(self._count)
            block.back = nn.Sequential(nn.Dropout(dropout), block.back)
        if frozen:
            self.requires_grad_(False)
            for block in self.blocks:
                block.wide.requires_grad_(True)

    def _count(self, *call) -> None:
        self.calls += 1

    def on_train_start(self):
        torch.manual_seed(7 + self.global_rank)


class Transformer(Net):
    """A Hugging Face model, its embeddings frozen."""

    def __init__(self) -> None:
        from transformers import GPT2Config, GPT2Model

        super().__init__(batches=4, optimizer="sgd")
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8, "vocab_size": 12}
        self.net = GPT2Model(GPT2Config(**sizes))
        self.calls, self.enter, self.blocks, self.head = 0, None, None, nn.Linear(16, 3)
        for embedding in (self.net.wte, self.net.wpe):
            embedding.requires_grad_(False)
        for block in self.net.h:
            block.mlp.c_fc.register_forward_hook(self._count)

    def _count(self, *call) -> None:
        self.calls += 1

    def forward(self, x):
        tokens = (x.abs() * 3).long().clamp(0, 11)
        return self.head(self.net(tokens).last_hidden_state[:, -1]) + self.offset

    def on_train_start(self):
        torch.manual_seed(7 + self.global_rank)


MODULES = {"all trained": Counted, "frozen embeddings": lambda: Counted(frozen=True), "hugging face": Transformer}


def checkpointed(engine: str, folder: str, module: str) -> None:
    """The same weights as without, and every block computed twice."""
    plain, again = MODULES[module](), MODULES[module]()
    start = {name: value.clone() for name, value in plain.state_dict().items()}
    expected = weights_of(train(engine, folder, plain))
    found = weights_of(train(engine, folder, again, activation_checkpointing="blocks"))
    for name, value in expected.items():
        assert torch.equal(found[name], value), f"{name}: {(found[name] - value).abs().max():.2e} off"
    assert any(not torch.equal(expected[name], start[name]) for name in dict(plain.named_parameters()))
    assert plain.calls == 8
    assert again.calls == 16


def is_wide(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear) and part.out_features == 33


def is_stack(part: nn.Module) -> bool:
    return isinstance(part, Stack)


class Stack(nn.Module):
    """Both blocks in one part, with what FSDP2 shards inside."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.items = blocks

    def forward(self, x):
        for block in self.items:
            x = block(x)
        return x


class Stacked(Counted):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Stack(self.blocks)])


# What to choose, of which module, and how often its inner layers are computed in 4 steps of 2 blocks.
POLICIES = {
    "by name": (["Block"], Counted, 16),
    "one layer of each block": (is_wide, Counted, 16),
    "both blocks as one": (is_stack, Stacked, 16),
    "another layer": (["Dropout"], Counted, 8),
    "of a hugging face model": (["GPT2Block"], Transformer, 16),
}


def checkpointed_parts(engine: str, folder: str, policy: str) -> None:
    """The same weights as without, what was chosen computed twice, and nothing else; as before in a second fit."""
    choice, build, calls = POLICIES[policy]
    plain, again = build(), build()
    expected = weights_of(train(engine, folder, plain))
    found = weights_of(train(engine, folder, again, activation_checkpointing=choice))
    for name, value in expected.items():
        assert torch.equal(found[name], value), f"{name}: {(found[name] - value).abs().max():.2e} off"
    assert (plain.calls, again.calls) == (8, calls)
    train(engine, folder, again, activation_checkpointing=choice)
    assert again.calls == 2 * calls
    if build is Transformer:
        assert again.net.config.use_cache is False


def policy_refusals(engine: str, folder: str) -> None:
    """On every rank, before the first step."""
    for choice, match in (
        (["Blok"], r"names 'Blok', which Counted does not contain\. It contains: Block, Dropout"),
        (is_stack, "activation_checkpointing='is_stack'` found no part in Counted"),
    ):
        with pytest.raises(MisconfigurationError, match=match):
            train(engine, folder, Counted(), activation_checkpointing=choice)
    module = Counted()
    train(engine, folder, module, activation_checkpointing=is_wide)
    for choice in ("blocks", ["Block"], is_stack):
        with pytest.raises(MisconfigurationError, match="earlier fit"):
            train(engine, folder, module, activation_checkpointing=choice)
    assert module.calls == 16


def checkpointed_twice(engine: str, folder: str) -> None:
    """A second fit of the same module computes each block twice, not thrice."""
    module = Counted()
    for calls in (16, 32):
        train(engine, folder, module, activation_checkpointing="blocks")
        assert module.calls == calls


def checkpointing_refusals(engine: str, folder: str) -> None:
    """No block to compute again, or a module that FSDP2 does not shard: an error on every rank."""
    with pytest.raises(MisconfigurationError, match="found no repeated block in Single"):
        train(engine, folder, Single(batches=1), activation_checkpointing="blocks")
    if engine == "fsdp2":
        for option in ({"activation_checkpointing": "blocks"}, {"offload": "cpu"}):
            with pytest.raises(MisconfigurationError, match=f"OwnSharding is sharded already.*{next(iter(option))}="):
                train(engine, folder, OwnSharding(batches=1), **option)


class Single(Net):
    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.blocks = nn.ModuleList([self.blocks[0]])
