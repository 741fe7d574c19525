"""What asking the engine costs, beside a step of the reviews recipe: MiniLM on one device and one thread.

Run it by `python benchmarks/seam.py`: under three minutes. What `engine_of`, `gradient_norm` and `was_step_applied`
take is measured within real steps, in CPU time; the rest of the step is the step's own.
"""

import argparse
import itertools
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import _report
import lightning as L
import torch

from lightning_tricks.engines import engine_of
from lightning_tricks.recipes import TextClassificationData, TextClassifier

BOUND = 0.005
# tuning, texts of a batch, tokens of a text: those of examples/reviews/config.yaml, and the demo's few
ROWS = {"full": ("full", 32, 128), "lora": ("lora", 32, 128), "full, small batch": ("full", 16, 48)}
WARM_UP = 3
CALLS = 1000


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--output", type=Path, default=_report.RESULTS / "seam.json")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start, busy = time.perf_counter(), _report.load_average()
    measured = {name: measure(*row, options.steps) for name, row in ROWS.items()}
    _report.write(
        options.output,
        "CPU time of engine_of, of the norm of all gradients and of the check for a veto, over that of a step",
        {name: findings(each) for name, each in measured.items()},
        load_average_before=busy,
        seconds=round(time.perf_counter() - start),
        steps=options.steps,
        note="the norm reads every gradient once: memory's speed is its least cost, see one_pass, a bare sum",
        rows=measured,
    )


def measure(tuning, batch, max_length, steps):
    L.seed_everything(0, verbose=False)
    data = TextClassificationData(batch_size=batch, max_length=max_length, limit=4000)
    data.prepare_data()
    data.setup("fit")
    model = TextClassifier(data.labels, class_counts=data.class_counts, tuning=tuning)
    probe = Probe()
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=steps + WARM_UP + 1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            callbacks=[probe],
            default_root_dir=folder,
        )
        trainer.fit(model, datamodule=data)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    found = {name: spread(values[WARM_UP:]) for name, values in probe.milliseconds().items()}
    tokens = statistics.median(probe.tokens[WARM_UP:])
    return {"texts": batch, "tokens": tokens, "trained_parameters": trained, "milliseconds": found}


class Probe(L.Callback):
    """Asks the engine in every step, and notes the CPU time of each question and of the steps without them."""

    def __init__(self):
        self.starts, self.tokens, self.asked = [], [], []
        self.parts = {"engine_of": [], "gradient_norm": [], "one_pass": [], "was_step_applied": []}

    def setup(self, trainer, pl_module, stage):
        engine_of(trainer)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.tokens.append(batch["input_ids"].numel())
        self.asked.append(0.0)
        self.starts.append(time.process_time())

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._time("one_pass", lambda: torch.stack([gradient.sum() for gradient in gradients]))
        self._time("engine_of", lambda: engine_of(trainer), CALLS)
        self._time("gradient_norm", lambda: engine_of(trainer).gradient_norm(optimizer))

    def on_train_batch_end(self, trainer, *_):
        self._time("was_step_applied", lambda: engine_of(trainer).was_step_applied(), CALLS)

    def _time(self, part, ask, calls=1):
        start = time.process_time()
        for _ in range(calls):
            ask()
        seconds = time.process_time() - start
        self.parts[part].append(1e3 * seconds / calls)
        self.asked[-1] += seconds

    def milliseconds(self):
        whole = [after - before for before, after in itertools.pairwise(self.starts)]
        return {"step": [1e3 * (took - asked) for took, asked in zip(whole, self.asked, strict=False)], **self.parts}


def spread(values):
    quarters = statistics.quantiles(values, n=4)
    return {"median": round(quarters[1], 5), "quarters": [round(quarters[0], 5), round(quarters[2], 5)]}


def findings(measured):
    """Shares of a step, one on top of the other."""
    median = {name: each["median"] for name, each in measured["milliseconds"].items()}
    engine = median["engine_of"] / median["step"]
    norm, check = median["gradient_norm"] / median["step"], median["was_step_applied"] / median["step"]
    return {
        "engine_of": round(engine, 7),
        "engine_of_and_veto_check": round(engine + check, 7),
        "engine_of_and_norm_and_veto_check": round(norm + check, 7),  # the norm's share includes its engine_of
        "one_pass_over_the_gradients": round(median["one_pass"] / median["step"], 7),
        "bound": BOUND,
        "holds": norm + check <= BOUND,
    }


if __name__ == "__main__":
    main()
