"""What the tricks of gradients cost, beside a step of the reviews recipe: MiniLM on one device and one thread.

Run it by `python benchmarks/gradients.py`: about ten minutes. Each trick is measured in a fit of its own: the CPU time
that its hooks take within real steps, logging included, over that of the step without them. Lightning's own clipping is
measured likewise. The sketch of quantiles is measured by itself.

Composer's clipping comes beside them with `--composer FOLDER`: what `pip download --no-deps mosaicml` and unpacking the
wheel give. Composer does not install beside the torch of constraints.txt; its function for clipping needs torch alone.
"""

import argparse
import importlib.util
import itertools
import json
import logging
import pickle
import statistics
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path

import _report
import lightning as L
import torch

from lightning_tricks.callbacks import (
    FixedNorm,
    GradientClipping,
    GradientNormMonitor,
    NonFiniteGuard,
    Percentile,
    SpikeRecovery,
    UnitwiseAdaptive,
    ZScore,
)
from lightning_tricks.functional import QuantileSketch
from lightning_tricks.mixins import LossNormalizationMixin
from lightning_tricks.mixins._loss_window import LossWindow
from lightning_tricks.recipes import TextClassificationData, TextClassifier

WARM_UP = 3
OWN = "configure_gradient_clipping"  # Lightning's own


class Normalized(LossNormalizationMixin, TextClassifier):
    """The recipe with a loss that is normalised over the window."""

    def training_step(self, batch, batch_idx):
        labels = batch["labels"]
        return self.normalized_loss(
            torch.nn.functional.cross_entropy(self(batch), labels, reduction="sum"), len(labels)
        )


# name -> callbacks, the bound of their share of a step, and whether that is beyond Lightning's own clipping
TRICKS = {
    "monitor and fixed norm": (lambda: [GradientNormMonitor(), GradientClipping(FixedNorm(1.0))], 0.02, True),
    "fixed norm": (lambda: [GradientClipping(FixedNorm(1.0))], 0.02, True),
    "percentile": (lambda: [GradientClipping(Percentile(50, warmup=2, warmup_limit=1.0))], 0.03, True),
    "z-score": (lambda: [GradientClipping(ZScore(2.5, warmup=2, warmup_limit=1.0))], 0.03, True),
    "unit-wise adaptive": (lambda: [GradientClipping(UnitwiseAdaptive(0.01))], None, False),
    "guard": (lambda: [NonFiniteGuard()], 0.005, False),
    "monitor of two groups": (lambda: [GradientNormMonitor(groups=["encoder", "classifier"])], None, False),
    "spike recovery": (lambda: [SpikeRecovery(every_n_steps=100)], None, False),
}
# name -> the module, and its method that is timed beside the hooks of a window of two batches
MIXINS = {
    "class-weighted loss": (TextClassifier, "class_weighted_loss"),
    "loss normalisation": (Normalized, "normalized_loss"),
}
COMPOSERS = {"Composer's norm": ("norm", 1.0), "Composer's adaptive": ("adaptive", 0.01)}
ADAPTIVE = ("unit-wise adaptive", 1.15)  # the policy itself, in passes over the parameters


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--output", type=Path, default=_report.RESULTS / "gradients.json")
    parser.add_argument("--rows", nargs="+", help="measure these alone, and keep the rest of the file")
    parser.add_argument("--composer", type=Path, help="an unpacked wheel of mosaicml")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    busy = _report.load_average()
    measured = json.loads(options.output.read_text())["rows"] if options.rows else {}
    wanted = options.rows or [
        "Lightning's gradient_clip_val",
        *TRICKS,
        *(COMPOSERS if options.composer else ()),
        *MIXINS,
    ]
    for name in wanted:
        measured[name] = measure(name, options)
    _report.write(
        options.output,
        "CPU time of the hooks of gradient tricks over that of a MiniLM step, 32 texts of the reviews",
        {**{name: finding(name, measured) for name in (*TRICKS, *MIXINS)}, "sketch of quantiles": sketch()},
        load_average_before=busy,
        steps=options.steps,
        note="one_pass is a _foreach_norm of the weights, one of the gradients, and a _foreach_mul_ of the gradients",
        rows=measured,
    )


def measure(name, options):
    """One row."""
    if name in TRICKS:
        return fit(TRICKS[name][0](), options.steps)
    if name in MIXINS:
        return fit([], options.steps, *MIXINS[name], accumulate_grad_batches=2)
    if name in COMPOSERS:
        return fit([Composers(composers(options.composer), *COMPOSERS[name])], options.steps)
    return fit([], options.steps, gradient_clip_val=1.0)


def fit(callbacks, steps, kind=TextClassifier, method=None, **trainer_options):
    """Milliseconds of CPU time, medians: of the step without the hooks, and of the hooks."""
    L.seed_everything(0, verbose=False)
    data = TextClassificationData(batch_size=32, limit=4000)
    data.prepare_data()
    data.setup("fit")
    model = kind(data.labels, class_counts=data.class_counts, tuning="full")
    probe = Probe()
    for owner, names in [(each, hooks(each)) for each in callbacks] or [(model, [method or OWN])]:
        for name in names:
            setattr(owner, name, probe.timed(getattr(owner, name)))
    if method:
        callbacks = [WindowTimer(probe)]
    for policy in [each.policy for each in callbacks if isinstance(each, GradientClipping)]:
        if isinstance(policy, UnitwiseAdaptive):
            policy.apply = probe.timed(policy.apply, probe.policies)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=(steps + WARM_UP) // trainer_options.get("accumulate_grad_batches", 1) + 1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            callbacks=[probe, *callbacks],
            default_root_dir=folder,
            **trainer_options,
        )
        trainer.fit(model, datamodule=data)
    return {name: round(statistics.median(values[WARM_UP:]), 3) for name, values in probe.milliseconds().items()}


def composers(folder):
    """`apply_gradient_clipping` of Composer, whose other modules this one imports for its annotations alone."""
    for name, members in {
        "core": ("Algorithm", "Event", "State"),
        "loggers": ("Logger",),
        "models": ("ComposerModel",),
    }.items():
        stand_in = types.ModuleType(f"composer.{name}")
        vars(stand_in).update({member: type(member, (), {}) for member in members})
        sys.modules[stand_in.__name__] = stand_in
    path = folder / "composer/algorithms/gradient_clipping/gradient_clipping.py"
    spec = importlib.util.spec_from_file_location("composers_clipping", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.apply_gradient_clipping


class Composers(L.Callback):
    """Composer's clipping where ours is."""

    def __init__(self, function, kind, threshold):
        self.clip = lambda module: function(module, kind, threshold, fsdp_enabled=False)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.clip(pl_module)


class WindowTimer(L.Callback):
    """Times the hooks of the callback that mixins bring along, once it is there."""

    def __init__(self, probe):
        self.probe = probe

    def on_train_start(self, trainer, pl_module):
        for callback in trainer.callbacks:
            if isinstance(callback, LossWindow):
                for name in hooks(callback):
                    setattr(callback, name, self.probe.timed(getattr(callback, name)))


def hooks(callback):
    """The hooks of a step that the callback has."""
    steps = ("on_train_batch_start", "on_before_backward", "on_before_optimizer_step", "on_train_batch_end")
    wider = ("on_after_backward", "on_before_zero_grad")
    return [name for name in (*steps, *wider) if getattr(type(callback), name) is not getattr(L.Callback, name)]


class Probe(L.Callback):
    """Notes the CPU time of each step, and of what is timed within it."""

    def __init__(self):
        self.starts, self.inside, self.passes, self.policies = [], [], [], []

    def timed(self, function, times=None):
        """The function, whose time is added to the step's, or to a list of its own."""

        def timed(*arguments, **options):
            start = time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                took = time.process_time() - start
                if times is not None:
                    times.append(took)
                elif self.inside:
                    self.inside[-1] += took

        return timed

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.inside.append(0.0)
        self.starts.append(time.process_time())

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        pairs = [(p.detach(), p.grad) for p in pl_module.parameters() if p.grad is not None]
        weights, gradients = ([pair[side] for pair in pairs] for side in (0, 1))
        start = time.process_time()
        torch._foreach_norm(weights)
        torch._foreach_norm(gradients)
        torch._foreach_mul_(gradients, 1.0)
        self.passes.append(time.process_time() - start)

    def milliseconds(self):
        whole = [after - before for before, after in itertools.pairwise(self.starts)]
        passes = statistics.median(self.passes) if len(self.passes) == len(whole) + 1 else 0
        own = [1e3 * (took - inside - passes) for took, inside in zip(whole, self.inside, strict=False)]
        times = {"hooks": self.inside, "one_pass": self.passes, "policy": self.policies}
        return {"step": own, **{name: [1e3 * each for each in values] for name, values in times.items() if values}}


def finding(name, measured):
    """Its share of a step, beyond Lightning's own clipping where that does the same."""
    _, bound, beyond = TRICKS.get(name, (None, None, False))
    found, lightning = measured[name], measured["Lightning's gradient_clip_val"]
    if name == ADAPTIVE[0]:
        ratio = found["policy"] / found["one_pass"]
        share = round(found["hooks"] / found["step"], 5)
        return {
            "times_one_pass": round(ratio, 3),
            "share_of_a_step": share,
            "bound": ADAPTIVE[1],
            "holds": ratio <= ADAPTIVE[1],
        }
    if bound is None:
        return {"share_of_a_step": round(found["hooks"] / found["step"], 5)}
    share = (found["hooks"] - (lightning["hooks"] if beyond else 0)) / found["step"]
    return {"share_of_a_step": round(share, 5), "bound": bound, "holds": share <= bound}


def sketch():
    """The rank error of the sketch at a million values, its bytes, and what a value costs."""
    generator = torch.Generator().manual_seed(0)
    values, kept = torch.randn(1_000_000, generator=generator).exp().double(), QuantileSketch()
    start = time.process_time()
    for chunk in values.split(1000):
        kept.add(chunk)
    seconds = time.process_time() - start
    levels = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    found = torch.as_tensor(kept.quantiles(levels.tolist()), dtype=torch.float64)
    error = float((torch.searchsorted(values.sort().values, found).double() / len(values) - levels).abs().max())
    size = len(pickle.dumps(kept.state_dict()))
    return {"rank_error": round(error, 5), "bytes": size, "ns_per_value": round(1e9 * seconds / len(values), 1)}


if __name__ == "__main__":
    main()
