"""The table that `check` goes by: what engines and options do to tricks. A trick's own rules stay with it."""

from collections.abc import Callable, Mapping

from torch.optim import LBFGS

from lightning_tricks.engines._tricks import InUse, Known, Rule, Situation

__all__ = ["CIRCUMSTANCES", "RULES", "rival", "rules_table"]

Answer = Mapping[str, object] | str | None
_TESTED = ("32-true", "bf16-mixed", "16-mixed")
_LOW = ("bf16-true", "16-true")


def _yes(applies: bool, **names: object) -> Answer:
    return names if applies else None


def _low(situation: Situation) -> dict[str, str]:
    bits = situation.precision.removesuffix("-true")
    return {"dtype": "fp16" if bits == "16" else bits, "mixed": f"{bits}-mixed"}


def rival(job: str) -> Callable[[Situation, InUse], Answer]:
    """Whether another in use does the same job; `{other}` is its name. Of a pair, the first is asked.

    Example:
        >>> Rule(rival("average weights"), "refused", "{trick} and {other} both average", "keep one").verdict
        'refused'
    """

    def found(situation: Situation, used: InUse) -> Answer:
        others = situation.rivals(used, job)
        return {"other": others[0].name} if others else None

    return found


def _stops_twice(situation: Situation, used: InUse) -> Answer:
    """Two of ours may watch two metrics; one of Lightning's beside one of ours is hardly meant."""
    pairs = [other for other in situation.rivals(used, "stop early") if other.ours != used.ours]
    return {"other": pairs[0].name} if pairs else None


def _balances_twice(situation: Situation, used: InUse) -> Answer:
    if found := rival("balance classes")(situation, used):
        return found
    known = situation.fitting and situation.trainer.train_dataloader is not None
    return None if known else "a sampler that balances the classes too is told once the data are set up"


def _averages(callback: str, *engines: str) -> Callable[[Situation, InUse], Answer]:
    def found(situation: Situation, used: InUse) -> Answer:
        names = [base.__name__ for base in type(used.source).__mro__]
        return _yes(not used.ours and callback in names and situation.engine in engines)

    return found


def _beside_masters(situation: Situation, used: InUse) -> Answer:
    trainer = situation.trainer
    one_memory = trainer.precision == "32-true" and not trainer.strategy.handles_gradient_accumulation  # our own flags
    return None if one_memory else _averages("WeightAveraging", "zero_1", "zero_2")(situation, used)


RULES = (
    Rule(
        who="clip gradients",
        when=rival("clip gradients"),
        verdict="refused",
        words="{trick} and {other} both clip gradients",
        remedy="remove one",
    ),
    Rule(
        who="gradient_clip_val",
        when=lambda now, _: _yes(now.zero and now.trainer.gradient_clip_algorithm == "value"),
        verdict="refused",
        words="`gradient_clip_algorithm='value'` cannot be had on {engine}, since DeepSpeed clips by the norm only",
        remedy="use the callback GradientClipping(Value(...)), or clip by the norm",
    ),
    Rule(
        who="gradient_clip_val",
        when=lambda now, _: _yes(now.engine == "fsdp1" and now.trainer.gradient_clip_algorithm != "value"),
        verdict="refused",
        words="Lightning cannot clip by the norm on {engine}",
        remedy="use the callback GradientClipping",
    ),
    Rule(
        who="adapt weights",
        when=lambda now, _: _yes(now.engine == "fsdp1"),
        verdict="refused",
        words="{trick} knows weights by their names and whole, and {engine} renames and flattens them",
        remedy="use `strategy='fsdp2'`",
    ),
    Rule(
        who="gradient_clip_val",
        when=lambda now, _: _yes(not now.module.automatic_optimization),
        verdict="refused",
        words="Lightning does not clip by itself under manual optimisation",
        remedy="call `self.clip_gradients(...)` before the step, or use the callback GradientClipping",
    ),
    Rule(
        who="accumulate_grad_batches",
        when=lambda now, _: _yes(not now.module.automatic_optimization),
        verdict="refused",
        words="Lightning does not accumulate by itself under manual optimisation",
        remedy="leave `accumulate_grad_batches` out, and step when it is due",
    ),
    Rule(
        who="accumulate_grad_batches",
        when=lambda now, _: _yes(now.zero and now.trainer.strategy.handles_gradient_accumulation),
        verdict="degraded",
        words="Lightning's own DeepSpeedStrategy divides the loss by it twice, and its windows cross epochs",
        remedy="use `strategy='{engine}'`",
    ),
    Rule(
        who="change the accumulation",
        when=lambda now, _: _yes(now.zero),
        verdict="refused",
        words="Lightning lets no DeepSpeed strategy change the accumulation during a fit, {engine} included",
        remedy="set `Trainer(accumulate_grad_batches=...)`, or use `strategy='fsdp2'`",
    ),
    Rule(
        who="precision",
        when=lambda now, _: _yes(not now.zero and now.precision in _LOW, **_low(now)),
        verdict="degraded",
        words="weights, gradients and moments are {dtype} themselves, without fp32 masters: small updates are lost",
        remedy="use `precision='{mixed}'`",
    ),
    Rule(
        who="precision",
        when=lambda now, _: _yes(now.zero and now.precision in _LOW, **_low(now)),
        verdict="degraded",
        words="DeepSpeed keeps fp32 masters all the same, so that it is '{mixed}', in memory as in results",
        remedy="use `precision='{mixed}'`, which says so",
    ),
    Rule(
        who="precision",
        when=lambda now, _: _yes(now.precision not in (*_TESTED, *_LOW)),
        verdict="degraded",
        words="the suite's tests do not cover it",
        remedy="use '32-true', 'bf16-mixed' or '16-mixed'",
    ),
    Rule(
        who="average weights",
        when=_averages("WeightAveraging", "fsdp2", "fsdp1", "zero_3"),
        verdict="refused",
        words="{trick} copies whole parameters, and under {engine} a rank holds parts of them",
        remedy="use `strategy='ddp'`",
    ),
    Rule(
        who="average weights",
        when=_beside_masters,
        verdict="degraded",
        words="{trick} leaves its average in the module, and DeepSpeed's fp32 masters keep the weights without it",
        remedy="use `strategy='ddp'`",
    ),
    Rule(
        who="average weights",
        when=_averages("StochasticWeightAveraging", "fsdp2", "fsdp1", "zero_1", "zero_2", "zero_3"),
        verdict="refused",
        words="{trick} cannot average what {engine} shards",
        remedy="use `strategy='ddp'`",
    ),
    Rule(
        who="stop early",
        when=_stops_twice,
        verdict="degraded",
        words="{trick} and {other} both stop the fit, each by its own count: the first to run out of patience ends it",
        remedy="keep one",
    ),
    Rule(
        who="balance classes",
        when=_balances_twice,
        verdict="degraded",
        words="{trick} and {other} both balance the classes: rare ones count twice over",
        remedy="keep one, unless that is meant",
        known="data",
    ),
)


# -- when a refusal of `_capabilities` applies, as far as that can be known before the first step ------------------


def _lbfgs(situation: Situation, _: InUse) -> Answer:
    return _yes(any(isinstance(optimizer, LBFGS) for optimizer in situation.optimizers))


def _fused(situation: Situation, _: InUse) -> Answer:
    if getattr(situation.trainer.precision_plugin, "scaler", None) is None:
        return None
    if not situation.optimizers:
        return "a fused optimizer would be refused, which is known once it is built"
    fused = [type(o).__name__ for o in situation.optimizers if getattr(o, "_step_supports_amp_scaling", False)]
    return _yes(bool(fused), engine=situation.engine, optimizer=", ".join(fused))


def _on_nvme(situation: Situation, _: InUse) -> Answer:
    section = situation.deepspeed_config.get("zero_optimization", {})
    return _yes((section.get("offload_optimizer") or {}).get("device") == "nvme")


CIRCUMSTANCES: Mapping[str, tuple[Known, Callable[[Situation, InUse], Answer]]] = {
    "closure": ("built", _lbfgs),
    "fused_scaler": ("built", _fused),
    "nvme": ("setup", _on_nvme),
    "nvme_gradients": ("setup", _on_nvme),
    "nvme_left_out": ("setup", _on_nvme),
}

_GENERIC = {"trick": "…", "other": "…", "engine": "…", "dtype": "bf16 or fp16", "mixed": "…-mixed"}


def rules_table() -> str:
    """The table in Markdown, for `docs/engines.md`."""
    rows = [("what", "verdict", "why", "instead"), ("---",) * 4]
    rows += [
        (str(rule.who), rule.verdict, rule.words.format(**_GENERIC), rule.remedy.format(**_GENERIC)) for rule in RULES
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
