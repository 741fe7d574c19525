"""Do all engines train alike? Weights after 20 AdamW steps, on two processes and on one.

Run it by `python benchmarks/equivalence.py`: about three minutes. The models and the measure are those of
`tests/engines/equivalence_jobs.py`, whose bounds a test holds; here from three starting points each.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import _report

sys.path.insert(0, str(_report.FOLDER.parent))

from tests.conformance.engines import Group
from tests.engines import equivalence_jobs as jobs

FP32, BF16 = "32-true", "bf16-mixed"
BOUNDS = {"from_ddp": 1e-6, "from_one_device": 2e-5, "bf16_over_ddps": 2.0}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", nargs="+", default=list(jobs.ENGINES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=_report.RESULTS / "equivalence.json")
    options = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        train_all(Path(folder), options)
        measured = {
            engine: {model: distances(Path(folder), engine, model, options.seeds) for model in jobs.MODELS}
            for engine in ("ddp", *options.engines)
        }
    _report.write(
        options.output,
        "the largest difference of weights after 20 AdamW steps, relative to the largest value of each tensor",
        findings(measured),
        seeds=options.seeds,
        seconds=round(time.perf_counter() - start),
        ranks=2,
        not_compared_with_one_device="batch norm in training: a rank's statistics are of its own samples, as under DDP",
        engines=measured,
    )


def train_all(folder, options):
    """Every model, precision and seed on every engine; each group of processes serves all."""
    prepare = "tests.engines.equivalence_jobs:prepare"
    runs = {1: ["one_device"], 2: ["ddp", *options.engines]}
    for world, engines in runs.items():
        group = Group(world, folder / f"{world}", prepare)
        try:
            for engine in engines:
                print(f"training on {engine}", flush=True)
                for model in jobs.MODELS:
                    for precision in (FP32, BF16):
                        for seed in options.seeds:
                            arguments = {"engine": engine, "precision": precision, "model": model, "seed": seed}
                            group.call("tests.engines.equivalence_jobs:train", **arguments, folder=f"{folder}")
        finally:
            group.close()


def distances(folder, engine, model, seeds):
    """The worst of the seeds, each against what it is to be near."""

    def worst(one, other):
        return max(jobs.distance(folder, model, seed, one, other) for seed in seeds)

    found = {
        "fp32_from_ddp": worst((engine, FP32), ("ddp", FP32)),
        "bf16_from_ddp_fp32": worst((engine, BF16), ("ddp", FP32)),
        "ddp_bf16_from_ddp_fp32": worst(("ddp", BF16), ("ddp", FP32)),
    }
    if jobs.MODELS[model].compares_with_one_device:
        found["fp32_from_one_device"] = worst((engine, FP32), ("one_device", FP32))
    return found


def findings(measured):
    rows = [row for engine in measured.values() for row in engine.values()]
    found = {
        "from_ddp": max(row["fp32_from_ddp"] for row in rows),
        "from_one_device": max(row.get("fp32_from_one_device", 0.0) for row in rows),
        "bf16_over_ddps": max(row["bf16_from_ddp_fp32"] / row["ddp_bf16_from_ddp_fp32"] for row in rows),
    }
    return {
        name: {"most": value, "bound": BOUNDS[name], "holds": value <= BOUNDS[name]} for name, value in found.items()
    }


if __name__ == "__main__":
    main()
