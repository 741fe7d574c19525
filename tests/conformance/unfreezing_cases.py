"""The matrix's row of LayerwiseUnfreezing."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_tricks.callbacks import GradientClipping, LayerwiseUnfreezing
from tests.conformance.model import Classifier

__all__ = ["check_layerwise_unfreezing", "is_still", "layerwise_unfreezing", "observe_layerwise_unfreezing"]


class Remembering(Classifier):
    """Knows what its layers were."""

    def __init__(self) -> None:
        super().__init__()
        self.first = {name: own.detach().clone() for name, own in self.named_parameters()}


def layerwise_unfreezing() -> Any:
    """A layer more at each epoch: the embedding's turn does not come. The module's schedule and AdamW's decay go on."""
    from tests.conformance.cases import Run

    tricks = (GradientClipping(0.4), LayerwiseUnfreezing(factor=2.6))
    return Run(Remembering(), tricks, trainer={"accumulate_grad_batches": 2})


def observe_layerwise_unfreezing(run: Any, trainer: L.Trainer) -> dict[str, Any]:
    return {"first": run.module.first, "layers": list(run.callbacks[1].layers)}


def is_still(value: Tensor, first: Tensor) -> bool:
    """In every bit, or in those that bf16 has: DeepSpeed's masters may begin there."""
    return torch.equal(value, first) or torch.equal(value, first.bfloat16().float())


def check_layerwise_unfreezing(outcome: dict[str, Any]) -> None:
    facts, logged = outcome["facts"], outcome["logged"]
    assert facts["layers"] == ["above the blocks", "encoder.blocks.1", "encoder.blocks.0", "below the blocks"]
    assert logged["unfreezing/layers"]["values"].tolist() == [1] * 4 + [2] * 4 + [3] * 4
    assert logged["grad_norm/clipped"]["values"].sum() > 0
    moved = {name for name, first in facts["first"].items() if not is_still(outcome["weights"][name], first)}
    assert set(facts["first"]) - moved == {"encoder.embedding.weight"}, "moved, or did not"
