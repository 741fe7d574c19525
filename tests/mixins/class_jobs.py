"""What two processes do together in test_class_engines.py."""

import lightning as L
import torch
from torch import nn

from lightning_tricks.engines import ranks
from lightning_tricks.errors import DataError
from lightning_tricks.mixins import ClassWeightedLossMixin, LogitAdjusted
from tests.mixins.models import trainer

COUNTS = (50, 30, 20)


def validation() -> tuple[torch.Tensor, torch.Tensor]:
    """Ten samples, of which the first rank has seven: class 2 is on the second rank alone."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(10, 4, generator=generator), torch.tensor([0, 1, 0, 1, 1, 0, 0, 2, 2, 1])


class Validated(ClassWeightedLossMixin, L.LightningModule):
    """Each rank validates on its own part."""

    def __init__(self, bad: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.bad = nn.Linear(4, 3), bad
        self.weigh_classes(COUNTS, loss=LogitAdjusted())

    def training_step(self, batch, batch_idx):
        x, y = validation()
        if self.bad == ranks()[0]:
            y[3] = 7
        return self.class_weighted_loss(self.net(x.to(self.net.weight.dtype)), y)

    def validation_step(self, batch, batch_idx):
        x, y = validation()
        mine = (slice(0, 7), slice(7, None))[ranks()[0]]
        self.log("val/loss", self.class_weighted_loss(self.net(x[mine].to(self.net.weight.dtype)), y[mine]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(4, 1))

    def val_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(2, 1))


def recalls(strategy: str) -> dict[str, list[float] | float]:
    """Of a fit whose sanity check is of all that it validates on."""
    module = Validated()
    ours = trainer(strategy=strategy, devices=2, max_steps=2, num_sanity_val_steps=-1)
    ours.fit(module)
    rows = module.class_report()
    return {
        "before": [row.before for row in rows],
        "after": [row.after for row in rows],
        "loss": float(ours.callback_metrics["val/loss"]),
        "untrained": module._class_recalls.untrained,
    }


def a_wrong_target(strategy: str) -> str:
    """What each rank is told when one of them has a target that is no class."""
    try:
        trainer(strategy=strategy, devices=2, max_steps=2, num_sanity_val_steps=0).fit(Validated(bad=1))
    except DataError as error:
        return str(error)
    return "none"
