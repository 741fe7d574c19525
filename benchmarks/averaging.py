"""What averaging weights costs: beside one lerp over the same tensors, Lightning's own average, and a step of MiniLM.

Run it by `python benchmarks/averaging.py`: about three minutes. The variants take turns in one process, on one thread;
what counts is the median of CPU times.
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import _report
import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_tricks.callbacks import EMA, WeightAveraging
from lightning_tricks.engines import engine_of
from lightning_tricks.recipes import TextClassificationData, TextClassifier

# parameters in millions -> width, layers: tensors like those of an encoder, MiniLM's and one of BERT's size
SIZES = {"23M": (384, 12, 4_600), "100M": (768, 12, 19_500)}
BOUNDS = {"over_one_lerp": 1.1, "lightnings_over_ours": 1.5, "every_10_over_a_step": 0.005}
WARM_UP = 2


class Encoder(L.LightningModule):
    """The parameters of an encoder, and a training step that costs next to nothing."""

    def __init__(self, width, layers, words):
        super().__init__()
        self.words = nn.Embedding(words, width)
        shapes = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
        self.layers = nn.ParameterList(
            nn.Parameter(torch.randn(shape) * 0.02)
            for _ in range(layers)
            for weight in shapes
            for shape in (weight, weight[:1])
        )
        self.one = nn.Linear(1, 1)

    def training_step(self, batch, _):
        return self.one(batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.one.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(64, 1)))


class Turns(L.Callback):
    """After each step, lets each variant update once, in turns, and notes its CPU time."""

    def __init__(self, ours, theirs):
        self.ours, self.theirs = ours, theirs
        self.times = {"ours": [], "one_lerp": [], "lightnings": []}

    def on_train_batch_end(self, trainer, pl_module, *_):
        values = [shard.values for shard in engine_of(trainer).named_shards()]
        if not hasattr(self, "copies"):
            self.copies = [value.clone() for value in values]
        turns = {
            "ours": lambda: self.ours._average.update(self.ours.engine),
            "one_lerp": lambda: torch._foreach_lerp_(self.copies, values, 1e-3),
            "lightnings": lambda: self.theirs._average_model.update_parameters(pl_module),
        }
        names = list(turns)
        shift = trainer.global_step % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.process_time()
            turns[name]()
            self.times[name].append(time.process_time() - start)


def compare(width, layers, words, steps):
    module = Encoder(width, layers, words)
    ours = WeightAveraging(EMA(0.999), use_for=[], update_every=10**6)
    theirs = EMAWeightAveraging(decay=0.999)
    theirs.setup(None, module, "fit")  # beside the fit, whose check would refuse two that average
    turns = Turns(ours, theirs)
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(folder, [ours, turns], max_steps=steps + WARM_UP)
        run.fit(module)
        held = 4 * sum(shard.values.numel() for shard in engine_of(run).named_shards())
    median = {name: statistics.median(values[WARM_UP:]) for name, values in turns.times.items()}
    return {
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "tensors": sum(1 for _ in module.parameters()),
        "milliseconds": {name: round(1e3 * value, 3) for name, value in median.items()},
        "over_one_lerp": round(median["ours"] / median["one_lerp"], 3),
        "lightnings_over_ours": round(median["lightnings"] / median["ours"], 3),
        "bytes_of_the_average": ours._average.nbytes(),
        "bytes_of_the_shards_in_fp32": held,
    }


def trainer(folder, callbacks, **options):
    return L.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=callbacks,
        default_root_dir=folder,
        **options,
    )


class Share(L.Callback):
    """CPU time of whole steps, and of the averaging's part of them."""

    def __init__(self, averaging):
        self.starts, self.parts = [], []
        update = averaging.on_train_batch_end

        def timed(*arguments):
            start = time.process_time()
            update(*arguments)
            self.parts.append(time.process_time() - start)

        vars(averaging)["on_train_batch_end"] = timed

    def on_train_batch_start(self, *_):
        self.starts.append(time.process_time())


def share_of_a_step(steps):
    """With `update_every=10`, in the reviews recipe: 32 texts of up to 128 tokens."""
    L.seed_everything(0, verbose=False)
    data = TextClassificationData(batch_size=32, max_length=128, limit=4000)
    data.prepare_data()
    data.setup("fit")
    model = TextClassifier(data.labels, class_counts=data.class_counts, tuning="full")
    averaging = WeightAveraging(EMA(0.99), update_every=10)
    share = Share(averaging)
    with tempfile.TemporaryDirectory() as folder:
        trainer(folder, [share, averaging], max_steps=steps + WARM_UP + 1).fit(model, datamodule=data)
    whole = [after - before for before, after in zip(share.starts, share.starts[1:], strict=False)][WARM_UP:]
    updates = sorted(share.parts[WARM_UP:])[-(steps // 10) :]
    others = sorted(share.parts[WARM_UP:])[: -(steps // 10)]
    step = statistics.median(whole)
    mean = (statistics.median(updates) + 9 * statistics.median(others)) / 10
    return {
        "step_milliseconds": round(1e3 * step, 1),
        "update_milliseconds": round(1e3 * statistics.median(updates), 3),
        "without_update_milliseconds": round(1e3 * statistics.median(others), 4),
        "every_10_over_a_step": round(mean / step, 5),
        "every_step_over_a_step": round(statistics.median(updates) / step, 5),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", type=Path, default=_report.RESULTS / "averaging.json")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start, busy = time.perf_counter(), _report.load_average()
    rows = {name: compare(*size, options.steps) for name, size in SIZES.items()}
    share = share_of_a_step(options.steps)
    findings = {
        **{name: {key: row[key] for key in ("over_one_lerp", "lightnings_over_ours")} for name, row in rows.items()},
        "every_10_over_a_step": share["every_10_over_a_step"],
        "one_fp32_copy": all(
            row["bytes_of_the_average"] == row["bytes_of_the_shards_in_fp32"] for row in rows.values()
        ),
        "bounds": BOUNDS,
    }
    findings["holds"] = (
        all(row["over_one_lerp"] <= BOUNDS["over_one_lerp"] for row in rows.values())
        and all(row["lightnings_over_ours"] >= BOUNDS["lightnings_over_ours"] for row in rows.values())
        and share["every_10_over_a_step"] < BOUNDS["every_10_over_a_step"]
        and findings["one_fp32_copy"]
    )
    _report.write(
        options.output,
        "CPU time of an update of WeightAveraging(EMA), over one torch._foreach_lerp_, Lightning's EMAWeightAveraging"
        " and a step of MiniLM",
        findings,
        load_average_before=busy,
        seconds=round(time.perf_counter() - start),
        steps=options.steps,
        rows=rows,
        share=share,
    )


if __name__ == "__main__":
    main()
