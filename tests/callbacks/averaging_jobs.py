"""What WeightAveraging must do on every engine, as jobs that a `Group` runs on every rank."""

import time
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

from lightning_tricks.callbacks import EMA, LAWA, EarlyStopping, WeightAveraging
from lightning_tricks.engines import engine_of, ranks, read_checkpoint
from tests.engines.checks import BATCH, Net, Run, loader, weights_of
from tests.engines.option_jobs import prepare, strategy_of

__all__ = ["prepare"]


class Validated(Net):
    """Also validates; raises after the optimizer step `break_at`."""

    break_at: int | None = None

    def validation_step(self, batch, index):
        if self.global_step == self.break_at:
            raise KeyError("broken")
        self.log("val/score", float(-abs(self.global_step - 4)), sync_dist=True)

    def val_dataloader(self):
        return loader(1)


class Trail(L.Callback):
    """The whole raw weights after each step, and those that each validation saw."""

    def __init__(self) -> None:
        self.raw, self.seen = [], []

    def on_train_batch_end(self, trainer, *_):
        self.raw.append(weights_of(trainer))

    def on_validation_end(self, trainer, *_):
        self.seen.append(weights_of(trainer))


def whole_strategy(engine: str):
    """Under ZeRO-3 every parameter is cut."""
    if not engine.startswith("zero"):
        return {}
    strategy = strategy_of(engine)
    if engine == "zero_3":
        strategy.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return {"strategy": strategy}


def fit(engine: str, folder: str, module: L.LightningModule, *callbacks: L.Callback, ckpt_path=None, **options):
    run = Run(engine, Path(folder))
    options = {"max_epochs": 2, "val_check_interval": 2, **whole_strategy(engine), **options}
    trainer = run.trainer(*callbacks, **options)
    trainer.fit(module, ckpt_path=None if ckpt_path is None else str(ckpt_path))
    return trainer


def ema(raw: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """In double precision."""
    found = {name: value.double() for name, value in raw[0].items()}
    for weights in raw[1:]:
        found = {name: decay * value + (1 - decay) * weights[name].double() for name, value in found.items()}
    return found


def same(found: dict[str, Tensor], expected: dict[str, Tensor], *, bits: bool = False) -> None:
    for name, value in found.items():
        wanted = expected[name]
        if name != "seen":
            close = torch.equal(value, wanted) if bits else torch.allclose(value.double(), wanted.double(), rtol=1e-5)
            assert close or (not bits and (value.double() - wanted.double()).abs().max() < 1e-6), name


def averages(engine: str, folder: str) -> None:
    """D4, D8, D10, D12: the one-process average; training goes on with the raw weights; one fp32 copy of the shards."""
    plain = Trail()
    fit(engine, folder, Validated(batches=4), plain)

    class Measure(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            held = sum(shard.values.numel() for shard in engine_of(trainer).named_shards())
            assert averaging._average.nbytes() == 4 * held

    trail, averaging = Trail(), WeightAveraging(EMA(0.5, warmup=0))
    trainer = fit(engine, folder, Validated(batches=4), trail, averaging, Measure())
    assert len(trail.raw) == averaging.updates == 8
    for found, expected in zip(trail.raw, plain.raw, strict=True):
        same(found, expected, bits=True)
    for index, seen in enumerate(trail.seen):
        same(seen, ema(trail.raw[: 2 * index + 2], 0.5))
    same(weights_of(trainer), ema(trail.raw, 0.5))


class Save(L.Callback):
    """A full checkpoint, in a validation, while the module holds the average; and the average by itself."""

    def __init__(self, folder: Path, averaging: WeightAveraging, step: int) -> None:
        self.folder, self.averaging, self.step = folder, averaging, step

    def on_validation_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.folder / "full.ckpt")
            trainer.save_checkpoint(self.folder / "weights.ckpt", weights_only=True)
            self.averaging.save_average(self.folder / "average.safetensors")


def saves(engine: str, folder: str) -> None:
    """D1, D2, D11: files of a fit; what they hold; and resumed from one written in a validation, the same bits."""
    place = Path(folder) / engine
    policy = LAWA(k=2)
    averaging, trail = WeightAveraging(policy, update_every=1), Trail()
    trainer = fit(engine, folder, Validated(batches=4), trail, averaging, Save(place, averaging, 4))
    if ranks()[0] == 0:
        same(read_checkpoint(place / "full.ckpt")["state_dict"], trail.raw[3], bits=True)
        weights = read_checkpoint(place / "weights.ckpt")
        same(weights["state_dict"], trail.seen[1], bits=True)
        assert weights["lightning_tricks"]["averaged"]["updates"] == "4"
        same(read_checkpoint(place / "average.safetensors")["state_dict"], trail.seen[1], bits=True)
    again, second = WeightAveraging(policy, update_every=1), Trail()
    resumed = fit(engine, folder, Validated(batches=4), second, again, ckpt_path=place / "full.ckpt")
    assert again.updates == averaging.updates == 8
    same(second.seen[-1], trail.seen[-1], bits=True)
    same(second.raw[-1], trail.raw[-1], bits=True)
    same(weights_of(resumed), weights_of(trainer), bits=True)

    class Tested(L.Callback):
        def on_test_start(self, trainer, *_):
            self.weights = weights_of(trainer)

    tested = Tested()
    resumed.callbacks.append(tested)
    resumed.test(Validated(batches=4), ckpt_path=str(place / "full.ckpt"), verbose=False)
    reference = trail.seen[1]
    if engine.startswith("zero_") and resumed.precision != "32-true":
        reference = {name: value.bfloat16().float() for name, value in reference.items()}
    same(tested.weights, reference)


def offloads(engine: str, folder: str) -> None:
    """An average in the host's memory is the same, bit for bit: in validations, files, a resumed fit and the result."""
    place = Path(folder) / engine

    def run(offload: bool, *callbacks: L.Callback, ckpt_path=None):
        averaging, trail = WeightAveraging(LAWA(k=2), update_every=1, offload=offload), Trail()
        save = [] if ckpt_path else [Save(place / f"offload {offload}", averaging, 4)]
        trainer = fit(engine, folder, Validated(batches=4), trail, averaging, *save, ckpt_path=ckpt_path)
        assert averaging.updates == 8
        return trail, weights_of(trainer)

    (there, result), (here, expected) = run(True), run(False)
    for found, wanted in zip([*there.raw, *there.seen, result], [*here.raw, *here.seen, expected], strict=True):
        same(found, wanted, bits=True)
    if ranks()[0] == 0:
        for name in ("weights.ckpt", "average.safetensors"):
            moved, kept = (read_checkpoint(place / f"offload {offload}" / name) for offload in (True, False))
            same(moved["state_dict"], kept["state_dict"], bits=True)
    for offload in (True, False):  # a checkpoint of either goes on as either
        again, end = run(offload, ckpt_path=place / f"offload {not offload}" / "full.ckpt")
        same(again.seen[-1], here.seen[-1], bits=True)
        same(end, expected, bits=True)


def reads_on_another_number(engine: str, folder: str) -> None:
    """D12: on this group's ranks, the average that another number of ranks saved; the checkpoint may have moved."""
    place = Path(folder) / engine
    moved = place / f"moved on {ranks()[1]}.ckpt"
    if ranks()[0] == 0:
        (place / "full.ckpt").rename(moved)

    class Compare(L.Callback):
        def on_train_start(self, trainer, *_):
            with averaging.applied():
                found = weights_of(trainer)
            same(found, read_checkpoint(place / "average.safetensors")["state_dict"], bits=True)
            assert averaging.updates == 4

    while not moved.exists():
        time.sleep(0.01)
    averaging = WeightAveraging(LAWA(k=2), update_every=1)
    fit(engine, folder, Validated(batches=4), averaging, Compare(), ckpt_path=moved, max_epochs=2)
    assert averaging.updates == 8


def broken_everywhere(engine: str, folder: str) -> None:
    """D3: the raw weights are back wherever no other rank is needed for it; a checkpoint saved now has them anyway."""
    rescue = Path(folder) / engine / "rescue.ckpt"

    class Rescue(L.Callback):
        def on_exception(self, trainer, *_):
            trainer.save_checkpoint(rescue)

    module, trail, averaging = Validated(batches=4), Trail(), WeightAveraging(EMA(0.5, warmup=0))
    module.break_at = 4
    run = Run(engine, Path(folder))
    options = {"max_epochs": 2, "val_check_interval": 2, **whole_strategy(engine)}
    rescued = engine in ("ddp", "zero_2")  # one engine of either kind
    trainer = run.trainer(*([Rescue()] if rescued else []), trail, averaging, **options)
    with pytest.raises(KeyError, match="broken"):
        trainer.fit(module)
    if engine == "zero_2":  # where the others are needed, and may be elsewhere: the module keeps the average
        same(weights_of(trainer), ema(trail.raw, 0.5))
        assert (weights_of(trainer)["enter.weight"] - trail.raw[-1]["enter.weight"]).abs().max() > 1e-4
    elif not engine.startswith("zero"):
        same(weights_of(trainer), trail.raw[-1], bits=True)
    if rescued and ranks()[0] == 0:
        same(read_checkpoint(rescue)["state_dict"], trail.raw[-1], bits=True)


def broken_on_one_rank(engine: str, folder: str) -> None:
    """D3: the rank that fails does not wait for the others, which are elsewhere."""
    last = ranks()[1] - 1
    raised = Path(folder) / engine / "raised"
    raised.parent.mkdir(exist_ok=True)

    class Elsewhere(L.Callback):
        """The other ranks: in the same validation, until the failed one has left it."""

        def on_validation_batch_start(self, trainer, *_):
            if trainer.global_rank == last:
                raise KeyError("broken")
            deadline = time.monotonic() + 20
            while not raised.exists():
                assert time.monotonic() < deadline, "the failed rank waits for this one"
                time.sleep(0.01)
            raise KeyError("broken too")

        def on_exception(self, trainer, *_):
            raised.touch()

    averaging = WeightAveraging(EMA(0.5))
    with pytest.raises(KeyError, match="broken"):
        fit(engine, folder, Validated(batches=2), averaging, Elsewhere())
    assert averaging.updates == 2


class Normalised(Validated):
    """With batch normalisation; each rank's batches are its part of the global ones, in order."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.normalise = nn.BatchNorm1d(6)

    def forward(self, x):
        return super().forward(self.normalise(x))

    def part(self, rank: int, world: int) -> DataLoader:
        generator = torch.Generator().manual_seed(3)
        inputs = torch.randn(self.batches, world, BATCH // world, 6, generator=generator) * 2 + 1
        targets = torch.randint(3, (self.batches, world, BATCH // world), generator=generator)
        mine = TensorDataset(inputs[:, rank].flatten(0, 1), targets[:, rank].flatten())
        return DataLoader(mine, batch_size=BATCH // world)

    def train_dataloader(self):
        return self.part(*ranks())


def statistics(engine: str, folder: str) -> None:
    """D9: torch's `update_bn` over the batches of all ranks gives the same; all ranks hold it."""
    trail, averaging = Trail(), WeightAveraging(EMA(0.5))
    options = {"use_distributed_sampler": False, "max_epochs": 1}
    trainer = fit(engine, folder, Normalised(batches=4), trail, averaging, **options)
    found, reference = weights_of(trainer), Normalised(batches=4)
    reference.load_state_dict(found)
    world = ranks()[1]
    update_bn((batch for rank in range(world) for batch in reference.part(rank, world)), reference)
    own = dict(trainer.lightning_module.named_buffers())
    for name in ("running_mean", "running_var"):
        value = getattr(reference.normalise, name)
        assert torch.allclose(found[f"normalise.{name}"], value, rtol=1e-4, atol=1e-5), name
        ours = next(buffer for key, buffer in own.items() if key.endswith(f"normalise.{name}"))
        assert torch.allclose(ours, value, rtol=1e-4, atol=1e-5), name
    assert found["normalise.num_batches_tracked"].dtype == torch.int64
    same(trail.seen[-1], found, bits=True)
    assert not torch.allclose(trail.raw[-1]["normalise.running_mean"], found["normalise.running_mean"], rtol=1e-3)


def with_early_stopping(engine: str, folder: str) -> None:
    """E6: what is restored is the average that was scored best."""
    trail, early = Trail(), EarlyStopping("val/score", mode="max", patience=9)
    trainer = fit(engine, folder, Validated(batches=4), early, trail, WeightAveraging(EMA(0.5)))
    assert early.best_step == 4
    same(weights_of(trainer), trail.seen[1], bits=True)
