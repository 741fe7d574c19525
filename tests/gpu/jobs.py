"""What a process does for one GPU test: the conformance model, clipped, on one CUDA device."""

import lightning as L
import torch

from lightning_tricks.callbacks import GradientClipping
from lightning_tricks.engines import engine_of
from lightning_tricks.errors import UnsupportedError
from tests.conformance.fits import Recorder
from tests.conformance.model import Classifier, loader


class FusedClassifier(Classifier):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3, fused=True)


def fit(flag: str, precision: str, out: str, fused: bool = False) -> str:
    """Fit on the GPU; leaves weights and logged values in `out`. Returns the message of a refusal, or nothing."""
    L.seed_everything(0, verbose=False)
    recorder, module = Recorder(), FusedClassifier() if fused else Classifier()
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="gpu",
        devices=1,
        strategy=flag,
        precision=precision,
        callbacks=[GradientClipping(0.5)],
        logger=recorder,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(module, loader(54, 1))
    except UnsupportedError as error:
        return str(error)
    weights = {name: tensor.float().clone() for name, tensor in engine_of(trainer).named_full_weights()}
    torch.save({"weights": weights, "logged": recorder.series()}, out)
    return ""
