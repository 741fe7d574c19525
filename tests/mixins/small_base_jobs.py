"""What processes do together in test_small_base_engines.py."""

from pathlib import Path

import lightning as L
import torch
from torch import nn

from lightning_tricks.engines import engine_of, whole
from lightning_tricks.errors import CheckpointError
from lightning_tricks.layers import packed_layers
from lightning_tricks.mixins import DoRA, LoRA
from tests.mixins.models import Classifier, Encoder, trainer

METHODS = {
    "LoRA": LoRA(rank=2, alpha=4.0, targets=("query", "value")),
    "DoRA": DoRA(rank=2, alpha=4.0, targets=("query", "value")),
}


class Small(Classifier):
    """The targets' weights in few bits; a norm is trained beside."""

    def __init__(self, base: str, method: str = "LoRA", base_seed: int = 0) -> None:
        L.LightningModule.__init__(self)
        self.encoder, self.head = Encoder(base_seed), nn.Linear(6, 4)
        self.adapt(self.encoder, METHODS[method], trainable=("norm",), base=base)


class Late(Classifier):
    """Builds and adapts in `configure_model`, where ZeRO-3 partitions weights as they are made."""

    def __init__(self, base: str, method: str = "LoRA", base_seed: int = 0) -> None:
        L.LightningModule.__init__(self)
        self.options, self.encoder = (base, method, base_seed), None

    def configure_model(self) -> None:
        if self.encoder is None:
            base, method, base_seed = self.options
            self.encoder = Encoder(base_seed)
            torch.manual_seed(1)
            self.head = nn.Linear(6, 4)
            self.adapt(self.encoder, METHODS[method], trainable=("norm",), base=base)


def fit_and_resume(
    strategy: str, devices: int, precision: str, base: str, folder: str, method: str = "LoRA", late: bool = False
) -> dict[str, object]:
    """Fit two epochs; fit one, save, and go on with the other. Leaves both outcomes, and the base, in `folder`."""
    build, checkpoint = Late if late else Small, Path(folder) / f"{strategy}.ckpt"

    def fit(name: str, epochs: int, module: L.LightningModule, resume: bool = False) -> L.Trainer:
        ours = trainer(strategy=strategy, devices=devices, precision=precision, max_steps=-1, max_epochs=epochs)
        ours.fit(module, ckpt_path=checkpoint if resume else None)
        weights = {key: tensor.clone() for key, tensor in engine_of(ours).named_full_weights()}
        packed = {path: whole(layer.kept).clone() for path, layer in packed_layers(module)}
        if ours.is_global_zero:
            torch.save(weights, Path(folder) / f"{name}.pt")
            torch.save(packed, Path(folder) / f"{name}_base.pt")
        return ours

    L.seed_everything(0, verbose=False)
    fit("straight", 2, module := build(base, method))
    held = {path: held_bytes(layer.kept) for path, layer in packed_layers(module)}
    L.seed_everything(0, verbose=False)
    fit("half", 1, build(base, method)).save_checkpoint(checkpoint)
    fit("resumed", 2, build(base, method), resume=True)
    refusals = []
    for other in (build(base, method, base_seed=1), build("bf16" if base == "nf4" else "nf4", method)):
        try:
            fit("other", 2, other, resume=True)
            refusals.append("none")
        except CheckpointError as error:
            refusals.append(str(error))
    return {"held": held, "refusals": refusals}


def held_bytes(parameter: nn.Parameter) -> int:
    """What this rank holds of it between steps."""
    if hasattr(parameter, "ds_tensor"):
        return int(parameter.ds_tensor.numel())
    return int(parameter.to_local().numel() if hasattr(parameter, "to_local") else parameter.numel())
