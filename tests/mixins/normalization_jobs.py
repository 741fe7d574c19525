"""Losses over windows of ragged micro-batches: what ranks do together, and what torch alone makes of one big batch."""

import logging
import os
import warnings
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F

import lightning_tricks  # registers the strategy flags
from lightning_tricks.callbacks import GradientClipping, GradientNormMonitor, NonFiniteGuard
from lightning_tricks.engines import engine_of, ranks
from lightning_tricks.errors import NonFiniteError
from lightning_tricks.functional import per_token
from lightning_tricks.mixins import (
    ClassWeightedLossMixin,
    CrossEntropy,
    Focal,
    LogitAdjusted,
    LossNormalizationMixin,
)
from tests.mixins.models import trainer

WINDOW, SEQUENCES, TOKENS, CLASSES = 2, 4, 6, 3
# How many tokens of each sequence count, by micro-batch: two sequences a rank. Windows of two, the last cut short.
LENGTHS = (
    ((6, 5), (1, 0)),
    ((2, 6), (0, 0)),  # none on the second rank
    ((0, 0), (0, 0)),  # none at all
    ((1, 1), (6, 6)),
    ((0, 0), (0, 0)),  # a window with none at all
    ((0, 0), (0, 0)),
    ((3, 1), (0, 2)),
)
COUNTS = (50, 30, 20)  # of the classes
LIMIT = 0.25  # below the norms of some windows, above those of others
RATE, MOMENTUM, DECAY = 0.4, 0.9, 0.8


def quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def micro_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs (sequences, tokens, 5), and targets (sequences, tokens), -100 where a token does not count."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for lengths in LENGTHS:
        inputs = torch.randn(SEQUENCES, TOKENS, 5, generator=generator)
        targets = torch.randint(CLASSES, (SEQUENCES, TOKENS), generator=generator)
        counts = torch.tensor(lengths).flatten()
        found.append((inputs, targets.masked_fill(torch.arange(TOKENS) >= counts[:, None], -100)))
    return found


class Tagger(L.LightningModule):
    """Plain Lightning: each rank's micro-batch has a mean of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, CLASSES))
        self.told: list[float] = []

    def loss(self, logits, targets):
        valid = (targets != -100).sum()
        return F.cross_entropy(logits, targets, reduction="sum") / valid.clamp(min=1)

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        loss = self.loss(self.net(inputs.to(self.net[0].weight.dtype)).float().transpose(1, 2), targets)
        self.log("loss", loss)
        self.told.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=RATE, momentum=MOMENTUM)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, DECAY)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self):
        rank, world = ranks()
        mine = slice(rank * SEQUENCES // world, (rank + 1) * SEQUENCES // world)
        return torch.utils.data.DataLoader([(x[mine], y[mine]) for x, y in micro_batches()], batch_size=None)


class Normalized(LossNormalizationMixin, Tagger):
    def loss(self, logits, targets):
        losses = F.cross_entropy(logits, targets, reduction="none")
        return self.normalized_loss(*per_token(losses, targets != -100))


class Weighted(ClassWeightedLossMixin, Tagger):
    def __init__(self) -> None:
        super().__init__()
        self.weigh_classes(COUNTS)

    def loss(self, logits, targets):
        return self.class_weighted_loss(logits, targets)


class Both(LossNormalizationMixin, Weighted):
    """The second names the first's base too."""


class HardOnes(Weighted):
    def __init__(self) -> None:
        super().__init__()
        self.weigh_classes(COUNTS, loss=Focal(2.0))


class Smoothed(Weighted):
    def __init__(self) -> None:
        super().__init__()
        self.weigh_classes(COUNTS, loss=CrossEntropy(label_smoothing=0.1))


class Adjusted(Weighted):
    def __init__(self) -> None:
        super().__init__()
        self.weigh_classes(COUNTS, loss=LogitAdjusted(1.0))


class Labels(Weighted):
    """Each class as a label of its own that a token has or not."""

    def __init__(self) -> None:
        super().__init__()
        self.weigh_classes([[100 - count, count] for count in COUNTS], loss=Focal(2.0))

    def loss(self, logits, targets):
        return self.class_weighted_loss(*as_labels(logits, targets))


def as_labels(logits, targets):
    """Of shape (tokens, classes)."""
    held = F.one_hot(targets.clamp_min(0), CLASSES).masked_fill((targets == -100).unsqueeze(-1), -100)
    return logits.transpose(1, 2).reshape(-1, CLASSES), held.reshape(-1, CLASSES)


MODULES = {
    "plain": Tagger,
    "tokens": Normalized,
    "classes": Weighted,
    "both": Both,
    "focal": HardOnes,
    "smoothed": Smoothed,
    "adjusted": Adjusted,
    "labels": Labels,
}


class Seen(L.Callback):
    """What callbacks are told of losses and norms."""

    def __init__(self) -> None:
        self.outputs, self.logged, self.norms, self.applied = [], [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.outputs.append(float(outputs["loss"]))
        if not trainer.fit_loop._should_accumulate():
            self.logged.append(float(trainer.callback_metrics["loss"]))
            self.norms.append(float(trainer.callback_metrics.get("grad_norm/total", 0)))
            self.applied.append(engine_of(trainer).was_step_applied())


def fit(strategy: str, kind: str, precision: str, folder: str, clip: bool = False) -> dict:
    """Two epochs. Leaves the weights in `folder`; returns what callbacks saw, and how often a warning was given."""
    module, seen = MODULES[kind](), Seen()
    clipping = [GradientClipping(LIMIT), GradientNormMonitor()] if clip else []
    fp16 = precision == "16-mixed"
    ours = trainer(
        strategy=strategy,
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        precision=None if fp16 else precision,
        plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))] if fp16 else None,
        max_steps=-1,
        max_epochs=2,
        accumulate_grad_batches=WINDOW,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        callbacks=[seen, *clipping],
    )
    callbacks = {type(one).__name__ for one in ours.callbacks}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        ours.fit(module)
    weights = {key: tensor.clone() for key, tensor in engine_of(ours).named_full_weights()}
    if ours.is_global_zero:
        torch.save(weights, Path(folder) / "weights.pt")
    assert {type(one).__name__ for one in ours.callbacks} == callbacks, "the window has stayed in the Trainer's list"
    return {
        "told": module.told,
        "outputs": seen.outputs,
        "logged": seen.logged,
        "norms": seen.norms,
        "applied": seen.applied,
        "warnings": sum("a sum over nothing" in str(one.message) for one in warned),
        "rate": ours.optimizers[0].param_groups[0]["lr"],
    }


def expected(kind: str, clip: bool = False) -> dict:
    """What torch alone makes of it, with one big batch for each window."""
    module = Tagger()
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, DECAY)
    losses, norms = [], []
    for _ in range(2):
        batches = micro_batches()
        for start in range(0, len(batches), WINDOW):
            inputs, targets = (torch.cat(parts) for parts in zip(*batches[start : start + WINDOW], strict=True))
            if not (targets != -100).any():
                continue
            optimizer.zero_grad()
            loss = written_out(kind, module.net(inputs).transpose(1, 2), targets)
            loss.backward()
            norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), LIMIT if clip else 1e9)))
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
    weights = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    return {"losses": losses, "norms": norms, "weights": weights, "rate": optimizer.param_groups[0]["lr"]}


def written_out(kind: str, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean loss of one big batch, as torch or the paper has it."""
    weight = torch.tensor([sum(COUNTS) / (3 * count) for count in COUNTS])
    if kind == "tokens":
        return F.cross_entropy(logits, targets)
    if kind == "adjusted":
        prior = (torch.tensor(COUNTS) / sum(COUNTS)).log()
        return F.cross_entropy(logits + prior[:, None], targets)
    if kind == "focal":
        kept, scores = targets[targets >= 0], logits.transpose(1, 2)[targets >= 0]
        p = scores.softmax(1).gather(1, kept[:, None]).squeeze(1)
        return (weight[kept] * (1 - p) ** 2 * -p.log()).sum() / weight[kept].sum()
    if kind == "labels":
        scores, held = (part[(targets >= 0).flatten()] for part in as_labels(logits, targets))
        rare = torch.tensor([100 / (2 * count) for count in COUNTS])
        weights = torch.where(held == 1, rare, torch.tensor([100 / (2 * (100 - count)) for count in COUNTS]))
        p = torch.where(held == 1, scores.sigmoid(), 1 - scores.sigmoid())
        return (weights * (1 - p) ** 2 * -p.log()).sum() / weights.sum()
    return F.cross_entropy(logits, targets, weight=weight, label_smoothing=0.1 if kind == "smoothed" else 0.0)


def poisoned(strategy: str) -> str:
    """What a guard says of a loss that is not finite on the last rank."""

    class Poisoned(Normalized):
        def loss(self, logits, targets):
            bad = self.trainer.fit_loop.batch_idx == 0 and ranks()[0] == ranks()[1] - 1
            return super().loss(logits * float("nan") if bad else logits, targets)

    options = {"devices": int(os.environ.get("WORLD_SIZE", 1)), "use_distributed_sampler": False, "max_steps": -1}
    ours = trainer(
        strategy=strategy,
        callbacks=[NonFiniteGuard(max_skips=0)],
        accumulate_grad_batches=WINDOW,
        max_epochs=1,
        **options,
    )
    try:
        ours.fit(Poisoned())
    except NonFiniteError as error:
        return str(error)
    return "none"


def fail(strategy: str, fault: str) -> str:
    """What one rank is told when something is wrong on the other."""

    class Faulty(Normalized):
        def loss(self, logits, targets):
            bad = ranks()[0] == ranks()[1] - 1
            total = logits.sum()
            if fault == "no gradient" and bad:
                total = total.detach()
            return self.normalized_loss(total, {"negative": -1, "infinite": float("inf")}.get(fault, 1) if bad else 3)

    ours = trainer(strategy=strategy, devices=int(os.environ.get("WORLD_SIZE", 1)), use_distributed_sampler=False)
    try:
        ours.fit(Faulty())
    except lightning_tricks.errors.TricksError as error:
        return str(error)
    return "none"
