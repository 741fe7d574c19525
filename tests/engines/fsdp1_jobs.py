"""What the engine of Lightning's FSDPStrategy must do, as jobs that a `Group` runs on two ranks.

torch's FSDP1 runs on CPUs, over gloo, when it is told the device; Lightning's strategy gives it a GPU's number. So the
strategy here is Lightning's own but for the device. `tests/gpu` runs Lightning's own.
"""

from contextlib import nullcontext
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.plugins import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from tests.engines import checks


class CPUStrategy(FSDPStrategy):
    """Lightning's strategy, on CPUs."""

    def __init__(self, **options) -> None:
        super().__init__(**{"auto_wrap_policy": {checks.Block}, **options})

    def _setup_model(self, model):
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            return model  # as Lightning's does with what is wrapped already
        return FullyShardedDataParallel(
            module=model,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),
            **self.kwargs,
        )


class CPUScaling(FSDPPrecision):
    """Lightning's fp16, with a scaler for CPUs; FSDP1 itself casts the parameters, so that there is no autocast."""

    def __init__(self) -> None:
        super().__init__("16-mixed")
        self.scaler = ShardedGradScaler("cpu")

    def forward_context(self):
        return nullcontext()


class FSDP1Run(checks.Run):
    """The Trainer of a check, under FSDP1."""

    def __init__(self, folder: Path, **options) -> None:
        super().__init__("fsdp1", folder)
        self._options = options

    def trainer(self, *callbacks: L.Callback, **options) -> L.Trainer:
        plugins = {"plugins": [CPUScaling()]} if "plugins" in options else {}
        return super().trainer(*callbacks, **{"strategy": CPUStrategy(**self._options), **options, **plugins})


def run_check(check: str, folder: str, **options) -> None:
    getattr(checks, check)(FSDP1Run(Path(folder), **options))
