"""Values beside the shards, in files, as jobs that a `Group` runs on every rank."""

import errno
import os
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_tricks.engines import Engine, Shard, engine_of
from lightning_tricks.errors import CheckpointError, MisconfigurationError
from lightning_tricks.storage import WeightsFile, weights_file
from tests.engines.checks import Net, Run
from tests.engines.option_jobs import prepare, strategy_of

__all__ = ["prepare"]


def derived(values: Tensor) -> Tensor:
    """Something else in each place, bits that sums lose included."""
    halves = values * 0.5
    halves[values < 0] = -0.0
    halves[values > 0.3] = float("nan")
    return halves


def bits(values: Tensor) -> Tensor:
    return values.detach().cpu().view(torch.int32)


class Live(L.Callback):
    """Calls a function with the engine after the second step."""

    def __init__(self, function) -> None:
        self.function = function

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, index):
        if trainer.global_step == 2:
            self.function(engine_of(trainer))


def live(engine: str, folder: str, function, module: Net | None = None) -> None:
    """Train two steps; under ZeRO-3 every parameter is cut."""
    strategy = engine
    if engine.startswith("zero"):
        strategy = strategy_of(engine)
        if engine == "zero_3":
            strategy.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    trainer = Run(engine, Path(folder)).trainer(Live(function), max_epochs=1, strategy=strategy)
    trainer.fit(module or Net(batches=2))


def path_of(folder: str) -> Path:
    return Path(folder) / "averages.safetensors"


def save(engine: str, folder: str) -> None:
    """The values of each part, and the whole weights that they come from, for comparison."""

    def write(found: Engine) -> None:
        values = {shard.name: derived(shard.values) for shard in found.named_shards()}
        found.save_shards(path_of(folder), values, {"updates": "2"})
        found.save_weights(Path(folder) / "weights.safetensors")

    live(engine, folder, write)


def load(engine: str, folder: str) -> None:
    """On this group's ranks: the very bits, in each part's place."""
    live(engine, folder, lambda found: compare(found, folder))


def compare(found: Engine, folder: str) -> None:
    weights, loaded = WeightsFile(Path(folder) / "weights.safetensors"), found.load_shards(path_of(folder))
    shards = {shard.name: shard for shard in found.named_shards()}
    assert loaded.keys() == shards.keys()
    for name, shard in shards.items():
        expected = derived(weights.elements(name, shard.start, shard.stop))
        assert torch.equal(bits(loaded[name]), bits(expected)), name
        assert loaded[name].dtype == torch.float32
    assert WeightsFile(path_of(folder)).metadata == {"updates": "2"}
    assert cut(found, shards) == (found.world_size > 1 and found.name != "ddp")


def cut(found: Engine, shards: dict[str, Shard]) -> bool:
    """Whether some rank holds less than all."""
    held = sum(shard.values.numel() for shard in shards.values())
    return held < sum(parameter.numel() for parameter in Net().parameters())


def faults(engine: str, folder: str) -> None:
    """On every rank, and a file that was there stays as it was."""
    live(engine, folder, lambda found: refuse_all(found, folder))


def refuse_all(found: Engine, folder: str) -> None:
    path, last = path_of(folder), found.rank == found.world_size - 1
    values = {shard.name: shard.values.clone() for shard in found.named_shards()}
    found.save_shards(path, values)
    before = path.read_bytes()
    name = next(iter(values))
    wrong: list[dict[str, Tensor]] = [
        {other: value for other, value in values.items() if other != name},
        {**values, "stranger": values[name]},
        {**values, name: values[name][1:]},
        {**values, name: values[name].double()},
    ]
    for given in wrong:
        with pytest.raises(MisconfigurationError, match="The shards to save do not fit: "):
            found.save_shards(path, given if last else values)
    with full_disk(), pytest.raises((OSError, CheckpointError), match=r"No space left|rank 0 could not write"):
        found.save_shards(path, values)
    found.barrier()
    assert path.read_bytes() == before
    assert not list(path.parent.glob(f".{path.name}*"))
    for content in (before[:-1], before[:20]):
        truncated = Path(folder) / f"truncated{found.rank}.safetensors"
        truncated.write_bytes(content)
        with pytest.raises(CheckpointError, match="truncated"):
            found.load_shards(truncated)
    with pytest.raises(CheckpointError, match="there is no weights file"):
        found.load_shards(Path(folder) / "absent.safetensors")


class full_disk:  # noqa: N801
    """No file can be flushed."""

    def __enter__(self) -> None:
        self.fsync = os.fsync
        weights_file.os.fsync = self._raise

    def __exit__(self, *error) -> None:
        weights_file.os.fsync = self.fsync

    def _raise(self, descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


class Frozen(Net):
    def __init__(self) -> None:
        super().__init__(batches=2)
        self.blocks[0].requires_grad_(False)


def other_module(engine: str, folder: str) -> None:
    """The first name that differs is in the message."""

    def read(found: Engine) -> None:
        with pytest.raises(CheckpointError, match=r"`blocks\.0\.norm\.weight` is of shape .11. in the file and absent"):
            found.load_shards(path_of(folder))

    live(engine, folder, read, Frozen())
