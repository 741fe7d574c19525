"""The nets that benchmarks/adapters.py compares: ours, peft's, and the frozen one, which no adapter can beat."""

import copy
import importlib.util
import warnings
from typing import NamedTuple

import lightning as L
import torch
from torch import nn
from transformers import AutoModel, GPT2Config, GPT2Model

from lightning_tricks.data.packages import minilm_folder
from lightning_tricks.mixins import AdapterMixin, DoRA, LoRA

ALL = ("query", "key", "value", "dense")
FUSED = ("c_attn", "c_proj", "c_fc")
BATCH, LENGTH, RANK, ALPHA = 16, 64, 8, 16


class Row(NamedTuple):
    """One comparison.

    Args:
        model: `minilm`, or `gpt2`: GPT-2 Medium's width, four of its layers, random weights.
        targets: the adapted layers.
        method: LoRA or DoRA.
        dropout: of the adapters' inputs.
        precision: `fp32`, `autocast`, `bf16 base` (all of the model, adapters in fp32), `nf4`, `nf4, autocast`.
        goal: times as fast as peft, at least.
        limit: times the frozen limit, at most.
    """

    model: str
    targets: tuple[str, ...]
    method: type
    dropout: float
    precision: str
    goal: float | None = None
    limit: float | None = None


# part -> name -> comparison; a part takes less than five minutes on one thread
PARTS = {
    "minilm": {
        "LoRA all-linear fp32": Row("minilm", ALL, LoRA, 0.0, "fp32", 1.07, 1.12),
        "LoRA all-linear fp32, dropout 0.1": Row("minilm", ALL, LoRA, 0.1, "fp32", 1.2),
        "LoRA all-linear, bf16 base, fp32 adapters": Row("minilm", ALL, LoRA, 0.0, "bf16 base", 1.25),
    },
    "gpt2": {
        "LoRA all-linear, bf16 base, fp32 adapters, GPT-2 Medium's sizes": Row(
            "gpt2", FUSED, LoRA, 0.0, "bf16 base", 1.25
        ),
    },
    "q, v": {"LoRA q, v fp32 (nothing to win)": Row("minilm", ("query", "value"), LoRA, 0.0, "fp32")},
    "dora": {
        "DoRA all-linear fp32": Row("minilm", ALL, DoRA, 0.0, "fp32", 1.2, 1.22),
        "DoRA all-linear fp32, dropout 0.1": Row("minilm", ALL, DoRA, 0.1, "fp32"),
        "DoRA all-linear, autocast": Row("minilm", ALL, DoRA, 0.0, "autocast", 1.4),
    },
    "nf4": {
        "LoRA all-linear, NF4 base, fp32": Row("minilm", ALL, LoRA, 0.0, "nf4", 1.2),
        "LoRA all-linear, NF4 base, autocast": Row("minilm", ALL, LoRA, 0.0, "nf4, autocast", 1.2),
    },
}
ROWS = {name: row for rows in PARTS.values() for name, row in rows.items()}


class Holder(AdapterMixin, L.LightningModule):
    """Holds a network to adapt."""

    def __init__(self, net):
        super().__init__()
        self.net = net


def has_bitsandbytes():
    return importlib.util.find_spec("bitsandbytes") is not None


def base(model, layers=4):
    if model == "minilm":
        encoder = AutoModel.from_pretrained(str(minilm_folder()))
        encoder.pooler = None
    else:
        encoder = GPT2Model(GPT2Config(n_embd=1024, n_head=16, n_layer=layers, vocab_size=2000, n_positions=LENGTH))
        encoder.config.use_cache = False
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the same work on every side
    return encoder


def sides(row, which=("ours", "peft", "frozen")):
    plain = base(row.model)
    if row.precision == "bf16 base":
        plain = plain.bfloat16()
    builders = {"ours": ours, "peft": theirs, "frozen": frozen}
    return {side: builders[side](copy.deepcopy(plain), row).train() for side in which}


def ours(net, row):
    holder = Holder(net)
    method = row.method(rank=RANK, alpha=ALPHA, targets=row.targets, dropout=row.dropout)
    holder.adapt(holder.net, method, base="nf4" if row.precision.startswith("nf4") else None)
    return holder.net


def theirs(net, row):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import LoraConfig, get_peft_model

        if row.precision.startswith("nf4"):
            in_four_bits(net, row.targets)
        config = LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=list(row.targets),
            lora_dropout=row.dropout,
            use_dora=row.method is DoRA,
        )
        return get_peft_model(net, config)


def in_four_bits(net, targets):
    """The targets as bitsandbytes' layers: NF4 in blocks of 64, double quantisation."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, module in list(net.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets:
            layer = Linear4bit(module.in_features, module.out_features, quant_type="nf4", compress_statistics=True)
            layer.weight = Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
            ).to("cpu")
            layer.bias = module.bias
            net.set_submodule(name, layer)
    net.is_loaded_in_4bit = True


def frozen(net, row):
    net.requires_grad_(False)
    first = next(m for name, m in net.named_modules() if name.rpartition(".")[2] in row.targets)
    first.register_forward_hook(lambda _module, _inputs, out: out.detach().requires_grad_(True))
    return net


def tokens(scale=1):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2000, (BATCH * scale**2, LENGTH * scale), generator=generator)


def step(net, ids, precision):
    with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in precision):
        loss = net(input_ids=ids)[0].float().square().mean()
    loss.backward()
    for parameter in net.parameters():
        parameter.grad = None


def require_the_same(built, ids, row):
    """Both sides compute the same before they are timed, with adapters that change something.

    NF4 is 0.34 from fp32 on these tokens, and 0.12 from NF4 with scales that are rounded otherwise. It is asked with
    gradients: without them bitsandbytes converts its weights to bf16.
    """
    limit = 0.2 if row.precision.startswith("nf4") else 1e-4 if row.precision == "fp32" else 0.03
    for side in ("ours", "peft"):
        built[side].eval()  # dropout draws other masks on each side
    fresh = _output(built["ours"], ids)
    fill_alike(built["ours"], built["peft"])
    one, other = _output(built["ours"], ids), _output(built["peft"], ids)
    changed, worst = (float((one - wanted).norm() / wanted.norm()) for wanted in (fresh, other))
    for side in ("ours", "peft"):
        built[side].train()
    if worst > limit:
        raise SystemExit(f"ours and peft's differ by {worst:.5f}: this would compare different things")
    if changed < 2 * limit:
        raise SystemExit(f"the adapters change the output by {changed:.5f}, too little to tell whether they are right")


def fill_alike(ours, peft):
    """Give both nets the same adapters. Fresh ones add nothing: nets that ignored them would agree as well."""
    generator = torch.Generator().manual_seed(0)
    theirs = dict(peft.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            values = parameter.detach()
            if name.endswith("lora_B"):  # peft has it the other way round
                values.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
                values = values.t()
            key = name.replace("lora_magnitude", "lora_magnitude_vector")
            theirs[f"base_model.model.{key}.default.weight"].detach().copy_(values)


def _output(net, ids):
    return net(input_ids=ids[:2])[0].detach().float()
