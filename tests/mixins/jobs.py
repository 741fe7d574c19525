"""What two processes do together in test_engines.py."""

import logging
import warnings
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F

import lightning_tricks
from lightning_tricks.engines import engine_of, ranks
from lightning_tricks.errors import CheckpointError
from lightning_tricks.mixins import ClassWeightedLossMixin, LoRA
from tests.mixins.models import Classifier, Encoder, trainer


def quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


class Late(Classifier):
    """Builds and adapts its encoder in `configure_model`, where ZeRO-3 partitions weights as they are made."""

    def __init__(self, base_seed: int = 0) -> None:
        L.LightningModule.__init__(self)
        self.base_seed = base_seed
        self.encoder = None

    def configure_model(self) -> None:
        if self.encoder is None:
            self.encoder = Encoder(self.base_seed)
            torch.manual_seed(1)
            self.head = nn.Linear(6, 4)
            self.adapt(self.encoder, LoRA(rank=2, alpha=4.0), trainable=("pooler.bias",))


def adapt_and_resume(strategy: str, devices: int, precision: str, late: bool, folder: str) -> dict[str, str]:
    """Fit two epochs; fit one, save, and go on with the other. Leaves both outcomes in `folder`."""
    build = Late if late else Classifier
    checkpoint = Path(folder) / f"{strategy}.ckpt"

    def fit(name: str, epochs: int, module: L.LightningModule, resume: bool = False) -> L.Trainer:
        ours = trainer(strategy=strategy, devices=devices, precision=precision, max_steps=-1, max_epochs=epochs)
        ours.fit(module, ckpt_path=checkpoint if resume else None)
        weights = {key: tensor.clone() for key, tensor in engine_of(ours).named_full_weights()}
        if ours.is_global_zero:
            torch.save(weights, Path(folder) / f"{name}.pt")
        return ours

    L.seed_everything(0, verbose=False)
    fit("straight", 2, build())
    L.seed_everything(0, verbose=False)
    fit("half", 1, build()).save_checkpoint(checkpoint)
    fit("resumed", 2, build(), resume=True)
    try:
        fit("other", 2, build(base_seed=1), resume=True)
    except CheckpointError as error:
        return {"refusal": str(error)}
    return {"refusal": "none"}


class LowPrecisionBase(Classifier):
    """A bf16 base, as large models are loaded, with fp32 adapters beside it."""

    def __init__(self) -> None:
        L.LightningModule.__init__(self)
        self.encoder, self.head = Encoder().bfloat16(), nn.Linear(6, 4)
        self.adapt(self.encoder, LoRA(rank=2, alpha=4.0))

    def forward(self, x):
        return self.head(self.encoder(x.bfloat16()).float())


def adapt_low_precision(strategy: str) -> list[str]:
    """Three steps at `32-true`; returns the types of the adapters and of the base after them."""
    module = LowPrecisionBase()
    trainer(strategy=strategy, devices=2).fit(module)
    layer = module.encoder.layer[0].query
    return [str(layer.lora_A.dtype), str(layer.weight.dtype)]


class Weighted(ClassWeightedLossMixin, L.LightningModule):
    """One linear layer, one step on a batch that is spread unevenly."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(5, 3)
        self.weigh_classes([50, 30, 20])

    def training_step(self, batch, batch_idx):
        rank, world = ranks()
        x, y = uneven_batch()
        mine = slice(None) if world == 1 else (slice(0, 5), slice(5, None))[rank]
        y = torch.where(torch.arange(len(y)) >= 5, -100, y) if batch_idx == 1 else y  # rank 1 has no valid target
        loss = self.class_weighted_loss(self.net(x[mine].to(self.net.weight.dtype)), y[mine])
        self.log("loss", loss, sync_dist=True, on_step=True, on_epoch=False)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(3 * self.trainer.world_size, 1))


def uneven_batch():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(7, 5, generator=generator), torch.randint(0, 3, (7,), generator=generator)


class Losses(L.Callback):
    """Collects the logged losses."""

    def __init__(self) -> None:
        self.values = []

    def on_train_batch_end(self, trainer, *rest) -> None:
        self.values.append(float(trainer.callback_metrics["loss"]))


def weigh(strategy: str, devices: int, precision: str, folder: str) -> list[float]:
    """Three steps on the same uneven batch. Leaves the weights in `folder` and returns the logged losses."""
    L.seed_everything(0, verbose=False)
    losses = Losses()
    ours = trainer(strategy=strategy, devices=devices, precision=precision, max_steps=3, callbacks=[losses])
    ours.fit(Weighted())
    weights = {key: tensor.clone() for key, tensor in engine_of(ours).named_full_weights()}
    if ours.is_global_zero:
        torch.save(weights, Path(folder) / "weighted.pt")
    return losses.values


def expected_losses() -> tuple[list[float], dict[str, torch.Tensor]]:
    """What torch alone makes of it."""
    L.seed_everything(0, verbose=False)
    module, values = Weighted(), []
    x, y = uneven_batch()
    for step in range(3):
        targets = torch.where(torch.arange(len(y)) >= 5, -100, y) if step == 1 else y
        loss = F.cross_entropy(module.net(x), targets, weight=module.class_weights)
        module.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter -= 0.5 * parameter.grad
        values.append(loss.item())
    return values, {key: tensor.clone() for key, tensor in module.state_dict().items()}


class Resting(Classifier):
    """One adapter is trained, the other is at rest, with values of its own."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.adapt(self.encoder, LoRA(rank=2, targets=("pooler",)), name="second")
        generator = torch.Generator().manual_seed(seed)
        for block in self.encoder.layer:
            for parameter in (block.query.lora_A, block.query.lora_B, block.value.lora_A, block.value.lora_B):
                with torch.no_grad():
                    parameter.copy_(torch.randn(2, 6, generator=generator))


def rest_and_resume(strategy: str, folder: str) -> list[bool]:
    """Fit beside an adapter at rest, save, resume in a module whose adapter at rest has other values."""
    checkpoint = Path(folder) / "rest.ckpt"
    trainer(strategy=strategy, devices=2, max_steps=-1, max_epochs=1).fit(first := Resting(0))
    first.trainer.save_checkpoint(checkpoint)
    ours = trainer(strategy=strategy, devices=2, max_steps=-1, max_epochs=2)
    ours.fit(Resting(1), ckpt_path=checkpoint)
    found = {name: tensor.clone() for name, tensor in engine_of(ours).named_full_weights()}
    expected = {name: value for name, value in Resting(0).state_dict().items() if "encoder.layer" in name}
    at_rest = [torch.equal(found[name], value) for name, value in expected.items()]
    moved = float(found["encoder.pooler.lora_B_second"].abs().max()) > 0
    return [len(at_rest) == 10 and all(at_rest), moved, not any(name.endswith("query.weight") for name in found)]


def degraded_at_rest(strategy: str) -> list[str]:
    """What the check says of adapters at rest at bf16-mixed."""
    ours = trainer(strategy=strategy, devices=2, precision="bf16-mixed")
    return [found.why for found in lightning_tricks.check(ours, Resting()).of("degraded")]
