"""LayerwiseUnfreezing on every engine, as jobs that a `Group` runs on every rank.

The reference is a loop of torch's own over whole batches, which thaws by `requires_grad` and gives a layer to its
optimizer when it thaws.
"""

from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_tricks.callbacks import GradientClipping, LayerwiseUnfreezing, Steps
from lightning_tricks.data import TricksDataLoader
from lightning_tricks.engines import engine_of, ranks
from lightning_tricks.engines._universal import _refuse_inexact
from lightning_tricks.errors import CheckpointError, MisconfigurationError
from tests.conformance.unfreezing_cases import is_still
from tests.engines.checks import BATCH, Block, Run, float_weights, fp16_options
from tests.engines.option_jobs import prepare
from tests.engines.part_clipping_jobs import strategy_of

__all__ = ["prepare"]

BATCHES, WINDOW, EPOCHS = 4, 2, 3  # two steps an epoch
RATE, DECAY, FACTOR, LIMIT = 2e-2, 0.3, 2.6, 0.6
LAYERS = ["head", "blocks.1", "blocks.0", "enter"]  # of which the last one stays frozen


class Net(L.LightningModule):
    """Odd widths, so that nothing divides evenly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.enter = nn.Linear(6, 11)
        self.blocks = nn.ModuleList([Block(11), Block(11)])
        self.head = nn.Linear(11, 3)

    def forward(self, x):
        hidden = self.enter(x)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self(batch[0]).float(), batch[1])

    def configure_optimizers(self):
        """Two groups of the user's own, and a schedule."""
        matrices = {"params": [own for name, own in self.named_parameters() if decays(name)]}
        vectors = {"params": [own for name, own in self.named_parameters() if not decays(name)], "weight_decay": 0.0}
        optimizer = torch.optim.AdamW([matrices, vectors], lr=RATE, weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, decay)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self):
        return TricksDataLoader(TensorDataset(*samples()), batch_size=BATCH // ranks()[1], shuffle=False, seed=0)


def decays(name: str) -> bool:
    """Under FSDP1 a shard does not tell a matrix from a vector."""
    return name.endswith("weight") and "norm" not in name


def decay(step: int) -> float:
    return 0.9**step


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(BATCHES * BATCH, 6, generator=generator)
    return inputs, (inputs @ torch.randn(6, 3, generator=generator)).argmax(-1)


def in_plain_torch() -> tuple[Net, list[float]]:
    module, inputs, targets, norms = Net(), *samples(), []
    layers = [
        [(f"{layer}.{name}", own) for name, own in module.get_submodule(layer).named_parameters()] for layer in LAYERS
    ]
    module.requires_grad_(False)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # of nothing yet
    for step in range(EPOCHS * BATCHES // WINDOW):
        thawed = 1 + step * WINDOW // BATCHES
        for depth, layer in enumerate(layers[:thawed]):
            if not layer[0][1].requires_grad:
                for name, own in layer:
                    own.requires_grad_(True)
                    kept = DECAY if decays(name) else 0.0
                    optimizer.add_param_group({"params": own, "weight_decay": kept, "share": FACTOR**-depth})
        for group in optimizer.param_groups[1:]:
            group["lr"] = RATE * group["share"] * decay(step)
        optimizer.zero_grad()
        for batch in range(WINDOW):
            at = BATCH * ((step * WINDOW + batch) % BATCHES)
            (module.training_step((inputs[at : at + BATCH], targets[at : at + BATCH]), 0) / WINDOW).backward()
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), LIMIT)))
        optimizer.step()
    return module, norms


class Record(L.Callback):
    def __init__(self, save: Path | None = None, at: int = 0) -> None:
        self.norms: list[float] = []
        self.save, self.at = save, at

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, index):
        if index % WINDOW == WINDOW - 1:
            self.norms.append(float(trainer.callback_metrics["grad_norm/total"]))
        if self.save is not None and (trainer.current_epoch, index) == (1, self.at):
            trainer.save_checkpoint(self.save)


def train(run: Run, *callbacks: L.Callback, path: Path | None = None, module: Net | None = None, **options):
    tricks = (LayerwiseUnfreezing(factor=FACTOR), GradientClipping(LIMIT))
    options = {"strategy": strategy_of(run.engine), "use_distributed_sampler": False, **options}
    trainer = run.trainer(*callbacks, *tricks, max_epochs=EPOCHS, accumulate_grad_batches=WINDOW, **options)
    trainer.fit(module or Net(), ckpt_path=path)
    return trainer


def step_counts(trainer) -> set[int]:
    """Those of Adam, of each layer that this rank steps a part of."""
    engine = getattr(trainer.strategy, "deepspeed_engine", None)
    optimizer = trainer.optimizers[0] if engine is None else engine.optimizer.optimizer
    return {int(state["step"]) for state in optimizer.state.values() if state}


def stood_still(trainer) -> bool:
    first = dict(Net().named_parameters())
    return all(is_still(value, first[name]) for name, value in float_weights(trainer).items() if "enter" in name)


def as_in_plain_torch(engine: str, folder: str) -> None:
    """Weights, the norm that clipping goes by, and step counts; the layer that is still frozen in every bit."""
    record = Record()
    trainer = train(Run(engine, Path(folder)), record)
    expected, norms = in_plain_torch()
    assert record.norms == pytest.approx(norms, rel=1e-4)
    assert sum(norm > LIMIT for norm in norms) > 0, f"nothing is clipped at {norms}"
    found = float_weights(trainer)
    for name, value in expected.named_parameters():
        off = float((found[name] - value).abs().max())
        assert off <= 2e-5 * float(value.abs().max()), f"{name} is {off:.1e} off"
    assert stood_still(trainer)
    assert step_counts(trainer) == {2, 4, 6}
    assert int(trainer.callback_metrics["unfreezing/layers"]) == EPOCHS


def interrupted(engine: str, folder: str, precision: str = "32-true") -> None:
    """In mid-epoch and in mid-window, while a part is frozen: every bit of a fit without interruption."""
    run, path = Run(engine, Path(folder)), Path(folder) / f"{engine}-{precision}.ckpt"
    whole = train(run, Record(path, at=1), precision=precision)
    wanted, counts = float_weights(whole), step_counts(whole)
    resumed = train(run, path=path, precision=precision)
    for name, value in float_weights(resumed).items():
        assert torch.equal(value, wanted[name]), name
    assert step_counts(resumed) == counts == {2, 4, 6}
    assert stood_still(resumed)


def scaled(engine: str, folder: str) -> None:
    """Under fp16's loss scale the frozen layers stand still, and what is thawed is that of full precision."""
    run = Run(engine, Path(folder))
    options = fp16_options(run)
    trainer = train(run, **{**options, "strategy": options.get("strategy", strategy_of(engine))})
    expected, _ = in_plain_torch()
    found = float_weights(trainer)
    for name, value in expected.named_parameters():
        assert float((found[name] - value).abs().max()) <= 5e-2 * float(value.abs().max()), name
    assert step_counts(trainer) == {2, 4, 6}


class Partly(L.Callback):
    """Leaves a part of what ZeRO steps in one piece out."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        engine_of(trainer).leave_out(optimizer, ["head.weight"])


def part_of_a_group(engine: str, folder: str) -> None:
    """The same error on every rank, and none waits."""
    run = Run(engine, Path(folder))
    trainer = run.trainer(Partly(), max_epochs=1, strategy=strategy_of(engine), use_distributed_sampler=False)
    with pytest.raises(MisconfigurationError, match=r"1 of the 6 parameters of group 0 .* ZeRO steps a group in one"):
        trainer.fit(Net())


def by_steps(engine: str, folder: str) -> None:
    """Every optimizer step a layer more, from the second one, until all are in training."""
    run = Run(engine, Path(folder))
    trick = LayerwiseUnfreezing(Steps(1), order=[["head", "blocks.1"], "blocks.0", "enter"])
    options = {"strategy": strategy_of(engine), "use_distributed_sampler": False}
    trainer = run.trainer(trick, max_epochs=1, **options)
    trainer.fit(Net())
    assert trick.thawed == 3
    assert step_counts(trainer) == {2, 3, 4}
    assert not stood_still(trainer)


def half_a_state(engine: str, folder: str) -> None:
    """A single file without the moments of frozen layers: torch cannot spread it over shards."""
    path = Path(folder) / "single.ckpt"
    train(Run("ddp", Path(folder)), Record(path, at=1))
    with pytest.raises(CheckpointError, match="single file without the moments of some parameters"):
        train(Run(engine, Path(folder)), path=path)


def other_ranks(engine: str, folder: str) -> None:
    """What DeepSpeed would convert for another number of ranks, and fail at."""
    path = Path(folder) / f"{engine}-frozen.ckpt"
    train(Run(engine, Path(folder)), Record(path, at=1))
    with pytest.raises(CheckpointError, match="some of its parameter groups have no moments yet, as layers that are"):
        _refuse_inexact(path)
