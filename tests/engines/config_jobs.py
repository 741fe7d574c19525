"""What a DeepSpeed configuration of the user's own must do, as jobs that a `Group` runs on every rank."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_tricks.callbacks import FixedNorm, GradientClipping
from lightning_tricks.engines import FSDP2Strategy, ZeroStrategy
from lightning_tricks.errors import MisconfigurationError, UnsupportedError
from tests.engines.checks import BATCH, Net, Probe, Run, weights_of
from tests.engines.option_jobs import prepare  # noqa: F401  (a group runs it first)


def train(folder: str, module: Net, config=None, callbacks=(), strategy=None, **options):
    strategy = strategy or ZeroStrategy(config=config)
    run = Run("zero", Path(folder))
    trainer = run.trainer(Probe(), *callbacks, **{"max_epochs": 1, "strategy": strategy, **options})
    trainer.fit(module)
    return trainer


# -- the configuration ---------------------------------------------------------------------------------------------

WHOLE = {
    "train_batch_size": 2 * BATCH,
    "train_micro_batch_size_per_gpu": BATCH // 2,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.5,
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": False, "initial_scale_power": 7},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "betas": [0.9, 0.999], "eps": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": 1e6,
        "allgather_bucket_size": "auto",
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 12345,
        "offload_optimizer": {"device": "cpu"},
    },
    "zero_allow_untested_optimizer": True,
    "wall_clock_breakdown": False,
}


def reaches_deepspeed(folder: str) -> None:
    """A file's keys are in force, those left out are the preset's, and the weights are the preset's, bit for bit."""
    path = Path(folder) / "ds.json"
    path.write_text(json.dumps(WHOLE))
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    found = train(folder, Net(batches=5), path, **options)
    engine = found.strategy.deepspeed_engine
    config = engine._config.zero_config
    assert (config.stage, config.max_live_parameters, config.param_persistence_threshold) == (3, 12345, 0)
    assert (config.reduce_bucket_size, config.allgather_bucket_size) == (1_000_000, 1792)
    assert engine.gradient_clipping() == 0.5
    assert engine.optimizer.offload_optimizer
    assert not engine.optimizer.offload_param
    assert not config.offload_optimizer.pin_memory
    assert engine.gradient_accumulation_steps() == 1  # Lightning counts
    assert found.global_step == 3
    plain = ZeroStrategy(stage=3)
    plain.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    expected = weights_of(train(folder, Net(batches=5), strategy=plain, **options))
    for name, value in weights_of(found).items():
        assert torch.equal(value, expected[name]), name


def precision(folder: str) -> None:
    """The configuration's precision is the strategy's, its other keys kept; the Trainer's may be the same."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # it says no on CPU, where it works
    config = {"fp16": {"enabled": True, "initial_scale_power": 7}}
    trainer = train(folder, Net(batches=1), config)
    assert trainer.precision == "16-mixed"
    assert trainer.strategy.deepspeed_engine.optimizer.loss_scale == 2**7
    for told in ({"enabled": "auto", "initial_scale_power": 7}, {"initial_scale_power": 7}):
        strategy = ZeroStrategy(config={"fp16": told}, precision="16-mixed")
        trainer = train(folder, Net(batches=1), strategy=strategy)
        assert trainer.strategy.deepspeed_engine.optimizer.loss_scale == 2**7
    trainer = train(folder, Net(batches=1), {"bf16": {"enabled": True}}, precision="bf16-true")
    assert next(trainer.lightning_module.parameters()).dtype == torch.bfloat16


def own_optimizer(folder: str) -> None:
    """`configure_optimizers` returns nothing, and the configuration names optimizer and schedule, twice in a row."""
    params = {"lr": 0.01, "torch_adam": True, "adam_w_mode": True}
    schedule = {"warmup_min_lr": 0.0, "warmup_max_lr": 0.01, "warmup_num_steps": 4, "warmup_type": "linear"}
    config = {
        "optimizer": {"type": "AdamW", "params": params},
        "scheduler": {"type": "WarmupLR", "params": schedule},
    }
    module = Bare(batches=3)
    strategy = ZeroStrategy(config=config)
    trainer = train(folder, module, strategy=strategy)
    assert type(trainer.strategy.deepspeed_engine.basic_optimizer) is torch.optim.AdamW
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 * 2 / 4)  # it began at none
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module)
    assert trainer.global_step == 6
    with pytest.raises(MisconfigurationError, match=r"sets `scheduler.type` to \"WarmupLR\", but the schedule"):
        train(folder, Scheduled(batches=1), {"scheduler": config["scheduler"]})
    with pytest.raises(MisconfigurationError, match=r"Bare\.configure_optimizers returns no optimizer"):
        train(folder, Bare(batches=1))


class Bare(Net):
    def configure_optimizers(self):
        return None


class Scheduled(Net):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer)]


CONFLICTS = [
    ({"gradient_accumulation_steps": 4}, {}, r"`gradient_accumulation_steps` to 4, .*accumulate_grad_batches\)` is 1"),
    (
        {"train_micro_batch_size_per_gpu": 16},
        {},
        r"gpu` to 16, but the `batch_size` of the training .* is 4",
    ),
    ({"train_batch_size": 64}, {}, r"`train_batch_size` to 64, but `batch_size` .* \(4 x 1 x 2\) is 8"),
    (
        {"train_batch_size": 9, "train_micro_batch_size_per_gpu": 4},
        {},
        r"`train_batch_size` to 9, .*x 1 x 2\) is 8",
    ),
    ({"bf16": {"enabled": False}}, {"precision": "bf16-mixed"}, r"`bf16.enabled` to false, .* is 'bf16-mixed'"),
    ({"optimizer": {"type": "Lamb"}}, {}, r"`optimizer.type` to \"Lamb\", but what Stepless\.configure.* is 'AdamW'"),
    ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, {}, r"params.lr` to 0\.0001, but `lr` of .* is 0\.01"),
]


def conflicts(folder: str) -> None:
    """Keys that contradict the Trainer: both values, where each came from, before the first step, on every rank."""
    for config, options, message in CONFLICTS:
        with pytest.raises(MisconfigurationError, match=r"`zero\(config=\.\.\.\)` sets .*" + message):
            train(folder, Stepless(batches=1), config, **options)
    train(folder, Net(batches=1), {"gradient_accumulation_steps": 1, "train_batch_size": BATCH})
    unsized = DataLoader(Net(batches=1).train_dataloader().dataset, batch_size=None)
    run = Run("zero", Path(folder))
    trainer = run.trainer(max_steps=1, strategy=ZeroStrategy(config={"train_micro_batch_size_per_gpu": 3}))
    trainer.fit(Unbatched(batches=1), unsized)  # such a loader has no size to hold against the configuration's


class Stepless(Net):
    def training_step(self, batch, index):
        raise AssertionError("the first step was reached")


class Unbatched(Net):
    def training_step(self, batch, index):
        return super().training_step((batch[0][None], batch[1][None]), index)


def clipping(folder: str) -> None:
    """The configuration's clipping is in force, and GradientClipping beside it is refused."""
    for limit in (1.0, 0):  # 0 would switch the Trainer's off
        message = rf"gradient_clip_val=0\.5\)` and the DeepSpeed .*`gradient_clipping: {limit}`\) both clip"
        with pytest.raises(MisconfigurationError, match=message):
            train(folder, Stepless(batches=1), {"gradient_clipping": limit}, gradient_clip_val=0.5)
    clip = GradientClipping(FixedNorm(0.5))
    with pytest.raises(MisconfigurationError, match=r"GradientClipping and .*`gradient_clipping: 1.0`.* both clip"):
        train(folder, Stepless(batches=1), {"gradient_clipping": 1.0}, callbacks=[clip])
    train(folder, Net(batches=1), {"gradient_clipping": "auto"}, callbacks=[GradientClipping(FixedNorm(0.5))])
    found = weights_of(train(folder, Net(batches=3, optimizer="sgd"), {"gradient_clipping": 0.01}))
    expected = weights_of(train(folder, Net(batches=3, optimizer="sgd"), gradient_clip_val=0.01))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    trainer = Run("zero", Path(folder)).trainer(max_steps=1, strategy=ZeroStrategy(stage=3), gradient_clip_val=0.01)
    with trainer.init_module():  # the configuration is complete before the Trainer has a module
        module = Net(batches=1)
    trainer.fit(module)
    assert trainer.strategy.deepspeed_engine.gradient_clipping() == 0.01


# -- optimizers and parameters -------------------------------------------------------------------------------------


class With(Net):
    """Its optimizers are what a function makes of it."""

    def __init__(self, build) -> None:
        super().__init__(batches=1)
        self.build = build

    def configure_optimizers(self):
        return self.build(self)

    def training_step(self, batch, index):
        raise AssertionError("the first step was reached")


def _of(kind, **options):
    return lambda module: kind(module.parameters(), **options)


def refused_optimizers(engine: str, folder: str) -> None:
    """Optimizers that need whole tensors or several evaluations, several optimizers, and foreign parameters."""
    for build in (_of(torch.optim.SparseAdam), _of(torch.optim.Adafactor)):
        with pytest.raises(UnsupportedError, match=rf"(SparseAdam|Adafactor) cannot run on {engine}: .*AdamW"):
            _fit(engine, folder, With(build))
    with pytest.raises(UnsupportedError, match=r"LBFGS cannot run on ZeRO: .* first-order optimizer"):
        _fit(engine, folder, With(_of(torch.optim.LBFGS)))
    with pytest.raises(UnsupportedError, match=r"Training with 2 optimizers cannot run on ZeRO: .* one optimizer"):
        _fit(engine, folder, Two())
    with pytest.raises(MisconfigurationError, match=r"`enter\.weight` of With requires a gradient, but the SGD"):
        _fit(engine, folder, With(lambda module: torch.optim.SGD(module.head.parameters(), lr=0.1)))
    strange = [nn.Parameter(torch.zeros(2, 5))]
    with pytest.raises(MisconfigurationError, match=r"Group 0 of the SGD holds a parameter of shape \(2, 5\)"):
        _fit(engine, folder, With(lambda module: torch.optim.SGD([*module.parameters(), *strange], lr=0.1)))


class Two(With):
    def __init__(self) -> None:
        super().__init__(lambda m: [torch.optim.AdamW(m.enter.parameters()), torch.optim.SGD(m.head.parameters(), 0.1)])
        self.automatic_optimization = False


Two.__name__ = "With"


def _fit(engine: str, folder: str, module: Net):
    strategy = FSDP2Strategy() if engine == "fsdp2" else ZeroStrategy(stage=int(engine[-1]))
    return train(folder, module, strategy=strategy)


class Late(Net):
    """Changes itself when training starts, after everything was built."""

    def __init__(self, change) -> None:
        super().__init__(batches=1)
        self.change = change
        self.head.bias.requires_grad_(False)

    def on_train_start(self):
        self.change(self)

    def training_step(self, batch, index):
        raise AssertionError("the first step was reached")


CHANGES = {
    r"`head\.bias` of Late was added or unfrozen": lambda module: module.head.requires_grad_(True),
    r"`enter\.weight` of Late was taken away or frozen": lambda module: module.enter.requires_grad_(False),
    r"`head\.weight` of Late was replaced": lambda module: setattr(module, "head", nn.Linear(11, 3)),
    r"`more\.weight` of Late was added": lambda module: setattr(module, "more", nn.Linear(2, 2)),
}


def changed_late(engine: str, folder: str) -> None:
    for message, change in CHANGES.items():
        with pytest.raises(MisconfigurationError, match=message):
            _fit(engine, folder, Late(change))


def nothing_to_train(engine: str, folder: str) -> None:
    module = With(lambda module: torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1))
    with pytest.raises(MisconfigurationError, match="With has no parameter that requires a gradient"):
        _fit(engine, folder, module.requires_grad_(False))
