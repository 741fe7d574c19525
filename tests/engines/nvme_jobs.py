"""Swapping to NVMe, as jobs that a `Group` runs on every rank."""

import os
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

from lightning_tricks.engines import ZeroStrategy, engine_of
from lightning_tricks.errors import MisconfigurationError, MissingDependencyError, UnsupportedError
from lightning_tricks.storage import WeightsFile
from tests.engines import python_aio
from tests.engines.checks import Net, Probe, Run, fit, weights_of
from tests.engines.config_jobs import Stepless
from tests.engines.option_jobs import prepare  # noqa: F401  (a group runs it first)


class Wide(Net):
    """Has a layer large enough to be swapped: DeepSpeed leaves anything below 1 MiB where it is."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.large = nn.Sequential(nn.Linear(6, 1024), nn.Linear(1024, 1024), nn.Linear(1024, 6))

    def forward(self, x):
        return super().forward(x + self.large(x))


def train(folder: str, module: Net, strategy, ckpt_path=None, probe=None, **options):
    strategy.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    run = Run("zero_3", Path(folder))
    return fit(run, module, probe or Probe(), ckpt_path, **{"max_epochs": 1, "strategy": strategy, **options})


def refused(folder: str) -> None:
    """One rank's folder is missing, or its compiler: the same error on both, before the first step."""
    own = Path(folder) / f"of-rank-{os.environ['RANK']}"
    if os.environ["RANK"] == "0":
        own.mkdir(exist_ok=True)
    tools = Path(folder) / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "ninja").write_text("#!/bin/sh\n")
    (tools / "ninja").chmod(0o755)
    path = os.environ["PATH"]
    os.environ |= {"CXX": "true", "PATH": f"{tools}:{path}"}  # `true` builds everything
    with pytest.raises(MisconfigurationError, match=r"of-rank-1 to swap to does not exist: create it"):
        train(folder, Stepless(batches=1), ZeroStrategy(stage=3, offload=own))
    os.environ["CXX"] = "true" if os.environ["RANK"] == "0" else "no-such-compiler"
    with pytest.raises(MissingDependencyError, match=r"no C\+\+ compiler `no-such-compiler`: apt-get install g\+\+"):
        train(folder, Stepless(batches=1), ZeroStrategy(stage=3, offload=Path(folder)))
    os.environ["CXX"] = "false"  # builds nothing
    with pytest.raises(MissingDependencyError, match=r"needs libaio and its header.*: apt-get install libaio-dev"):
        train(folder, Stepless(batches=1), ZeroStrategy(stage=3, offload=Path(folder)))
    del os.environ["CXX"]
    os.environ["PATH"] = path


def swapped(folder: str, stand_in: bool) -> None:
    """Parameters and optimizer state really lie in files, and the weights are those of zero_3, bit for bit."""
    if stand_in:
        python_aio.install()
    swap = Path(folder) / "swap"
    swap.mkdir(exist_ok=True)
    probe, plain = Probe(), Probe()
    trainer = train(folder, Wide(batches=3), ZeroStrategy(stage=3, offload=swap), probe=probe)
    optimizer = trainer.strategy.deepspeed_engine.optimizer
    assert optimizer.swap_optimizer
    assert optimizer.params_in_nvme_and_cpu
    rank = os.environ["RANK"]
    files = [file for file in swap.rglob("*.swp") if f"rank{rank}" in str(file)]
    assert sum(file.stat().st_size for file in files) >= 4 * 4 * 1024 * 512, files
    expected = weights_of(train(folder, Wide(batches=3), ZeroStrategy(stage=3), probe=plain))
    found = weights_of(trainer)
    for name, value in expected.items():
        assert torch.equal(found[name], value), f"{name}: {(found[name] - value).abs().max():.2e} off"
    assert probe.norms == pytest.approx(plain.norms, rel=1e-6)
    with pytest.raises(UnsupportedError, match="the masters are swapped out"):
        list(engine_of(trainer).named_shards())
    path = Path(folder) / "whole.safetensors"
    engine_of(trainer).save_weights(path)
    for name, value in expected.items():
        assert torch.equal(WeightsFile(path).tensor(name), value), name
    with pytest.raises(UnsupportedError, match="the masters are swapped out"):
        engine_of(trainer).load_weights(path)
    with pytest.raises(UnsupportedError, match=r"Saving a checkpoint .* neither step counts"):
        trainer.save_checkpoint(Path(folder) / "half.ckpt")


def no_checkpoints(folder: str) -> None:
    """A callback that saves checkpoints, or one to resume from: refused before the first step."""
    python_aio.install()
    strategy = ZeroStrategy(stage=3, offload=Path(folder))
    with pytest.raises(UnsupportedError, match=r"ModelCheckpoint cannot .* pass `enable_checkpointing=False`, save"):
        train(folder, Stepless(batches=1), strategy, enable_checkpointing=True)
    strategy = ZeroStrategy(stage=3, offload=Path(folder))
    (Path(folder) / "some.ckpt").mkdir(exist_ok=True)
    with pytest.raises(UnsupportedError, match="Loading a checkpoint cannot run on zero_3 that swaps to NVMe"):
        train(folder, Stepless(batches=1), strategy, Path(folder) / "some.ckpt")


def built_late(folder: str) -> None:
    """A module built in `configure_model`, in bf16: the configuration says how large its buffers are."""
    python_aio.install()
    swap = Path(folder) / "swap"
    swap.mkdir(exist_ok=True)
    config = {"zero_optimization": {"offload_param": {"buffer_size": 2_000_000}}}
    swapping = ZeroStrategy(stage=3, offload=swap, config=config)
    found = weights_of(train(folder, Late(batches=2), swapping, precision="bf16-mixed"))
    expected = weights_of(train(folder, Late(batches=2), ZeroStrategy(stage=3), precision="bf16-mixed"))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


class Late(Wide):
    def __init__(self, batches: int) -> None:
        L.LightningModule.__init__(self)
        self.batches, self.optimizer, self.poison = batches, "adamw", None

    def configure_model(self):
        if not hasattr(self, "head"):
            built = Wide(batches=self.batches)
            for name, part in built.named_children():
                setattr(self, name, part)
            self.register_buffer("offset", torch.full((3,), 0.25))
            self.register_buffer("seen", torch.tensor(0))
