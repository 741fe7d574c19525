"""What each engine does exactly, what it refuses and why: data, of which errors and `docs/engines.md` are made."""

from dataclasses import dataclass
from typing import Any

from lightning_tricks.engines._refusals import ENGINES, REFUSALS, ZERO, Refusal
from lightning_tricks.errors import MisconfigurationError, UnsupportedError

__all__ = ["ENGINES", "REFUSALS", "Capability", "Refusal", "capabilities", "capability_tables", "refusal"]


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
    "leave_out": (
        "before a step",
        "all ranks alike",
        "takes their gradients away",
        "as on one device",
        "zeroes their gradients and skips their flat pieces, which must be whole parameter groups",
    ),
    "awaits_gradients": (
        "once training runs",
        "no",
        "no; under DDP yes",
        "yes",
        "yes",
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
    "unscaled_loss": (
        "in `on_before_backward`",
        "no",
        "divided by the scaler's scale",
        "as on one device",
        "as it is: DeepSpeed scales later",
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
    "put_shards_alone": (
        "after an exception",
        "no",
        "copies",
        "writes this rank's rows",
        "as `put_shards` on one rank; on several it writes nothing, and says so",
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
    "capture_state": (
        "between steps",
        "no",
        "copies, on the device that holds them",
        "copies of this rank's parts",
        "copies of this rank's parts, those on the host there",
    ),
    "restore_state": (
        "between steps",
        "yes",
        "copies back",
        "writes this rank's parts",
        "writes masters and moments; low-precision copies are refreshed",
    ),
    "keep_in_checkpoint": (
        "`on_save_checkpoint`",
        "yes",
        "whole, in the file",
        "a file in the folder",
        "a file in the folder",
    ),
    "find_in_checkpoint": (
        "`on_load_checkpoint`",
        "no",
        "every tensor whole",
        "each rank reads its rows",
        "each rank reads its stretches",
    ),
    "training_forward": (
        "between steps",
        "yes",
        "the module's step, past DDP",
        "through the strategy",
        "through the strategy",
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
    "put_shards_alone": "writes this rank's stretches",
    "load_shards": "each rank reads its stretches",
    "keep_in_checkpoint": "whole, in what rank 0 writes",
    "find_in_checkpoint": "each rank cuts out its stretches",
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
    column = 4 if engine in ZERO else 3 if engine in ("fsdp2", "fsdp1") else 2
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
