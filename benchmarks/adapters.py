"""A training step with adapters, beside peft's and beside the frozen limit, on one thread.

Run it by `python benchmarks/adapters.py`, or in parts: `--parts nf4 verbs`. Each part takes less than five minutes, and
its findings replace those of the same part in the file. The sides take turns, step by step, in one process; what counts
is CPU time of forward and backward. A part is run in several processes, and the median one counts: in some of them the
allocator gives memory back to the system at each of peft's steps, and takes it anew, which costs up to a tenth of a
step. The frozen limit is the model without adapters, whose gradients start at the first adapted layer's output: no
adapter can be quicker. Peak memory is of processes of their own. The part `nf4` is beside bitsandbytes, and needs it:
`pip install --no-deps bitsandbytes`, or a folder that has it in PYTHONPATH.
"""

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import _report
import torch

sys.path.insert(0, str(_report.FOLDER.parent))

from _adapter_sides import (
    ALPHA,
    BATCH,
    FUSED,
    LENGTH,
    PARTS,
    RANK,
    ROWS,
    Holder,
    base,
    has_bitsandbytes,
    require_the_same,
    sides,
    step,
    tokens,
)

from lightning_tricks.mixins import LoRA

PEAKS = ("LoRA all-linear fp32", "DoRA all-linear fp32", "LoRA all-linear, NF4 base, fp32")


def compare(name, steps):
    """Medians over turns, and of ratios within a turn."""
    row = ROWS[name]
    built, ids = sides(row), tokens()
    require_the_same(built, ids, row)
    seconds = {side: [] for side in built}
    for turn in range(steps + 2):
        order = list(built) if turn % 2 else list(built)[::-1]
        for side in order:
            start = time.process_time()
            step(built[side], ids, row.precision)
            if turn >= 2:
                seconds[side].append(time.process_time() - start)

    def ratio(first, second):
        pairs = zip(seconds[first], seconds[second], strict=True)
        return round(statistics.median(one / other for one, other in pairs), 3)

    found = {
        "times as fast as peft": ratio("peft", "ours"),
        "goal": row.goal,
        "times the frozen limit": ratio("ours", "frozen"),
        "at most": row.limit,
        "peft, times the frozen limit": ratio("peft", "frozen"),
        "milliseconds": {side: round(1e3 * statistics.median(each), 1) for side, each in seconds.items()},
    }
    print(name, found, file=sys.stderr)
    return found


def median_of(part, steps, processes):
    """Every comparison of a part: medians over processes, and each process's ratio to peft."""
    each = [alone("--alone", part, "--steps", str(steps)) for _ in range(processes)]
    return {name: _median([found[name] for found in each]) for name in each[0]}


def _median(found):
    """Of what several processes found, key by key."""
    first = found[0]
    if isinstance(first, dict):
        medians = {key: _median([each[key] for each in found]) for key in first}
        if "times as fast as peft" in first:
            medians["times as fast as peft, each process"] = [each["times as fast as peft"] for each in found]
        return medians
    return first if first is None else round(statistics.median(found), 3)


def alone(*arguments):
    """The JSON that ends what this file prints in a process of its own."""
    ran = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def peaks():
    """Peak memory of ours over peft's, each in a process of its own."""
    found = {}
    for name in PEAKS:
        if "NF4" in name and not has_bitsandbytes():
            continue
        # Resident MiB at its peak, and what of it is above what is there once the model is built.
        each = {side: alone("--peak", name, side) for side in ("ours", "peft")}
        above = [each[side]["above the model"] for side in ("ours", "peft")]
        whole = [each[side]["peak"] for side in ("ours", "peft")]
        found[name] = {
            **each,
            "ours over peft's": round(whole[0] / whole[1], 3),
            "ours over peft's, above the model": round(above[0] / above[1], 3),
            "goal": 0.6 if "DoRA" in name else None,
        }
        print(name, found[name], flush=True)
    return found


def measure_peak(name, side):
    row = ROWS[name]
    net, ids = sides(row, (side,))[side], tokens(scale=2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        step(net, ids, row.precision)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"peak": round(after / 1024), "above the model": round((after - before) / 1024)}))


def verbs(count=8, rounds=9):
    """Milliseconds to activate one of several adapters, and to merge and unmerge: GPT-2 Medium's 24 layers."""
    plain = base("gpt2", layers=24)
    holder = Holder(copy.deepcopy(plain))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(FUSED))
        theirs = get_peft_model(plain, config, adapter_name="a0")
        for number in range(count):
            holder.adapt(holder.net, LoRA(rank=RANK, alpha=ALPHA, targets=FUSED), name=f"a{number}")
            if number:
                theirs.add_adapter(f"a{number}", config)
        return {
            "switch": turns(
                rounds * 3, lambda turn: holder.use_adapters(f"a{turn % count}"),
                lambda turn: theirs.set_adapter(f"a{turn % count}"),
            ),
            "merge and unmerge": turns(
                rounds, lambda _: (holder.merge_adapters(), holder.unmerge_adapters()),
                lambda _: (theirs.merge_adapter(), theirs.unmerge_adapter()),
            ),
        }  # fmt: skip


def turns(rounds, ours, theirs):
    seconds = {"ours": [], "peft": []}
    for turn in range(rounds):
        for side, call in (("ours", ours), ("peft", theirs)) if turn % 2 else (("peft", theirs), ("ours", ours)):
            start = time.process_time()
            call(turn)
            seconds[side].append(time.process_time() - start)
    found = {side: round(1e3 * statistics.median(each), 2) for side, each in seconds.items()}
    ratios = (p / o for p, o in zip(seconds["peft"], seconds["ours"], strict=True))
    found["times as fast as peft"] = round(statistics.median(ratios), 2)
    print(found, flush=True)
    return found


SECTIONS = {"peak": "peak MiB", "verbs": "milliseconds of verbs, GPT-2 Medium"}


def run(part, steps, processes):
    """The findings of a part, by section of the file."""
    if part in SECTIONS:
        return {SECTIONS[part]: peaks() if part == "peak" else verbs()}
    return {"steps": median_of(part, steps, processes)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=[*PARTS, *SECTIONS], choices=[*PARTS, *SECTIONS])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--alone", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=_report.RESULTS / "adapters.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        measure_peak(*options.peak)
        return
    if options.alone:
        print(json.dumps({name: compare(name, options.steps) for name in PARTS[options.alone]}))
        return
    for part in options.parts:
        if part == "nf4" and not has_bitsandbytes():
            print("the part nf4 was not run: it needs bitsandbytes")
            continue
        start, busy = time.perf_counter(), _report.load_average()
        found = run(part, options.steps, options.processes)
        how = {"load_average_before": busy, "seconds": round(time.perf_counter() - start), "turns": options.steps}
        if part in PARTS:
            how["processes"] = options.processes
        keep(options.output, part, found, {**how, "commit": _report.commit()})


def keep(path, part, found, how):
    """Put a part's findings beside those of the others."""
    before = json.loads(path.read_text()) if path.is_file() else {}
    findings = before.get("findings", {})
    for section, values in found.items():
        findings[section] = {**findings.get(section, {}), **values}
    _report.write(
        path,
        "CPU time of forward and backward with adapters, over peft's and over the frozen limit",
        findings,
        parts={**before.get("parts", {}), part: how},
        threads=1,
        batch=[BATCH, LENGTH],
        rank=RANK,
    )


if __name__ == "__main__":
    main()
