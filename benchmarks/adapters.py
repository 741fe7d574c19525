"""A training step with adapters, beside peft's and beside the frozen limit, on one thread.

Run it by `python benchmarks/adapters.py`: about ten minutes. The sides take turns, step by step, in one process; what
counts is CPU time of forward and backward. The frozen limit is the model without adapters, whose gradients start at the
first adapted layer's output: no adapter can be quicker. Peak memory is of processes of their own.
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
from torch import nn

sys.path.insert(0, str(_report.FOLDER.parent))

import lightning as L
from transformers import AutoModel, GPT2Config, GPT2Model

from lightning_tricks.data.packages import minilm_folder
from lightning_tricks.mixins import AdapterMixin, DoRA, LoRA

ALL = ("query", "key", "value", "dense")
FUSED = ("c_attn", "c_proj", "c_fc")
BATCH, LENGTH, RANK, ALPHA = 16, 64, 8, 16

# row -> model, targets, method, dropout, precision, and the goals: over peft at least, over the frozen limit at most
ROWS = {
    "LoRA all-linear fp32": ("minilm", ALL, LoRA, 0.0, "fp32", 1.07, 1.12),
    "LoRA all-linear fp32, dropout 0.1": ("minilm", ALL, LoRA, 0.1, "fp32", 1.2, None),
    "LoRA all-linear, bf16 base, fp32 adapters": ("minilm", ALL, LoRA, 0.0, "bf16 base", 1.25, None),
    "LoRA all-linear, bf16 base, fp32 adapters, GPT-2 Medium's sizes": (
        "gpt2", FUSED, LoRA, 0.0, "bf16 base", 1.25, None,
    ),
    "DoRA all-linear fp32": ("minilm", ALL, DoRA, 0.0, "fp32", 1.2, 1.22),
    "DoRA all-linear, autocast": ("minilm", ALL, DoRA, 0.0, "autocast", 1.4, None),
    "LoRA q, v fp32 (nothing to win)": ("minilm", ("query", "value"), LoRA, 0.0, "fp32", None, None),
}  # fmt: skip


class Holder(AdapterMixin, L.LightningModule):
    """Holds a network to adapt."""

    def __init__(self, net):
        super().__init__()
        self.net = net


def base(model):
    if model == "minilm":
        encoder = AutoModel.from_pretrained(str(minilm_folder()))
        encoder.pooler = None
    else:  # GPT-2 Medium's width, four of its layers, random weights
        config = GPT2Config(n_embd=1024, n_head=16, n_layer=4, vocab_size=2000, n_positions=LENGTH)
        encoder = GPT2Model(config)
        encoder.config.use_cache = False
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the same work on every side
    return encoder


def sides(row, which=("ours", "peft", "frozen")):
    model, targets, method, dropout, precision, *_ = ROWS[row]
    plain = base(model)
    if precision == "bf16 base":
        plain = plain.bfloat16()
    built = {}
    if "ours" in which:
        holder = Holder(copy.deepcopy(plain))
        holder.adapt(holder.net, method(rank=RANK, alpha=ALPHA, targets=targets, dropout=dropout))
        built["ours"] = holder.net
    if "peft" in which:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(
                r=RANK, lora_alpha=ALPHA, target_modules=list(targets), lora_dropout=dropout, use_dora=method is DoRA
            )
            built["peft"] = get_peft_model(copy.deepcopy(plain), config)
    if "frozen" in which:
        built["frozen"] = frozen(copy.deepcopy(plain), targets)
    return {side: net.train() for side, net in built.items()}


def frozen(net, targets):
    net.requires_grad_(False)
    first = next(m for name, m in net.named_modules() if name.rpartition(".")[2] in targets)
    first.register_forward_hook(lambda _module, _inputs, out: out.detach().requires_grad_(True))
    return net


def step(net, ids, precision):
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        loss = net(input_ids=ids)[0].float().square().mean()
    loss.backward()
    for parameter in net.parameters():
        parameter.grad = None


def compare(row, steps):
    precision = ROWS[row][4]
    built = sides(row)
    ids = torch.randint(0, 2000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    seconds = {side: [] for side in built}
    for turn in range(steps + 2):
        order = list(built) if turn % 2 else list(built)[::-1]
        for side in order:
            start = time.process_time()
            step(built[side], ids, precision)
            if turn >= 2:
                seconds[side].append(time.process_time() - start)
    medians = {side: statistics.median(each) for side, each in seconds.items()}
    by_peft = statistics.median(p / o for p, o in zip(seconds["peft"], seconds["ours"], strict=True))
    by_limit = statistics.median(o / f for o, f in zip(seconds["ours"], seconds["frozen"], strict=True))
    found = {
        "times as fast as peft": round(by_peft, 3),
        "goal": ROWS[row][5],
        "times the frozen limit": round(by_limit, 3),
        "at most": ROWS[row][6],
        "peft, times the frozen limit": round(
            statistics.median(p / f for p, f in zip(seconds["peft"], seconds["frozen"], strict=True)), 3
        ),
        "milliseconds": {side: round(1e3 * value, 1) for side, value in medians.items()},
    }
    print(row, found, flush=True)
    return found


def peak(row, side):
    """Peak resident memory above what is there once the model is built, in MiB, in a process of its own."""
    ran = subprocess.run([sys.executable, __file__, "--peak", row, side], capture_output=True, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def measure_peak(row, side):
    net = sides(row, (side,))[side]
    ids = torch.randint(0, 2000, (4 * BATCH, 2 * LENGTH))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        step(net, ids, ROWS[row][4])
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"peak": round(after / 1024), "above the model": round((after - before) / 1024)}))


def switching(count=8, rounds=20):
    """Milliseconds to activate one of several adapters, and to merge and unmerge, ours and peft's."""
    plain = base("gpt2")
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
        verbs = {
            "switch": {
                "ours": lambda turn: holder.use_adapters(f"a{turn % count}"),
                "peft": lambda turn: theirs.set_adapter(f"a{turn % count}"),
            },
            "merge and unmerge": {
                "ours": lambda _turn: (holder.merge_adapters(), holder.unmerge_adapters()),
                "peft": lambda _turn: (theirs.merge_adapter(), theirs.unmerge_adapter()),
            },
        }
        found = {}
        for verb, two in verbs.items():
            seconds = {side: [] for side in two}
            for turn in range(rounds):
                for side, call in two.items():
                    start = time.process_time()
                    call(turn)
                    seconds[side].append(time.process_time() - start)
            found[verb] = {side: round(1e3 * statistics.median(each), 2) for side, each in seconds.items()}
    print(found, flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--keep", action="store_true", help="keep the rows of the file that are not measured anew")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=_report.RESULTS / "adapters.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        measure_peak(*options.peak)
        return
    start, busy = time.perf_counter(), _report.load_average()
    kept = json.loads(options.output.read_text())["findings"]["steps"] if options.keep else {}
    found = kept | {row: compare(row, options.steps) for row in options.rows}
    memory = {
        row: {side: peak(row, side) for side in ("ours", "peft")}
        for row in ("DoRA all-linear fp32",)
        if row in options.rows
    }
    _report.write(
        options.output,
        "CPU time of forward and backward with adapters, over peft's and over the frozen limit",
        {"steps": found, "peak MiB": memory, "milliseconds of verbs, GPT-2 Medium's sizes": switching()},
        load_average_before=busy,
        seconds=round(time.perf_counter() - start),
        threads=1,
        batch=[BATCH, LENGTH],
        rank=RANK,
        turns=options.steps,
    )


if __name__ == "__main__":
    main()
