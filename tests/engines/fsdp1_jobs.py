"""What the engine of Lightning's FSDPStrategy must do, as jobs that a `Group` runs on two ranks.

torch's FSDP1 runs on CPUs, over gloo, when it is told the device; Lightning's strategy gives it a GPU's number. So the
strategy here is Lightning's own but for the device. `tests/gpu` runs Lightning's own.
"""

from contextlib import nullcontext
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from lightning_tricks.engines import engine_of, whole
from lightning_tricks.engines._flat import PRIVATE
from lightning_tricks.errors import UnsupportedError
from lightning_tricks.storage import WeightsFile
from tests.engines import checks


class CPUStrategy(FSDPStrategy):
    """Lightning's strategy, on CPUs."""

    def __init__(self, **options) -> None:
        super().__init__(**{"auto_wrap_policy": {checks.Block}, **options})

    def setup_environment(self) -> None:
        shape = self.kwargs.pop("device_mesh", None)  # Lightning makes a mesh of GPUs of it
        super().setup_environment()
        self.kwargs |= {} if shape is None else {"device_mesh": shape}

    def _setup_model(self, model):
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            return model  # as Lightning's does with what is wrapped already
        if isinstance(shape := self.kwargs.get("device_mesh"), list | tuple):
            self.kwargs["device_mesh"] = init_device_mesh("cpu", tuple(shape), mesh_dim_names=("replicate", "shard"))
        return FullyShardedDataParallel(
            module=model,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),
            **self.kwargs,
        )


class CPUScaling(FSDPPrecision):
    """Lightning's fp16, with a scaler for CPUs; FSDP1 itself casts the parameters, so that there is no autocast."""

    def __init__(self) -> None:
        super().__init__("16-mixed")
        self.scaler = ShardedGradScaler("cpu")

    def forward_context(self):
        return nullcontext()


class FSDP1Run(checks.Run):
    """The Trainer of a check, under FSDP1."""

    def __init__(self, folder: Path, **options) -> None:
        super().__init__("fsdp1", folder)
        self._options = options

    def trainer(self, *callbacks: L.Callback, **options) -> L.Trainer:
        plugins = {"plugins": [CPUScaling()]} if "plugins" in options else {}
        return super().trainer(*callbacks, **{"strategy": CPUStrategy(**self._options), **options, **plugins})


def run_check(check: str, folder: str, **options) -> None:
    getattr(checks, check)(FSDP1Run(Path(folder), **options))


def prepared(folder: str, module: L.LightningModule, *callbacks: L.Callback, **options) -> L.Trainer:
    trainer = FSDP1Run(Path(folder)).trainer(*callbacks, max_epochs=1, **options)
    trainer.fit(module)
    return trainer


def frozen_left_out(folder: str) -> None:
    """A frozen body that the module leaves out of its state dict is in no file; loading the file leaves it alone."""
    module = checks.Adapted(batches=2)
    trainer = prepared(folder, module)
    engine = engine_of(trainer)
    expected = set(checks.Adapted().state_dict())
    assert {name for name, _ in engine.named_full_weights()} == expected
    path = Path(folder) / "frozen.safetensors"
    engine.save_weights(path)
    assert set(WeightsFile(path).names) == expected
    before = checks.weights_of(trainer)
    shards = checks.shards_of(trainer)
    assert not any(name.startswith(("enter", "blocks.0")) for name in shards)
    engine.put_shards({name: torch.full_like(value, 2.0) for name, value in shards.items()})
    assert all((value == 2.0).all() for name, value in checks.weights_of(trainer).items() if "weight" in name)
    engine.load_weights(path)
    checks.same(checks.weights_of(trainer), before)


def signs_survive(folder: str) -> None:
    """What is gathered is bit for bit what the ranks hold: a negative zero stays one."""
    trainer = prepared(folder, checks.Net(batches=1))
    engine = engine_of(trainer)
    engine.put_shards({shard.name: torch.full_like(shard.values, -0.0) for shard in engine.named_shards()})
    found = {name: value for name, value in engine.named_full_weights() if name.endswith("weight")}
    assert len(found) > 3
    assert all(value.signbit().all() for value in found.values())


def shards_to_a_file(folder: str) -> None:
    """Values kept beside the shards, to one file and back."""
    trainer = prepared(folder, checks.Net(batches=1))
    engine, path = engine_of(trainer), Path(folder) / "shards.safetensors"
    values = {shard.name: shard.values * 3 for shard in engine.named_shards()}
    engine.save_shards(path, values)
    checks.same(engine.load_shards(path), values)
    full = {name: value for name, value in checks.weights_of(trainer).items() if name in WeightsFile(path).names}
    assert full.keys() == dict(checks.Net().named_parameters()).keys()
    for name, value in full.items():
        assert torch.equal(WeightsFile(path).tensor(name), value * 3), name


class Asked(L.Callback):
    """What the engine says it holds, with gradients at hand."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.memory, self.precision = engine_of(trainer).memory(), engine_of(trainer).precision()


def described(folder: str, precision: str) -> None:
    """Bytes are those of this rank's half, padding included; dtypes those that FSDP1 computes and reduces in."""
    asked = Asked()
    trainer = prepared(folder, checks.Net(batches=2), asked, precision=precision)
    flats = [unit._handle.flat_param for unit in FullyShardedDataParallel.fsdp_modules(trainer.strategy.model)]
    own = sum(flat.untyped_storage().nbytes() for flat in flats)
    whole = sum(parameter.numel() * 4 for parameter in checks.Net().parameters())
    assert whole / 2 <= own <= whole / 2 * 1.05
    assert (asked.memory.parameters.total, asked.memory.gradients.total) == (own, own)
    assert 2 * own * 0.9 <= asked.memory.optimizer.total <= 2 * own * 1.1
    low = (torch.bfloat16,) if precision == "bf16-mixed" else (torch.float32,)
    found = asked.precision
    assert (found.parameters, found.masters, found.compute, found.reduction) == ((torch.float32,), (), low, low)
    assert ("casts its float inputs to bf16" in found.batch) == (precision == "bf16-mixed")


def root_is_freed(folder: str) -> None:
    """An evaluation leaves the root gathered; what is written then is what the next forward pass computes with."""
    trainer = prepared(folder, checks.Scored(batches=2))
    handle, engine = trainer.strategy.model._handle, engine_of(trainer)
    trainer.strategy.model.eval()
    with torch.no_grad():
        trainer.strategy.model(torch.ones(2, 6))
    assert not handle.needs_unshard()
    engine.put_shards({shard.name: torch.zeros_like(shard.values) for shard in engine.named_shards()})
    assert handle.needs_unshard()
    with torch.no_grad():
        assert torch.equal(trainer.strategy.model(torch.ones(2, 6)), torch.full((2, 3), 0.25))


def refusals(folder: str) -> None:
    """What has no exact answer is refused on every rank, by name."""
    trainer = FSDP1Run(Path(folder), use_orig_params=False).trainer()
    with pytest.raises(UnsupportedError, match=r"one flat parameter hides .* leave `use_orig_params` out"):
        engine_of(trainer)
    outside = checks.Net(batches=1)
    run = FSDP1Run(Path(folder), ignored_states=list(outside.head.parameters()))
    trainer = run.trainer(checks.Probe(limit=1.0), max_epochs=1)
    with pytest.raises(UnsupportedError, match=r"`head.weight` is trained outside of every FSDP unit"):
        trainer.fit(outside)
    run = FSDP1Run(Path(folder), sharding_strategy="HYBRID_SHARD", device_mesh=(2, 1))
    trainer = run.trainer(checks.Probe(limit=1.0), max_epochs=1)
    with pytest.raises(UnsupportedError, match="torch then averages no gradient between the copies"):
        trainer.fit(checks.Net(batches=1))
    module = checks.Net(batches=1)
    trainer = prepared(folder, module)
    with pytest.raises(
        UnsupportedError, match=r"does not say what it is a piece of\. Instead, use .*named_full_weights"
    ):
        whole(module.head.weight)
    for owner, names in touched(trainer.strategy.model):
        assert [name for name in names if not hasattr(owner, name)] == []


def touched(root) -> list:
    """The objects whose private attributes the engine reads. When one is missing, look at `engines/_flat.py`."""
    unit, handle = root, root._handle
    return [(unit, PRIVATE["unit"]), (handle, PRIVATE["handle"]), (handle.flat_param, PRIVATE["flat_param"])]


class Clamp(L.Callback):
    """Clamps so that a single element of all ranks is outside, and then none."""

    def setup(self, trainer, pl_module, stage):
        engine_of(trainer)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None and p.grad.numel()]
        largest = torch.stack([gradient.abs().max() for gradient in gradients]).max()
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        engine, limit = engine_of(trainer), float(largest) * 0.999
        self.answers = [float(engine.clip_gradient_value(optimizer, limit)) for _ in range(2)]
        assert all(gradient.abs().max() <= limit * (1 + 1e-6) for gradient in gradients)


def values_clamped(folder: str) -> None:
    """All ranks hear of an element that one of them clamped."""
    clamp = Clamp()
    prepared(folder, checks.Net(batches=1), clamp)
    assert clamp.answers == [1.0, 0.0]
