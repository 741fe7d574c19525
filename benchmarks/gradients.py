"""What the tricks of gradients cost, beside a step of the reviews recipe: MiniLM on one device and one thread.

Run it by `python benchmarks/gradients.py`: about four minutes. Each trick is measured in a fit of its own: the CPU time
that its hooks take within real steps, logging included, over that of the step without them. Lightning's own clipping is
measured likewise. The sketch of quantiles is measured by itself.

Composer's clipping comes beside them with `--composer FOLDER`: what `pip download --no-deps mosaicml` and unpacking the
wheel give. Composer does not install beside the torch of constraints.txt; its function for clipping needs torch alone.
"""

import argparse
import importlib.util
import itertools
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
    UnitwiseAdaptive,
    ZScore,
)
from lightning_tricks.functional import QuantileSketch
from lightning_tricks.recipes import TextClassificationData, TextClassifier

WARM_UP = 3
# name -> callbacks, and the bound of their share of a step beyond Lightning's own clipping (None: of its own)
TRICKS = {
    "monitor and fixed norm": (lambda: [GradientNormMonitor(), GradientClipping(FixedNorm(1.0))], 0.02, True),
    "fixed norm": (lambda: [GradientClipping(FixedNorm(1.0))], 0.02, True),
    "percentile": (lambda: [GradientClipping(Percentile(50, warmup=2, warmup_limit=1.0))], 0.03, True),
    "z-score": (lambda: [GradientClipping(ZScore(2.5, warmup=2, warmup_limit=1.0))], 0.03, True),
    "unit-wise adaptive": (lambda: [GradientClipping(UnitwiseAdaptive(0.01))], None, False),
    "guard": (lambda: [NonFiniteGuard()], 0.005, False),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--output", type=Path, default=_report.RESULTS / "gradients.json")
    parser.add_argument("--composer", type=Path, help="an unpacked wheel of mosaicml")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    busy = _report.load_average()
    lightning = fit([], options.steps, gradient_clip_val=1.0)
    measured = {"Lightning's gradient_clip_val": lightning}
    measured |= {name: fit(build(), options.steps) for name, (build, _, _) in TRICKS.items()}
    if options.composer:
        kinds = {"Composer's norm": ("norm", 1.0), "Composer's adaptive": ("adaptive", 0.01)}
        function = composers(options.composer)
        measured |= {name: fit([Composers(function, *kind)], options.steps) for name, kind in kinds.items()}
    _report.write(
        options.output,
        "CPU time of the hooks of gradient tricks over that of a MiniLM step, 32 texts of the reviews",
        {**{name: finding(name, measured) for name in TRICKS}, "sketch of quantiles": sketch()},
        load_average_before=busy,
        steps=options.steps,
        note="one_pass is a _foreach_norm of the weights, one of the gradients, and a _foreach_mul_ of the gradients",
        rows=measured,
    )


def fit(callbacks, steps, **trainer_options):
    """Milliseconds of CPU time, medians: of the step without the hooks, and of the hooks."""
    L.seed_everything(0, verbose=False)
    data = TextClassificationData(batch_size=32, limit=4000)
    data.prepare_data()
    data.setup("fit")
    model = TextClassifier(data.labels, class_counts=data.class_counts, tuning="full")
    probe = Probe()
    for owner, names in [(each, hooks(each)) for each in callbacks] or [(model, ["configure_gradient_clipping"])]:
        for name in names:
            setattr(owner, name, probe.timed(getattr(owner, name)))
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=steps + WARM_UP + 1,
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


def hooks(callback):
    """The hooks of a step that the callback has."""
    steps = ("on_train_batch_start", "on_before_backward", "on_before_optimizer_step", "on_train_batch_end")
    wider = ("on_after_backward", "on_before_zero_grad")
    return [name for name in (*steps, *wider) if getattr(type(callback), name) is not getattr(L.Callback, name)]


class Probe(L.Callback):
    """Notes the CPU time of each step, and of what is timed within it."""

    def __init__(self):
        self.starts, self.inside, self.passes = [], [], []

    def timed(self, function):
        def timed(*arguments, **options):
            start = time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                if self.inside:
                    self.inside[-1] += time.process_time() - start

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
        own = [1e3 * (took - inside - one) for took, inside, one in zip(whole, self.inside, self.passes, strict=False)]
        return {"step": own, "hooks": [1e3 * each for each in self.inside], "one_pass": [1e3 * p for p in self.passes]}


def finding(name, measured):
    """Its share of a step, beyond Lightning's own clipping where that does the same."""
    _, bound, beyond = TRICKS[name]
    found, lightning = measured[name], measured["Lightning's gradient_clip_val"]
    if bound is None:
        ratio = found["hooks"] / found["one_pass"]
        share = round(found["hooks"] / found["step"], 5)
        return {"times_one_pass": round(ratio, 3), "share_of_a_step": share, "bound": 1.15, "holds": ratio <= 1.15}
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
