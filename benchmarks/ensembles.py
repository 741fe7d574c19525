"""Averaging five checkpoints against a plain `torch.load` script, and a prediction ensemble stacked or one by one.

`make bench`, or `python benchmarks/ensembles.py`. Averaging: 5 checkpoints of 500 MB each, as a Lightning run leaves
them, from the disk and from the page cache; time and peak memory of a process of its own, three times each, by turns,
one thread.
The bound is what copying takes: the same bytes read into one buffer, and one file of them written and flushed.
Prediction: 5 MiniLM classifiers that differ everywhere, a batch of texts, alternating.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _report
import torch

RESULTS = _report.RESULTS / "ensembles_cost.json"
MEMBERS, TENSORS = 5, 25
MEGABYTES = 500
WAYS = ("copy", "ours", "torch.load")
ONE = """
import json, os, resource, sys, time
import torch
torch.set_num_threads(1)
way, folder, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
paths = [f"{folder}/{place}.ckpt" for place in range(count)]
out = f"{folder}/{way}-out.ckpt"

def copy():
    buffer = bytearray(20_000_000)
    for path in paths:
        with open(path, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    left = os.path.getsize(paths[0])
    with open(out, "wb", buffering=0) as stream:
        while left > 0:
            left -= stream.write(memoryview(buffer)[:left])
        os.fsync(stream.fileno())

def plain():
    total = torch.load(paths[0], map_location="cpu", weights_only=True)
    for path in paths[1:]:
        for name, value in torch.load(path, map_location="cpu", weights_only=True)["state_dict"].items():
            total["state_dict"][name] += value
    for value in total["state_dict"].values():
        value /= len(paths)
    with open(out, "wb") as stream:
        torch.save(total, stream)
        stream.flush()
        os.fsync(stream.fileno())

def ours():
    from lightning_tricks.inference import average_checkpoints
    average_checkpoints(paths, out)

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

run = {"copy": copy, "torch.load": plain, "ours": ours}[way]
if way == "ours":
    import lightning_tricks.inference  # what a script has imported is not timed
before, wall, cpu = status("VmRSS"), time.perf_counter(), time.process_time()
run()
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
os.unlink(out)
print(json.dumps({"wall": wall, "cpu": cpu, "peak_mib": status("VmHWM"), "above_start_mib": status("VmHWM") - before}))
"""


def averaging(folder, megabytes, repeats):
    """Medians of each way, with the members on the disk and in the page cache."""
    elements = megabytes * 1_000_000 // 4 // TENSORS
    for place in range(MEMBERS):
        torch.manual_seed(place)
        state = {f"layer.{index}.weight": torch.randn(elements // 1000, 1000) for index in range(TENSORS)}
        torch.save(
            {"state_dict": state, "global_step": place, "hyper_parameters": {"lr": 0.1}}, folder / f"{place}.ckpt"
        )
    mib = (folder / "0.ckpt").stat().st_size / 2**20
    rows = {where: timed(folder, repeats, evicted=where == "from disk") for where in ("from disk", "from cache")}
    peaks = rows["from cache"].items()
    found = {
        "checkpoint_mib": round(mib, 1),
        "peak_to_checkpoint": {w: round(r["peak_mib"] / mib, 3) for w, r in peaks},
    }
    for where, row in rows.items():
        found[where] = {
            f"speed_to_{other}_{kind}": round(row[way][kind] / row["ours"][kind], 3)
            for other, way in (("copying", "copy"), ("torch_load", "torch.load"))
            for kind in ("wall", "cpu")
        }
    return rows, found


def timed(folder, repeats, *, evicted):
    """Medians of each way, by turns."""
    found = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way in WAYS:
            for path in folder.glob("?.ckpt") if evicted else ():
                evict(path)
            command = [sys.executable, "-W", "ignore", "-c", ONE, way, str(folder), str(MEMBERS)]
            ran = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            found[way].append(json.loads(ran.stdout))
    return {
        way: {key: round(statistics.median(one[key] for one in runs), 3) for key in runs[0]}
        for way, runs in found.items()
    }


def evict(path):
    """Out of the page cache, so that it is read from the disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def prediction(folder, repeats, batch, tokens):
    """CPU seconds a batch, stacked, lazy, and of the members in memory one after another."""
    from lightning_tricks.inference import PredictionEnsemble
    from lightning_tricks.recipes import TextClassifier

    options = {"labels": ["a", "b", "c"], "class_weighting": "none", "tuning": "full"}
    paths, resident = [], []
    for place in range(MEMBERS):
        torch.manual_seed(place)
        model = TextClassifier(**options).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)
        path = folder / f"classifier_{place}.ckpt"
        torch.save({"state_dict": model.state_dict(), "hyper_parameters": options}, path)
        paths.append(path)
        resident.append(model)
    inputs = {
        "input_ids": torch.randint(1000, 20000, (batch, tokens)),
        "attention_mask": torch.ones(batch, tokens, dtype=torch.int64),
    }
    ways = {
        "stacked": PredictionEnsemble(paths, TextClassifier, loading="stacked"),
        "lazy": PredictionEnsemble(paths, TextClassifier, loading="lazy"),
        "in memory, one by one": lambda inputs: torch.stack([each(inputs).softmax(-1) for each in resident]).mean(0),
    }
    seconds = {way: [] for way in ways}
    with torch.no_grad():
        expected = ways["lazy"](inputs)
        for run in ways.values():
            torch.testing.assert_close(run(inputs), expected, rtol=1e-4, atol=1e-5)
        for _ in range(repeats):
            for way, run in ways.items():
                started = time.process_time()
                run(inputs)
                seconds[way].append(time.process_time() - started)
    rows = {way: round(statistics.median(each), 4) for way, each in seconds.items()}
    return rows, {f"{way} to stacked": round(rows[way] / rows["stacked"], 3) for way in rows if way != "stacked"}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=MEGABYTES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        rows, found = averaging(Path(name), options.megabytes, options.repeats)
    with tempfile.TemporaryDirectory() as name:
        passes, ratios = prediction(Path(name), options.repeats + 2, batch=32, tokens=32)
    _report.write(
        options.output,
        "averaging 5 checkpoints against torch.load and against copying; a prediction ensemble stacked or not",
        {"averaging": found, "prediction_cpu_seconds_to_stacked": ratios},
        averaging=rows,
        prediction_cpu_seconds_a_batch=passes,
        members=MEMBERS,
        batch={"texts": 32, "tokens": 32},
    )


if __name__ == "__main__":
    main()
