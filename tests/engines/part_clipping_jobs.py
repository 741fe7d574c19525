"""Clipping of units, elements and parts of the model, as jobs that a `Group` runs on every rank.

The reference is a loop of torch's own over whole batches and whole weights, with the paper's formulas in float64.
"""

from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_tricks.callbacks import GradientClipping, UnitwiseAdaptive, Value
from lightning_tricks.engines import ZeroStrategy, engine_of, ranks
from tests.engines.checks import Run, float_weights, fp16_options
from tests.engines.option_jobs import prepare

__all__ = ["prepare"]

BATCH, BATCHES, RATE = 8, 4, 0.1
EXCLUDED = "head"
GAIN, SMALL = 5.0, 0.5  # of the loss, and so of the limits; the smaller one does not overflow in fp16


class Mixed(L.LightningModule):
    """A convolution, linear layers, an embedding, biases and gains, in odd sizes, so that ranks cut units."""

    def __init__(self, gain: float = GAIN) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.gain = gain
        self.table = nn.Embedding(7, 5)
        self.convolution = nn.Conv1d(1, 3, 3)
        self.norm = nn.LayerNorm(9)
        self.linear = nn.Linear(9, 11)
        self.fresh = nn.Linear(9, 11, bias=False)
        nn.init.zeros_(self.fresh.weight)
        self.head = nn.Linear(11, 3)

    def forward(self, tokens):
        hidden = self.norm(torch.tanh(self.convolution(self.look_up(tokens)[:, None])).flatten(1))
        return self.head(self.linear(hidden) + self.fresh(hidden))

    def look_up(self, tokens):
        return self.table(tokens)

    def training_step(self, batch, index):
        return self.gain * nn.functional.cross_entropy(self(batch[0]).float(), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=RATE)

    def train_dataloader(self):
        rank, world = ranks()
        mine = [each.unflatten(1, (world, -1))[:, rank].flatten(0, 1) for each in batches()]
        return DataLoader(TensorDataset(*mine), batch_size=BATCH // world)


def batches() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randint(7, (BATCHES, BATCH), generator=generator),
        torch.randint(3, (BATCHES, BATCH), generator=generator),
    )


def units(weight, gradient, ratio):
    """Equation 3 of the AGC paper in float64."""
    weight, gradient = weight.double(), gradient.double()
    if weight.ndim > 1:
        rows = [units(*pair, ratio) for pair in zip(weight.flatten(1), gradient.flatten(1), strict=True)]
        return torch.stack(rows).view_as(gradient)
    allowed = ratio * max(float(weight.norm()), 1e-3)
    return gradient * allowed / gradient.norm() if gradient.norm() > allowed else gradient


def by_unit(named, gain):
    ratio = 0.02 * gain
    return {n: p.grad if n.startswith(EXCLUDED) else units(p.detach(), p.grad, ratio) for n, p in named.items()}


def by_value(named, gain):
    limit = 0.004 * gain
    return {name: parameter.grad.clamp(-limit, limit) for name, parameter in named.items()}


PARTS = {"table": 0.01, "norm.*": 0.02, "linear": 0.04}


def by_part(named, gain):
    for prefix, limit in PARTS.items():
        own = [parameter for name, parameter in named.items() if name.startswith(prefix.rstrip(".*"))]
        assert nn.utils.clip_grad_norm_(own, gain * limit) > gain * limit
    return {name: parameter.grad for name, parameter in named.items()}


POLICIES = {
    "unit": (lambda gain: UnitwiseAdaptive(0.02 * gain, exclude=[EXCLUDED]), by_unit),
    "value": (lambda gain: Value(0.004 * gain), by_value),
    "parts": (lambda gain: {part: gain * limit for part, limit in PARTS.items()}, by_part),
}


def expected(rule, gain):
    """The weights that plain torch has after the same steps, and how far clipping has moved them."""
    module, free = Mixed(gain), Mixed(gain)
    for inputs, targets in zip(*batches(), strict=True):
        for net, clip in ((module, rule), (free, lambda named, _: {n: p.grad for n, p in named.items()})):
            named = dict(net.named_parameters())
            gradients = torch.autograd.grad(net.training_step((inputs, targets), 0), named.values())
            for parameter, gradient in zip(named.values(), gradients, strict=True):
                parameter.grad = gradient
            with torch.no_grad():
                for name, gradient in clip(named, gain).items():
                    named[name] -= RATE * gradient
    moved = {
        n: float((p - q).abs().max()) for (n, p), q in zip(module.named_parameters(), free.parameters(), strict=True)
    }
    return {name: parameter.detach() for name, parameter in module.named_parameters()}, moved


def strategy_of(engine: str):
    if engine == "fsdp1":
        from tests.engines.fsdp1_jobs import CPUStrategy

        return CPUStrategy(auto_wrap_policy={nn.Linear})
    if engine == "zero_3":
        strategy = ZeroStrategy(stage=3)
        strategy.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return strategy
    return engine


def clipped_as_in_plain_torch(engine: str, folder: str, policy: str, scaled: bool = False) -> list[float]:
    """Weights after four steps; what is logged is the same on every rank."""
    make, rule = POLICIES[policy]
    run, gain = Run(engine, Path(folder)), SMALL if scaled else GAIN
    options = {"strategy": strategy_of(engine), "use_distributed_sampler": False}
    if scaled:
        options |= fp16_options(run)
    trainer = run.trainer(GradientClipping(make(gain)), max_epochs=1, **options)
    trainer.fit(Mixed(gain))
    wanted, moved = expected(rule, gain)
    found, start = float_weights(trainer), dict(Mixed().named_parameters())
    assert sum(value > 1e-3 * gain for value in moved.values()) > 4, f"clipping changes too little: {moved}"
    for name, value in wanted.items():
        off, way = (float((value - other).abs().max()) for other in (found[name], start[name]))
        allowed = (
            5e-2 * way + 1e-3 * float(value.abs().max()) if scaled else 1e-4 * way
        )  # fp16 rounds the first weights
        assert off <= allowed, f"{name}: {off:.1e} off, on a way of {way:.1e}; clipping made {moved[name]:.1e} of it"
    return [float(value) for name, value in sorted(trainer.callback_metrics.items()) if "clipped" in name]


class Spoilt(Mixed):
    """In the second step the last rank's gradient of one token's row, and of nothing else, is not a number."""

    def look_up(self, tokens):
        found = super().look_up(tokens)
        if self.global_step == 1 and ranks()[0] == ranks()[1] - 1:
            found.register_hook(lambda gradient: gradient.masked_fill((tokens == BAD_TOKEN)[:, None], torch.nan))
        return found


BAD_TOKEN = int(batches()[0][1, -1])


def bad_units_spoil_no_other(engine: str, folder: str) -> None:
    """The other rows and all other weights stay finite; DeepSpeed drops such a step by itself."""
    run = Run(engine, Path(folder))
    policy = UnitwiseAdaptive(0.1, exclude=[EXCLUDED])
    options = {"strategy": strategy_of(engine), "use_distributed_sampler": False, "max_steps": 2}
    trainer = run.trainer(GradientClipping(policy), max_epochs=1, **options)
    trainer.fit(Spoilt())
    found = float_weights(trainer)
    bad = (~found.pop("table.weight").isfinite().all(1)).nonzero().flatten().tolist()
    assert all(value.isfinite().all() for value in found.values())
    assert bad == ([] if engine.startswith("zero") else [BAD_TOKEN])
    assert engine_of(trainer).was_step_applied() != engine.startswith("zero")
