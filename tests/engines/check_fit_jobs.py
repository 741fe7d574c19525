"""What the check before a fit must do on real processes, as jobs that a `Group` runs on every rank."""

import warnings
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging, WeightAveraging

import lightning_tricks
from lightning_tricks import callbacks
from lightning_tricks.callbacks import GradientClipping
from lightning_tricks.engines import engine_of
from lightning_tricks.errors import DegradedWarning, TricksError
from tests.engines.checks import Net, Run
from tests.engines.option_jobs import prepare

__all__ = ["prepare"]


def refused(engine: str, folder: str, case: str) -> str:
    """What a fit raises on this rank, before the first step."""
    callbacks, options, section = CASES[case]
    trainer = Run(engine, Path(folder)).trainer(*(build() for build in callbacks), max_epochs=2, **options)
    if section:
        trainer.strategy.config.update({key: {"stage": int(engine[-1]), **value} for key, value in section.items()})
    module = Net(batches=2)
    with pytest.raises(TricksError) as caught:
        trainer.fit(module)
    assert int(module.seen) == 0
    assert f"{caught.value}" == f"{lightning_tricks.check(trainer, module).of('refused')[0].error}"
    return f"{caught.value}"


NVME = {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}}
CASES = {
    "value clipping": ([], {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}, {}),
    "two that clip": ([GradientClipping], {"gradient_clip_val": 0.5}, {}),
    "WeightAveraging": ([WeightAveraging], {}, {}),
    "StochasticWeightAveraging": ([lambda: StochasticWeightAveraging(1e-2)], {}, {}),
    "GradientAccumulationScheduler": ([lambda: GradientAccumulationScheduler({1: 2})], {}, {}),
    "averaging on NVMe": ([callbacks.WeightAveraging], {}, NVME),
}


class Watch(Callback):
    """Where DeepSpeed's masters stand at the end, and where the module does."""

    def on_train_end(self, trainer, module):
        self.masters = dict(engine_of(trainer).named_full_weights())["head.weight"]
        self.module = module.head.weight.detach().clone()


def averaged_beside_the_masters(engine: str, folder: str) -> bool:
    """What the check says of Lightning's WeightAveraging under ZeRO-1 and 2 is what happens. Warned on this rank?"""
    watch = Watch()
    trainer = Run(engine, Path(folder)).trainer(WeightAveraging(), watch, max_epochs=2, precision="bf16-mixed")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Net(batches=2))
    assert (watch.masters - watch.module).abs().max() > 1e-3
    return any(warning.category is DegradedWarning for warning in caught)


class Manual(Net):
    """Steps its one optimizer itself."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()


def manual_optimisation_clips(engine: str, folder: str) -> None:
    """Clipped steps taken by hand train what those taken by Lightning do, bit for bit."""
    found = []
    for module in (Manual(batches=3, optimizer="sgd"), Net(batches=3, optimizer="sgd")):
        trainer = Run(engine, Path(folder)).trainer(GradientClipping(0.1), max_epochs=1)
        assert lightning_tricks.check(trainer, module).verdict == "exact"
        trainer.fit(module)
        assert float(trainer.callback_metrics["grad_norm/clipped"]) == 1
        found.append(dict(engine_of(trainer).named_full_weights()))
    for name, value in found[0].items():
        assert value.equal(found[1][name]), name
