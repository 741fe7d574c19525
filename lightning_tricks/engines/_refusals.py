"""What engines refuse: methods, engines, reasons and remedies, as data."""

from dataclasses import dataclass

__all__ = ["ENGINES", "REFUSALS", "TORCH", "ZERO", "Refusal"]

TORCH = ("one_device", "ddp", "fsdp2", "fsdp1")
ZERO = ("zero_1", "zero_2", "zero_3")
ENGINES = (*TORCH, *ZERO)
_EDITS = ("clip_gradient_units", "clip_gradient_value", "scale_gradient_groups")
_NORMS = ("clip_gradient_norm", *_EDITS, "gradient_norm", "gradient_norms", "scale_gradients", "veto_step")
_STEPS = (*_NORMS, "leave_out")
_SHARDS = (
    "capture_state",
    "load_shards",
    "named_shards",
    "put_shards",
    "put_shards_alone",
    "restore_state",
    "save_shards",
)
_WEIGHTS = ("load_weights", "named_full_weights", "save_weights")
_ALL = (*_STEPS, *_WEIGHTS, *_SHARDS)


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


REFUSALS = {
    "closure": Refusal(
        ENGINES,
        _STEPS,
        "The gradient norm",
        "LBFGS",
        "one step evaluates several gradients",
        "use a first-order optimizer",
    ),
    "fused_scaler": Refusal(
        TORCH,
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
    "nvme_left_out": Refusal(
        ("zero_3",),
        ("leave_out",),
        "Leaving parameters out of a step",
        "zero_3 that swaps to NVMe",
        "the gradients are swapped out before the step",
        "offload to the CPU",
    ),
    "no_norm": Refusal(
        ("zero_1", "zero_2"),
        _STEPS,
        "The gradient norm",
        "ZeRO with `compute_grad_norm: false`",
        "its step asks for no norm, so nothing can be clipped or dropped there",
        "leave `compute_grad_norm` out of the DeepSpeed configuration",
    ),
    "private": Refusal(
        ZERO,
        _STEPS,
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
