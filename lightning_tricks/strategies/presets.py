"""The strategy presets: functions for those who set options, and the table of flags that name them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from lightning.pytorch.strategies import Strategy, StrategyRegistry
from torch.nn import Module

from lightning_tricks.engines import FSDP2Strategy, ZeroStrategy

__all__ = ["PRECISION_SUFFIXES", "PRESETS", "Preset", "flags", "fsdp2", "register", "zero"]


class Preset(NamedTuple):
    """What a flag stands for.

    Args:
        function: builds the strategy.
        arguments: what the flag passes to it.
        doc: one line.

    Example:
        >>> PRESETS["zero_2"].arguments
        {'stage': 2}
    """

    function: Callable[..., Strategy]
    arguments: dict[str, Any]
    doc: str


def zero(
    *,
    stage: Literal[1, 2, 3] | None = None,
    bucket_size: int | Literal["auto"] = "auto",
    activation_checkpointing: Literal["blocks"] | Sequence[str] | Callable[[Module], bool] | None = None,
    offload: Literal["cpu", "nvme"] | Path | str | None = None,
    precision: Literal["bf16-mixed", "16-mixed"] | None = None,
    config: dict[str, Any] | str | Path | None = None,
) -> ZeroStrategy:
    """DeepSpeed ZeRO: optimizer state, gradients and parameters divided over the ranks, on GPU and on CPU.

    Needs DeepSpeed: `pip install 'lightning-tricks[deepspeed]'`.

    Args:
        stage: what is divided: 1 optimizer state, 2 gradients as well, 3 parameters as well; `None` is 2,
            unless `config` says otherwise.
        bucket_size: elements (1 to about 2e8) reduced or gathered at once; `"auto"` scales it to the model.
        activation_checkpointing: `"blocks"` computes the model's repeated blocks again in the backward pass, instead
            of keeping what they computed; a list of class names, or a function that is true of a part: those parts.
        offload: `"cpu"` keeps optimizer state and fp32 master weights in the host's memory, and updates them there; at
            stage 3 the parameters as well. The path of a folder, at stage 3, swaps all of these to it, and needs the
            Debian packages g++ and libaio-dev; `"nvme"` takes the folder from the environment variable
            LIGHTNING_TRICKS_NVME. A string is a path if it holds a separator.
        precision: what the Trainer's `precision` is to be; `None` leaves it to the Trainer and to `config`.
        config: a DeepSpeed configuration of your own, a dict or the path of a JSON file: what it leaves out, or leaves
            to "auto", is as without it. `docs/engines.md` says what is held against what.

    Raises:
        MissingDependencyError: if DeepSpeed is not installed.
        MisconfigurationError: if an option is out of range, or `config` contradicts one.

    Example:
        >>> from lightning_tricks.strategies import zero
        >>> zero(stage=4)
        Traceback (most recent call last):
        ...
        lightning_tricks.errors.MisconfigurationError: `stage` must be 1, 2 or 3, got 4. ...
        >>> zero(stage=2, config={"zero_optimization": {"stage": 3}})
        Traceback (most recent call last):
        ...
        lightning_tricks.errors.MisconfigurationError: `zero(config=...)` sets `zero_optimization.stage` to 3, but ...

    References:
        Rajbhandari et al.: ZeRO: Memory Optimizations Toward Training Trillion Parameter Models (SC 2020).
    """
    return ZeroStrategy(
        stage=stage,
        bucket_size=bucket_size,
        activation_checkpointing=activation_checkpointing,
        offload=offload,
        precision=precision,
        config=config,
    )


def fsdp2(
    *,
    shard: Sequence[str] = (),
    replicate: int | Literal["nodes"] = 1,
    activation_checkpointing: Literal["blocks"] | Sequence[str] | Callable[[Module], bool] | None = None,
    offload: Literal["cpu"] | None = None,
    precision: Literal["bf16-mixed", "16-mixed"] | None = None,
) -> FSDP2Strategy:
    """Fully sharded data parallelism (FSDP2) of an unchanged LightningModule, on GPU and on CPU.

    Args:
        shard: class names of the blocks to shard one by one. Empty: those that a Hugging Face model names, else the
            items of any `ModuleList` whose class occurs in it at least twice.
        replicate: copies of the model (1 to the number of ranks, which it divides), each sharded over ranks that follow
            one another; `"nodes"`: one copy on each machine, so that parameters are gathered within it.
        activation_checkpointing: `"blocks"` computes those blocks again in the backward pass, instead of keeping what
            they computed; a list of class names, or a function that is true of a part: those parts instead.
        offload: `"cpu"` keeps parameters, gradients and optimizer state in the host's memory, and updates them there.
        precision: what the Trainer's `precision` is to be; `None` leaves it to the Trainer.

    Raises:
        MisconfigurationError: if an option is out of range, or a name is not in the module.

    Example:
        >>> from lightning_tricks.strategies import fsdp2
        >>> fsdp2(shard=["Block"]).shard
        ('Block',)

    References:
        Zhao et al.: PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel (VLDB 2023).
    """
    return FSDP2Strategy(
        shard=shard,
        replicate=replicate,
        activation_checkpointing=activation_checkpointing,
        offload=offload,
        precision=precision,
    )


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "fsdp2": Preset(fsdp2, {}, "FSDP2: parameters, gradients and optimizer state divided over the ranks."),
        "fsdp2_offload": Preset(fsdp2, {"offload": "cpu"}, "FSDP2, its shards kept and updated in the host's memory."),
        "hsdp": Preset(
            fsdp2,
            {"replicate": "nodes"},
            "FSDP2 in hybrid: sharded over each machine's ranks, with a copy of the shards on every machine.",
        ),
        "zero_1": Preset(zero, {"stage": 1}, "DeepSpeed ZeRO-1: optimizer state divided over the ranks."),
        "zero_2": Preset(zero, {"stage": 2}, "DeepSpeed ZeRO-2: optimizer state and gradients divided over the ranks."),
        "zero_2_offload": Preset(
            zero,
            {"stage": 2, "offload": "cpu"},
            "DeepSpeed ZeRO-2, optimizer state kept and updated in the host's memory.",
        ),
        "zero_3": Preset(
            zero, {"stage": 3}, "DeepSpeed ZeRO-3: optimizer state, gradients and parameters divided over the ranks."
        ),
        "zero_3_offload": Preset(
            zero,
            {"stage": 3, "offload": "cpu"},
            "DeepSpeed ZeRO-3, parameters and optimizer state kept in the host's memory and updated there.",
        ),
        "zero_3_nvme": Preset(
            zero,
            {"stage": 3, "offload": "nvme"},
            "DeepSpeed ZeRO-3, parameters and optimizer state swapped to the folder LIGHTNING_TRICKS_NVME names.",
        ),
    }
)


PRECISION_SUFFIXES: Mapping[str, Literal["bf16-mixed", "16-mixed"]] = MappingProxyType(
    {"bf16": "bf16-mixed", "fp16": "16-mixed"}
)


def flags() -> dict[str, Preset]:
    """Every flag: those of `PRESETS`, and each of them with a precision as its suffix.

    Example:
        >>> flags()["zero_2_bf16"].arguments
        {'stage': 2, 'precision': 'bf16-mixed'}
    """
    with_precision = {
        f"{flag}_{suffix}": Preset(
            preset.function, {**preset.arguments, "precision": precision}, f"{preset.doc[:-1]}, in {precision}."
        )
        for flag, preset in PRESETS.items()
        for suffix, precision in PRECISION_SUFFIXES.items()
    }
    return {**PRESETS, **with_precision}


def register() -> None:
    """Make all `flags` known to Lightning. `import lightning_tricks` does it.

    Example:
        >>> from lightning.pytorch.strategies import StrategyRegistry
        >>> register()
        >>> "zero_2_bf16" in StrategyRegistry
        True
    """
    for flag, preset in flags().items():
        if flag not in StrategyRegistry:
            StrategyRegistry.register(flag, preset.function, description=preset.doc, **preset.arguments)
