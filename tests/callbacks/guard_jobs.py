"""What NonFiniteGuard must do on every engine, as jobs that a `Group` runs on every rank."""

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_tricks.callbacks import GradientClipping, NonFiniteGuard
from lightning_tricks.engines import engine_of, ranks
from lightning_tricks.errors import NonFiniteError
from tests.engines.checks import BATCH, Net, Run, float_weights, fp16_options, scaler_state
from tests.engines.option_jobs import prepare

__all__ = ["prepare"]

FINE, LOSS, GRADIENT, LOSS_ALONE = range(4)  # what a row spoils: both, the gradient alone, or the loss alone
KINDS = {"loss": LOSS, "gradient": GRADIENT, "loss alone": LOSS_ALONE}


def spoil(loss: torch.Tensor, logits: torch.Tensor, kind: int) -> torch.Tensor:
    if kind == LOSS:
        return loss * float("nan")
    if kind == GRADIENT:
        return loss + (logits.sum() * 0).sqrt()  # 0, with the gradient inf * 0
    if kind == LOSS_ALONE:
        return loss * 0 + torch.tensor(float("inf"), device=loss.device)
    return loss


class Spoilt(Net):
    """Batches in order, without `left_out`; those in `bad` spoil the loss, on the last rank only."""

    def __init__(self, kind: int = LOSS, bad: tuple[int, ...] = (), left_out: tuple[int, ...] = (), batches: int = 8):
        super().__init__(batches=batches)
        self.normalise = nn.BatchNorm1d(6, affine=False)
        self.kind, self.bad, self.left_out = kind, bad, left_out

    def training_step(self, batch, index):
        inputs, targets, kinds = batch
        logits = self(self.normalise(inputs))
        return spoil(nn.functional.cross_entropy(logits.float(), targets), logits, int(kinds.max()))

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self):
        rank, world = ranks()
        generator = torch.Generator().manual_seed(3)
        inputs = torch.randn(self.batches, BATCH, 6, generator=generator)
        targets = torch.randint(3, (self.batches, BATCH), generator=generator)
        kinds = torch.zeros(self.batches, BATCH, dtype=torch.int64)
        kinds[list(self.bad), -1] = self.kind
        kept = [batch for batch in range(self.batches) if batch not in self.left_out]
        mine = [tensor[kept].unflatten(1, (world, -1))[:, rank].flatten(0, 1) for tensor in (inputs, targets, kinds)]
        return DataLoader(TensorDataset(*mine), batch_size=BATCH // world)


class Rates(L.Callback):
    """The learning rate of each step, and which were taken."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.applied: list[bool] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, index):
        if len(self.applied) < len(self.rates):
            self.applied.append(engine_of(trainer).was_step_applied())


def train(run: Run, module: L.LightningModule, *callbacks: L.Callback, **options) -> L.Trainer:
    trainer = run.trainer(*callbacks, **{"max_epochs": 1, "use_distributed_sampler": False, **options})
    trainer.fit(module)
    return trainer


def same_in_every_bit(found: L.Trainer, expected: L.Trainer) -> None:
    wanted = float_weights(expected)
    for name, value in float_weights(found).items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(value, wanted[name]), name
    (found,), (expected,) = found.lr_scheduler_configs, expected.lr_scheduler_configs
    assert found.scheduler.state_dict() == expected.scheduler.state_dict()
    assert found.frequency == expected.frequency == 1


def window_as_if_it_had_not_been(engine: str, folder: str, kind: str, precision: str) -> None:
    """C1, C3, C4: weights, moments, step counts, schedule and running statistics of a fit without the window."""
    run, guard, rates = Run(engine, Path(folder)), NonFiniteGuard(), Rates()
    options = {"accumulate_grad_batches": 2, "precision": precision}
    poisoned = Spoilt(KINDS[kind], bad=(2,))
    found = train(run, poisoned, GradientClipping(0.5), guard, rates, **options)
    assert rates.applied == [True, False, True, True]
    assert guard.skipped_steps == 1
    without = Rates()
    expected = train(run, Spoilt(left_out=(2, 3)), GradientClipping(0.5), without, **options)
    assert rates.rates[:1] + rates.rates[2:] == without.rates
    same_in_every_bit(found, expected)


class Tiny(Spoilt):
    """One layer, so that a thousand steps take seconds."""

    def __init__(self, **options):
        super().__init__(batches=1000, **options)
        self.enter, self.blocks, self.head = nn.Identity(), nn.ModuleList(), nn.Linear(6, 3)


def one_batch_in_a_thousand(engine: str, folder: str) -> None:
    """A NaN on the last rank in one batch of a thousand: the weights of a fit whose data lack that batch."""
    run, guard = Run(engine, Path(folder)), NonFiniteGuard(max_skips=1)
    found = train(run, Tiny(bad=(617,)), guard)
    assert (guard.skipped_steps, found.global_step) == (1, 1000)
    expected = train(run, Tiny(left_out=(617,)))
    assert expected.global_step == 999
    same_in_every_bit(found, expected)


def stops(engine: str, folder: str) -> None:
    """C4: an error on every rank that names the batches and the rank, and no step; the files hold them."""
    run, bad = Run(engine, Path(folder)), ranks()[1] - 1
    files = Path(folder) / engine / "files"
    guard, module = NonFiniteGuard(max_skips=1, dirpath=files), Spoilt(bad=(1, 4, 5))
    with pytest.raises(NonFiniteError, match=rf"2 steps .*batches 2 to 3 .*batches 4 to 5 .* rank {bad}\)\. Look"):
        train(run, Spoilt(bad=(2, 5)), NonFiniteGuard(max_skips=1), accumulate_grad_batches=2)
    with pytest.raises(NonFiniteError, match=rf"epoch 0, batch 4 \(the loss on rank {bad}\); epoch 0, batch 5"):
        train(run, module, guard)
    assert guard.skipped_steps == 3
    rank = ranks()[0]
    kept = sorted(file.name for file in files.glob(f"*-rank={rank}.pt"))
    assert kept == [f"skipped-epoch=0-batch={batch}-rank={rank}.pt" for batch in (1, 4, 5)]
    content = torch.load(files / kept[1], weights_only=True)
    assert content["batch_indices"] == [4]
    share = BATCH // ranks()[1]
    inputs = module.train_dataloader().dataset.tensors[0]
    assert torch.equal(content["batches"][0][0], inputs[4 * share : 5 * share])


class Big(Net):
    """A gradient that overflows in fp16 at the scaler's first scale, and a loss that is not finite later."""

    bad = -1

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        return loss * float("nan") if index == self.bad and ranks()[0] == ranks()[1] - 1 else loss

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Overflow(L.Callback):
    """Makes the scale too large for this step."""

    def __init__(self, step: int) -> None:
        self.step, self.states = step, []

    def on_train_batch_start(self, trainer, pl_module, batch, index):
        if index == self.step:
            pl_module.spread = 2.0**120
        self.states.append(scaler_state(trainer))


class Overflowing(Big):
    """At one step a factor whose gradient overflows, though the loss is finite."""

    spread = 1.0

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        spread, self.spread = self.spread, 1.0
        return loss if spread == 1 else loss + spread * (loss - loss.detach())


def scaled(engine: str, folder: str) -> None:
    """C2: an overflow is the scaler's affair, a loss that is not finite the guard's; both leave the schedule alone."""
    run, rates, guard = Run(engine, Path(folder)), Rates(), NonFiniteGuard(max_skips=1)
    module, overflow = Overflowing(batches=5, optimizer="sgd"), Overflow(1)
    module.bad = 3
    train(run, module, guard, rates, overflow, **fp16_options(run))
    assert rates.applied == [True, False, True, False, True]
    assert rates.rates == pytest.approx([0.1, 0.08, 0.08, 0.064, 0.064])
    assert guard.skipped_steps == 1
    assert overflow.states[2] != overflow.states[1]


def logged(engine: str, folder: str) -> None:
    """The running count, once a step."""
    run = Run(engine, Path(folder))
    logger = CSVLogger(Path(folder) / engine, name="", version="logged")
    train(run, Spoilt(bad=(1, 2)), NonFiniteGuard(), logger=logger, log_every_n_steps=1)
    if run.rank == 0:
        header, *rows = (Path(logger.log_dir) / "metrics.csv").read_text().split()
        place = header.split(",").index("skipped_steps")
        assert [float(row.split(",")[place]) for row in rows] == [0, 1, 2, 2, 2, 2, 2, 2]
