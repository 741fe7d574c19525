"""What each engine does exactly, what it refuses and why: data, of which errors and `docs/engines.md` are made."""

from dataclasses import dataclass
from typing import Any

from lightning_tricks.errors import MisconfigurationError, UnsupportedError

__all__ = ["ENGINES", "REFUSALS", "Capability", "Refusal", "capabilities", "capability_tables", "refusal"]

_TORCH = ("one_device", "ddp", "fsdp2", "fsdp1")
_ZERO = ("zero_1", "zero_2", "zero_3")
ENGINES = (*_TORCH, *_ZERO)
_EDITS = ("clip_gradient_units", "clip_gradient_value", "scale_gradient_groups")
_NORMS = ("clip_gradient_norm", *_EDITS, "gradient_norm", "gradient_norms", "scale_gradients", "veto_step")
_SHARDS = ("load_shards", "named_shards", "put_shards", "save_shards")
_WEIGHTS = ("load_weights", "named_full_weights", "save_weights")
_ALL = (*_NORMS, *_WEIGHTS, *_SHARDS)


@dataclass(frozen=True)
class Refusal:
    """Something that an engine does not do, since it could not do it exactly.

    Args:
        engines: the names of the engines that refuse.
        methods: the methods of `Engine` that raise.
        what: what cannot be done.
        where: the circumstances; names in braces are filled in when it is raised.
        reason: why, as a clause.
        instead: what to use instead, as an imperative clause.
    """

    engines: tuple[str, ...]
    methods: tuple[str, ...]
    what: str
    where: str
    reason: str
    instead: str


@dataclass(frozen=True)
class Capability:
    """What one method of `Engine` does on one engine.

    Args:
        method: the method's name.
        phase: when it may be called.
        collective: which ranks must call it together.
        exact: what the answer is.
        refused: what it does not do.
    """

    method: str
    phase: str
    collective: str
    exact: str
    refused: tuple[Refusal, ...]


REFUSALS = {
    "closure": Refusal(
        ENGINES,
        _NORMS,
        "The gradient norm",
        "LBFGS",
        "one step evaluates several gradients",
        "use a first-order optimizer",
    ),
    "fused_scaler": Refusal(
        _TORCH,
        _NORMS,
        "The gradient norm",
        "{engine} with precision '16-mixed'",
        "a fused {optimizer} unscales its gradients inside its step",
        "pass `fused=False` to the optimizer, or use `precision='bf16-mixed'`",
    ),
    "sparse_units": Refusal(
        ("one_device", "ddp"),
        ("clip_gradient_units",),
        "Clipping units",
        "{engine} with sparse gradients",
        "a unit of such a gradient may lie in several pieces",
        "leave `sparse=True` out of the embedding, or exclude it",
    ),
    "nvme_gradients": Refusal(
        ("zero_3",),
        _EDITS,
        "Clipping parts of the gradients",
        "zero_3 that swaps to NVMe",
        "the gradients are swapped out before the step",
        "clip the norm of the whole, or offload to the CPU",
    ),
    "no_norm": Refusal(
        ("zero_1", "zero_2"),
        _NORMS,
        "The gradient norm",
        "ZeRO with `compute_grad_norm: false`",
        "its step asks for no norm, so nothing can be clipped or dropped there",
        "leave `compute_grad_norm` out of the DeepSpeed configuration",
    ),
    "private": Refusal(
        _ZERO,
        _NORMS,
        "The gradient norm",
        "DeepSpeed {version}",
        "its {optimizer} has no `{name}`",
        "install the DeepSpeed of constraints.txt, or set no `data_types` in its configuration",
    ),
    "state": Refusal(
        ENGINES,
        _WEIGHTS,
        "Saving weights",
        "{engine}",
        "the module's state dict holds `{name}`, which is neither a parameter nor a buffer",
        "register it with `register_buffer`",
    ),
    "tensor_parallel": Refusal(
        ("fsdp2",),
        _SHARDS,
        "Reading a rank's part of the weights",
        "fsdp2 with tensor parallelism",
        "`{name}` is not cut along its first dimension alone",
        "use `named_full_weights()`, or shard with FSDP2 alone",
    ),
    "nvme": Refusal(
        ("zero_3",),
        ("load_weights", *_SHARDS),
        "Reading or writing a rank's part of the weights",
        "zero_3 that swaps to NVMe",
        "the masters are swapped out",
        "offload to the CPU",
    ),
    "flat_parameters": Refusal(
        ("fsdp1",),
        _ALL,
        "A trick",
        "fsdp1 with `use_orig_params=False`",
        "one flat parameter hides which parameter a gradient belongs to",
        "leave `use_orig_params` out, or use `strategy='fsdp2'`",
    ),
    "outside_units": Refusal(
        ("fsdp1",),
        _ALL,
        "A trick",
        "fsdp1",
        "`{name}` is trained outside of every FSDP unit, so that each rank trains one of its own",
        "let the strategy wrap the whole module, or freeze that parameter",
    ),
    "copies_of_one": Refusal(
        ("fsdp1",),
        _ALL,
        "A trick",
        "fsdp1 with one rank for each copy of the model",
        "torch then averages no gradient between the copies, which part ways",
        "use `sharding_strategy='NO_SHARD'`, or `strategy='ddp'`",
    ),
    "strided": Refusal(
        ("fsdp1",),
        _ALL,
        "A trick",
        "fsdp1",
        "a parameter of shape {shape} does not lie row by row in memory, so that a rank's stretch of it has gaps",
        "leave `channels_last` out, or use `strategy='fsdp2'`",
    ),
    "private_fsdp1": Refusal(
        ("fsdp1",),
        _ALL,
        "A trick",
        "torch {version}",
        "its FSDP1 has no `{name}`",
        "install the torch of constraints.txt, or use `strategy='fsdp2'`",
    ),
}

# method: phase, collective, then what it is on one device and DDP, on FSDP2, and on ZeRO
_METHODS = {
    "claim_gradient_clipping": (
        "setup",
        "no",
        "refuses `gradient_clip_val` and a second claim",
        "as on one device",
        "also refuses the DeepSpeed configuration's clipping",
    ),
    "is_optimizer_step": ("before a step", "no", "yes", "yes", "yes with our flags; DeepSpeed's answer otherwise"),
    "gradient_norm": (
        "before a step",
        "yes",
        "norm of what DDP averaged",
        "shards' squares summed in fp64",
        "DeepSpeed's own, which the step then reuses",
    ),
    "gradient_norms": (
        "before a step",
        "yes",
        "norms of groups of parameters",
        "shards' squares summed in fp64, in one reduction",
        "of the gradients that each rank keeps, in one reduction",
    ),
    "clip_gradient_norm": (
        "before a step",
        "yes",
        "scales gradients in place",
        "scales shards in place",
        "sets the limit of this one step; waits for the norm, as the step would",
    ),
    "clip_gradient_value": (
        "before a step",
        "yes",
        "clamps gradients in place",
        "clamps shards in place, and asks all ranks whether it did",
        "clamps the fp32 gradients within the step, and asks all ranks whether it will",
    ),
    "clip_gradient_units": (
        "before a step",
        "yes",
        "scales rows in place",
        "shards' squares summed in fp64, in one reduction",
        "squares summed likewise; scales the fp32 gradients within the step",
    ),
    "scale_gradient_groups": (
        "before a step",
        "all ranks alike",
        "in place",
        "shards in place",
        "the fp32 gradients, within the step",
    ),
    "scale_gradients": (
        "before a step",
        "yes",
        "multiplies gradients in place",
        "multiplies shards in place",
        "multiplies the fp32 gradients within the step, before it clips",
    ),
    "veto_step": (
        "before a step",
        "all ranks or none",
        "takes the gradients away and keeps the scaler's count",
        "as on one device",
        "makes the norm that the step asks for infinite and keeps the loss scale",
    ),
    "was_step_applied": (
        "after a step",
        "no",
        "whether the optimizer ran on gradients",
        "as on one device",
        "DeepSpeed's answer",
    ),
    "scales_loss": (
        "once training runs",
        "no",
        "whether a gradient scaler is at work",
        "as on one device",
        "whether DeepSpeed trains in fp16",
    ),
    "named_full_weights": (
        "between steps",
        "yes",
        "a copy of one tensor at a time",
        "one tensor gathered at a time",
        "one fp32 master gathered at a time",
    ),
    "save_weights": (
        "between steps",
        "yes",
        "streamed to one file",
        "streamed to one file",
        "streamed to one file, fp32 masters",
    ),
    "write_on_rank_zero": ("between steps", "yes", "the disk's error on every rank", "the same", "the same"),
    "load_weights": (
        "between steps",
        "yes",
        "copies",
        "each rank reads its rows",
        "each rank reads its elements; low-precision copies are refreshed",
    ),
    "named_shards": (
        "between steps",
        "no",
        "every parameter whole",
        "this rank's rows",
        "this rank's stretch of the fp32 masters",
    ),
    "put_shards": (
        "between steps",
        "yes",
        "copies",
        "writes this rank's rows",
        "writes the masters; low-precision copies are refreshed",
    ),
    "save_shards": (
        "between steps",
        "yes",
        "rank 0's values, streamed to one file",
        "one tensor gathered at a time, streamed to one file",
        "one tensor gathered at a time, streamed to one file",
    ),
    "load_shards": (
        "between steps",
        "no",
        "every tensor whole",
        "each rank reads its rows",
        "each rank reads its stretches",
    ),
    "sum_over_ranks": ("once training runs", "yes", "a sum", "a sum", "a sum"),
    "broadcast": ("once training runs", "yes", "rank 0's value, or another's", "the same", "the same"),
    "barrier": ("once training runs", "yes", "waits", "waits", "waits"),
    "memory": (
        "`on_fit_start` or later",
        "no",
        "the storages of its tensors; DDP's buckets as its reducer gives them",
        "this rank's shards, and what is gathered",
        "this rank's parts, and whatever else DeepSpeed's optimizer keeps",
    ),
    "precision": (
        "`on_fit_start` or later",
        "no",
        "autocast asked for a product; DDP's hook asked for the reduction",
        "the policy that each parameter is sharded with",
        "dtypes of the copies held; the engine's reduction",
    ),
}
# what FSDP1 does otherwise than FSDP2
_FSDP1 = {
    "claim_gradient_clipping": "as on one device; Lightning itself cannot clip by the norm there",
    "load_weights": "each rank reads its stretches",
    "named_full_weights": "one tensor gathered at a time, not a unit",
    "named_shards": "this rank's stretch of each parameter",
    "put_shards": "writes this rank's stretches",
    "load_shards": "each rank reads its stretches",
    "memory": "this rank's flat parameters, padding included, and what is gathered",
    "precision": "the dtypes that each unit is built with",
}
_GENERIC = {
    "engine": "this engine",
    "optimizer": "optimizer",
    "name": "…",
    "shape": "…",
    "version": "of another version",
}


def capabilities(engine: str) -> tuple[Capability, ...]:
    """What each method of `Engine` does on an engine, and what is refused there.

    Args:
        engine: `one_device`, `ddp`, `fsdp2`, `fsdp1`, `zero_1`, `zero_2` or `zero_3`.

    Raises:
        MisconfigurationError: if there is no such engine.

    Example:
        >>> {entry.method: entry.exact for entry in capabilities("fsdp2")}["named_shards"]
        "this rank's rows"
    """
    if engine not in ENGINES:
        raise MisconfigurationError(f"there is no engine `{engine}`: choose one of {', '.join(ENGINES)}.")
    column = 4 if engine in _ZERO else 3 if engine in ("fsdp2", "fsdp1") else 2
    return tuple(
        Capability(
            method,
            words[0],
            words[1],
            (engine == "fsdp1" and _FSDP1.get(method)) or words[column],
            tuple(entry for entry in REFUSALS.values() if engine in entry.engines and method in entry.methods),
        )
        for method, words in _METHODS.items()
    )


def refusal(key: str, **names: Any) -> UnsupportedError:
    """The error of a refusal, its names filled in.

    Example:
        >>> refusal("closure").instead
        'use a first-order optimizer'
    """
    entry = REFUSALS[key]
    return UnsupportedError(entry.what, entry.where.format(**names), entry.reason.format(**names), entry.instead)


def capability_tables() -> str:
    """The two tables of `docs/engines.md`, in Markdown."""
    columns = [capabilities(engine) for engine in ("one_device", "fsdp2", "fsdp1", "zero_3")]
    exact = [
        _row(f"`{plain.method}`", plain.phase, plain.collective, plain.exact, fsdp2.exact, fsdp1.exact, zero.exact)
        for plain, fsdp2, fsdp1, zero in zip(*columns, strict=True)
    ]
    refused = [
        _row(
            ", ".join(f"`{method}`" for method in entry.methods),
            "all" if entry.engines == ENGINES else ", ".join(entry.engines),
            entry.where.format(**_GENERIC),
            entry.reason.format(**_GENERIC),
            entry.instead,
        )
        for entry in REFUSALS.values()
    ]
    first = [
        _row("method", "phase", "collective", "one device, DDP", "FSDP2", "FSDP1", "ZeRO 1-3"),
        "|---" * 7 + "|",
        *exact,
    ]
    second = [_row("methods", "engines", "refused with", "because", "instead"), "|---" * 5 + "|", *refused]
    return "\n".join([*first, "", *second, ""])


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
