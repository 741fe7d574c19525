"""Bytes per parameter and rank of each engine on two ranks, as `describe` reads them, against the ZeRO paper's formula.

`make bench`, or `python benchmarks/memory.py`. A network of linear blocks is trained with AdamW; nothing is timed, so
the machine may do other things. Each figure is read in an accumulation window of two micro-batches: after the first of
them, when gradients wait, and before the step.
"""

import argparse
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import _report
import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

RESULTS = _report.RESULTS / "memory.json"
ENGINES = ("ddp", "fsdp2", "zero_1", "zero_2", "zero_3")
PRECISIONS = ("32-true", "bf16-mixed")
RANKS = 2


class Blocks(L.LightningModule):
    """Linear blocks of the given width, 8 x width x width parameters each."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])

    def training_step(self, batch, index):
        """The mean square of the output: memory does not depend on the task."""
        (inputs,) = batch
        for block in self.blocks:
            inputs = block(inputs)
        return inputs.float().square().mean()

    def configure_optimizers(self):
        """The optimizer that the paper counts: two fp32 moments."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)

    def train_dataloader(self):
        """More batches than the two steps need."""
        width = self.blocks[0].wide.in_features
        return DataLoader(TensorDataset(torch.ones(16, width)), batch_size=1)


class Block(nn.Module):
    """Two layers and a way around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide, self.back = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        """Wide, and back."""
        return x + self.back(torch.relu(self.wide(x)))


class Reads(L.Callback):
    """Keeps what the engine holds in the second window of two micro-batches."""

    def __init__(self) -> None:
        self.read = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        """The gradients are reduced, the moments are there."""
        if trainer.global_step == 1:
            self._read("before the step", trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, index):
        """After the first micro-batch of the second window."""
        if index == 2:
            self._read("between micro-batches", trainer)

    def _read(self, when, trainer):
        from lightning_tricks.strategies import describe

        self.read[when] = describe(trainer)


def bytes_per_parameter(engine: str, precision: str, folder: str, width: int, depth: int) -> dict:
    """One fit of two steps; on every rank, of a group that has been started."""
    torch.manual_seed(0)
    module, reads = Blocks(width, depth), Reads()
    trainer = L.Trainer(
        strategy=engine,
        precision=precision,
        accelerator="cpu",
        devices=RANKS,
        max_steps=2,
        accumulate_grad_batches=2,
        callbacks=[reads],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    elements = sum(parameter.numel() for parameter in module.parameters())
    trainer.fit(module)
    between, before = (reads.read[when].memory for when in ("between micro-batches", "before the step"))
    kinds = {kind: getattr(before, kind).total / elements for kind in ("parameters", "masters", "optimizer")}
    waiting, reduced = (0 if memory.gradients is None else memory.gradients.total for memory in (between, before))
    kinds |= {"gradients": max(waiting, reduced) / elements}
    own = {name: part.total / elements for name, part in before.engine.items()}
    return {"elements": elements, "kinds": kinds, "engine": own, "reduced gradients": reduced / elements}


def formula(engine: str, precision: str) -> float:
    """Bytes per parameter and rank: Rajbhandari et al. (2020), figure 1; the same for FSDP2, and for fp32."""
    low = engine.startswith("zero") and precision != "32-true"
    parameters, gradients = (2, 2) if low else (4, 4)
    state = 12 if low else 8
    divided = {"ddp": 0, "zero_1": 1, "zero_2": 2, "zero_3": 3, "fsdp2": 3}[engine]
    parts = (state, gradients, parameters)
    return sum(part / RANKS if index < divided else part for index, part in enumerate(parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--depth", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        rank(options.rank_of, options.width, options.depth)
        return
    rows: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        for engine in options.engines:
            rows[engine] = group(engine, folder, options)
            for precision, row in rows[engine].items():
                print(engine, precision, json.dumps(row), flush=True)
    write(rows, options)


def rank(job: str, width: int, depth: int) -> None:
    """One rank of a group: every precision of one engine."""
    import lightning_tricks  # noqa: F401  (registers the flags)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    engine, folder = job.split(":", 1)
    for precision in PRECISIONS:
        found = bytes_per_parameter(engine, precision, folder, width, depth)
        path = Path(folder) / f"{engine}-{precision}-{os.environ['RANK']}.json"
        path.write_text(json.dumps(found))


def group(engine: str, folder: str, options: argparse.Namespace) -> dict:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--rank-of", f"{engine}:{folder}"]
    command += ["--width", str(options.width), "--depth", str(options.depth)]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS), "GROUP_RANK": "0"}
    place |= {"LOCAL_WORLD_SIZE": str(RANKS), "TORCHELASTIC_RUN_ID": "memory", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(command, env={**os.environ, **place, "RANK": str(each), "LOCAL_RANK": str(each)})
        for each in range(RANKS)
    ]
    try:
        statuses = [process.wait(600) for process in ranks]
        if any(statuses):
            raise SystemExit(f"{engine}: a rank failed")
    finally:
        for process in ranks:
            process.kill()
    return {precision: summary(engine, precision, folder) for precision in PRECISIONS}


def summary(engine: str, precision: str, folder: str) -> dict:
    """The rank that holds most."""
    paths = [Path(folder) / f"{engine}-{precision}-{each}.json" for each in range(RANKS)]
    found = max((json.loads(path.read_text()) for path in paths), key=lambda each: sum(each["kinds"].values()))
    total, paper = sum(found["kinds"].values()), formula(engine, precision)
    return {
        "parameters_of_the_model": found["elements"],
        "bytes_per_parameter_and_rank": {**_rounded(found["kinds"]), "total": round(total, 4)},
        "gradients_once_reduced": round(found["reduced gradients"], 4),
        "formula": paper,
        "measured_to_formula": round(total / paper, 4),
        "engine_of_its_own": {name: value for name, value in _rounded(found["engine"]).items() if value},
    }


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


def write(rows: dict, options: argparse.Namespace) -> None:
    if options.engines != ENGINES and options.output.exists():  # the others stay as they were measured before
        rows = {**json.loads(options.output.read_text())["findings"], **rows}
    question = "bytes per parameter and rank on 2 ranks, AdamW, against the ZeRO paper's formula"
    _report.write(options.output, question, {engine: rows[engine] for engine in ENGINES if engine in rows})


if __name__ == "__main__":
    main()
