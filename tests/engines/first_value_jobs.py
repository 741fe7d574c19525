"""Where a model's first values come from, as jobs that a `Group` runs on every rank."""

import gc
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

from lightning_tricks.engines import FSDP2Strategy
from lightning_tricks.errors import MisconfigurationError
from tests.engines.checks import Block, Net, Probe, Run, fit, loader, weights_of
from tests.engines.option_jobs import prepare

__all__ = ["prepare"]


def train(run: Run, engine: str, module: L.LightningModule, **options) -> L.Trainer:
    strategy = {"hsdp": FSDP2Strategy(replicate=2), "one_device": "auto"}.get(engine, engine)
    return fit(run, module, Probe(limit=0.5), max_epochs=1, **{"strategy": strategy, **options})


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


# -- from rank 0 ---------------------------------------------------------------------------------------------------


class Seeded(Net):
    """Other values for each seed, buffers too. `late`: the head is made in `configure_model`."""

    def __init__(self, seed: int, late: bool) -> None:
        super().__init__(batches=3)
        torch.manual_seed(seed)
        self.seed, self.late, old = seed, late, self.head
        self.head = None if late else old
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn_like(parameter) / 4)
        self.offset += seed
        self.seen += seed

    def configure_model(self):
        if self.head is None:
            torch.manual_seed(self.seed)
            self.head = nn.Linear(11, 3)


def from_rank_zero(engine: str, folder: str, late: bool) -> None:
    """Ranks that draw other values train on rank 0's, parameters and buffers."""
    run = Run(engine, Path(folder))
    found = weights_of(train(run, engine, Seeded(run.rank, late)))
    same(found, weights_of(train(run, engine, Seeded(0, late))))


# -- tied weights --------------------------------------------------------------------------------------------------


class Tied(Net):
    """One weight under two names, made early or late."""

    def __init__(self, late: bool) -> None:
        super().__init__(batches=4)
        self.head = None
        if not late:
            self._tie()

    def configure_model(self):
        if self.head is None:
            self._tie()

    def _tie(self):
        torch.manual_seed(3)
        self.head, self.back = nn.Linear(11, 3), nn.Linear(6, 11, bias=False)
        self.back.weight = self.enter.weight

    def forward(self, x):
        return super().forward(x + self.back(x)[:, :6])


def tied(engine: str, folder: str, late: bool) -> None:
    """One parameter in training, under both names, with the gradient of both uses."""
    run, module, ties = Run(engine, Path(folder)), Tied(late), []
    module.on_before_optimizer_step = lambda *_: ties.append(module.back.weight is module.enter.weight)
    trainer = train(run, engine, module)
    assert ties == [True] * 4
    weights = weights_of(trainer)
    assert torch.equal(weights["back.weight"], weights["enter.weight"])
    values = {name: value for name, value in weights.items() if value.is_floating_point()}
    run.compare(f"tied-{late}", values, 2e-5)


# -- from the meta device ------------------------------------------------------------------------------------------


class Offset(nn.Module):
    """A buffer and a statistic of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.empty(3))
        self.norm = nn.BatchNorm1d(3)
        self.reset_parameters()

    def reset_parameters(self):
        self.offset.fill_(0.25)

    def forward(self, x):
        return self.norm(x) + self.offset


class Modest(L.LightningModule):
    """Every layer says what its values are at first; the last shares the first one's weight."""

    def __init__(self, width: int = 11, blocks: int = 2) -> None:
        super().__init__()
        self.enter = nn.Linear(6, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.back = nn.Linear(6, width)
        self.back.weight = self.enter.weight
        self.head, self.end = nn.Linear(width, 3), Offset()

    def training_step(self, batch, index):
        hidden = self.enter(batch[0])
        for block in self.blocks:
            hidden = block(hidden)
        return nn.functional.cross_entropy(self.end(self.head(hidden + self.back(batch[0]))), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self):
        return loader(3)


def reset(module: nn.Module) -> None:
    """What one device makes of a module, layer by layer; a weight that comes again keeps its first values."""
    torch.manual_seed(5)
    kept = {}
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
            with torch.no_grad():
                for parameter in part.parameters(recurse=False):
                    parameter.copy_(kept.setdefault(parameter, parameter.clone()))


def from_meta(engine: str, folder: str, offload: str | None = None) -> None:
    """Trained from the meta device as from the values that one device gives; equal seeds on all ranks, then others."""
    run = Run("fsdp2", Path(folder))
    options = {"offload": offload, "replicate": 2 if engine == "hsdp" else 1}
    plain = Modest()
    reset(plain)
    wanted = weights_of(train(run, engine, plain, strategy=FSDP2Strategy(**options)))
    for seed in (5, 5 + run.rank):
        with torch.device("meta"):
            module = Modest()
        torch.manual_seed(seed)
        trainer = train(run, engine, module, strategy=FSDP2Strategy(**options))
        same(weights_of(trainer), wanted)
        assert module.back.weight is module.enter.weight


class Watched(nn.Linear):
    """Notes how many bytes of tensors the process holds whenever a layer gets its values."""

    held: list[int]

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if not self.weight.is_meta:
            self.held.append(bytes_held())


def bytes_held() -> int:
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and type(thing) in (torch.Tensor, nn.Parameter) and not thing.is_meta:
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def never_whole(folder: str) -> None:
    """While it is made, a rank holds its shards and one layer at most: half the model and a bit, on two ranks."""
    run, layers, width = Run("fsdp2", Path(folder)), 16, 64
    Watched.held = []
    with torch.device("meta"):
        module = Modest()
        module.blocks = nn.ModuleList(nn.Sequential(Watched(width, width, bias=False)) for _ in range(layers))
        module.enter, module.back, module.head = nn.Linear(6, width), nn.Linear(6, width), nn.Linear(width, 3)
    gc.collect()
    before = bytes_held()
    train(run, "fsdp2", module, max_steps=1)
    layer = 4 * width * width
    most = max(Watched.held) - before
    assert len(Watched.held) == layers
    assert layers / 2 * layer <= most <= (layers / 2 + 2.5) * layer, most / layer


def meta_refused(folder: str) -> None:
    """A layer that does not say what its values are is named, on every rank, before anything is sharded."""
    run = Run("fsdp2", Path(folder))
    with torch.device("meta"):
        whole, layer = Net(batches=1), Modest()
        layer.end.norm.register_module("scale", Scale())
    for module, name in ((whole, "Net"), (layer, r"`end\.norm\.scale` \(Scale\)")):
        with pytest.raises(MisconfigurationError, match=rf"{name} has a parameter or buffer on the meta device and no"):
            train(run, "fsdp2", module)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(2))
