"""What processes do together in test_adapter_places.py."""

import lightning as L

from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.mixins import LoRA
from tests.mixins.models import Classifier, Encoder, trainer


class Tried(Classifier):
    """Loads an adapter when the fit has begun, and notes the answer."""

    def __init__(self, folder: str, name: str) -> None:
        super().__init__()
        self.folder, self.name, self.answer = folder, name, "none"
        self.adapt(self.encoder, LoRA(rank=2, alpha=4.0), name="rest")
        self.use_adapters("default")

    def on_train_start(self) -> None:
        try:
            self.load_adapter(self.folder, module=self.encoder, name=self.name)
        except MisconfigurationError as error:
            self.answer = str(error)


class Late(Classifier):
    """Loads an adapter in `configure_model`, where ZeRO-3 partitions weights as they are made."""

    def __init__(self, folder: str) -> None:
        L.LightningModule.__init__(self)
        self.folder, self.encoder = folder, None

    def configure_model(self) -> None:
        from torch import nn

        if self.encoder is None:
            self.encoder, self.head = Encoder(), nn.Linear(6, 4)
            self.load_adapter(self.folder, module=self.encoder)


def load_too_late(strategy: str, devices: int, folder: str) -> dict[str, object]:
    """The answers to loading during a fit, and that loading in `configure_model` trains."""
    answers = {}
    for name in ("default", "rest", "new"):
        L.seed_everything(0, verbose=False)
        trainer(strategy=strategy, devices=devices, max_steps=1).fit(module := Tried(folder, name))
        answers[name] = module.answer
    ours = trainer(strategy=strategy, devices=devices, max_steps=1)
    ours.fit(Late(folder))
    return {**answers, "steps": ours.global_step}
