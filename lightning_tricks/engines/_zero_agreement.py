"""Where a user's DeepSpeed configuration, the options of `zero()` and the Trainer name the same thing: one value."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning.pytorch import Trainer
from torch.optim import Optimizer

from lightning_tricks.engines._precision import Mixed
from lightning_tricks.engines._zero_config import Given
from lightning_tricks.errors import MisconfigurationError

__all__ = [
    "Offload",
    "agree_on_batch",
    "agree_on_buckets",
    "agree_on_offload",
    "agree_on_optimizer",
    "agree_on_precision",
    "agree_on_schedule",
    "agree_on_stage",
    "agree_with_trainer",
]

_PRECISIONS: dict[str, Mixed] = {"fp16": "16-mixed", "bf16": "bf16-mixed"}


class Offload(NamedTuple):
    """Where the optimizer state and the parameters are kept: "none", "cpu" or "nvme"; and the folders on NVMe."""

    optimizer: str
    parameters: str
    folders: tuple[Path, ...]


# -- the options of zero() -----------------------------------------------------------------------------------------


def agree_on_stage(given: Given, stage: Any) -> Any:
    """The stage of the option or of the configuration; 2 where neither names one."""
    key = "zero_optimization.stage"
    if stage is not None:
        given.agree(key, "`stage`", stage)
        return stage
    return 2 if given.at(key) is None else given.at(key)


def agree_on_buckets(given: Given, bucket_size: int | Literal["auto"]) -> None:
    """Refuse another size of a bucket than the option's."""
    for name in ("reduce_bucket_size", "allgather_bucket_size"):
        if bucket_size != "auto":
            given.agree(f"zero_optimization.{name}", "`bucket_size`", bucket_size)


def agree_on_offload(given: Given, stage: int, offload: Literal["cpu"] | Path | None) -> Offload:
    """Where the option and the configuration put the optimizer state and, at stage 3, the parameters."""
    key = "zero_optimization.offload_param.device"
    if stage != 3 and given.at(key) not in (None, "none"):
        raise given.conflict(key, "the stage, where parameters are not divided,", stage)
    sections = ("offload_optimizer", "offload_param")[: 2 if stage == 3 else 1]
    wanted = {section: _device(given, section, offload) for section in sections}
    if stage != 3 and wanted["offload_optimizer"] == "nvme":  # DeepSpeed would take it for the host's memory, silently
        where = f"`offload` is '{offload}'" if offload else f"{given.source} sets `offload_optimizer.device` to 'nvme'"
        raise MisconfigurationError(
            f"{where}, and ZeRO swaps to NVMe at stage 3 only, got stage {stage}: set `stage=3`, or `offload='cpu'`."
        )
    folders = [_folder(given, section, offload) for section, device in wanted.items() if device == "nvme"]
    return Offload(wanted["offload_optimizer"], wanted.get("offload_param", "none"), tuple(dict.fromkeys(folders)))


def _device(given: Given, section: str, offload: Literal["cpu"] | Path | None) -> str:
    key = f"zero_optimization.{section}.device"
    if offload is not None:
        wanted = "nvme" if isinstance(offload, Path) else "cpu"
        if given.at(key) not in (None, wanted):
            raise given.conflict(key, "`offload`", f"{offload}")
        return wanted
    device = given.at(key) or "none"
    if device not in ("none", "cpu", "nvme"):
        raise MisconfigurationError(f"{given.source} sets `{key}` to {device!r}: it is 'none', 'cpu' or 'nvme'.")
    return str(device)


def _folder(given: Given, section: str, offload: Literal["cpu"] | Path | None) -> Path:
    key = f"zero_optimization.{section}.nvme_path"
    told = given.at(key)
    if isinstance(offload, Path):
        if told is not None and Path(told) != offload:
            raise given.conflict(key, "`offload`", f"{offload}")
        return offload
    if told is None:
        raise MisconfigurationError(
            f"{given.source} sets `zero_optimization.{section}.device` to 'nvme' and no `nvme_path`: name the folder."
        )
    return Path(told)


def agree_on_precision(given: Given, precision: Any) -> tuple[Any, str, str | None]:
    """The precision of the option or of the configuration, who named it, and what DeepSpeed takes for the same."""
    asked = [name for name in _PRECISIONS if given.at(f"{name}.enabled")]
    if len(asked) == 2:
        raise given.conflict("fp16.enabled", "`bf16.enabled`", True)
    if precision is not None:
        _refuse_other_precision(given, "`precision`", precision)
        return precision, "The strategy's precision", None
    if not asked:
        return None, "", None
    found = _PRECISIONS[asked[0]]
    return found, f"The precision of {given.source} (`{asked[0]}.enabled`)", found.replace("mixed", "true")


def _refuse_other_precision(given: Given, other: str, precision: str) -> None:
    for name, mixed in _PRECISIONS.items():
        key, low = f"{name}.enabled", precision in (mixed, mixed.replace("mixed", "true"))
        if given.at(key) is not None and bool(given.at(key)) != low:
            raise given.conflict(key, other, precision)


# -- the Trainer ---------------------------------------------------------------------------------------------------


def agree_with_trainer(given: Given, trainer: Trainer, precision: str, world: int) -> None:
    """Refuse a Trainer that accumulates, clips or computes otherwise than the configuration says."""
    window = trainer.accumulate_grad_batches
    given.agree("gradient_accumulation_steps", "`Trainer(accumulate_grad_batches)`", window)
    if trainer.gradient_clip_val is not None:
        given.agree("gradient_clipping", "`Trainer(gradient_clip_val)`", trainer.gradient_clip_val)
    _refuse_other_precision(given, "the Trainer's `precision`", precision)
    whole, micro = given.at("train_batch_size"), given.at("train_micro_batch_size_per_gpu")
    if whole is not None and micro is not None and whole != micro * window * world:
        how = "`train_micro_batch_size_per_gpu` x `Trainer(accumulate_grad_batches)` x the number of processes"
        raise given.conflict("train_batch_size", f"{how} ({micro} x {window} x {world})", micro * window * world)


def agree_on_batch(given: Given, trainer: Trainer, loader: Any, world: int) -> None:
    """Refuse a training loader of another batch size; one that has none cannot be checked."""
    size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    if not isinstance(size, int):
        return
    given.agree("train_micro_batch_size_per_gpu", f"the `batch_size` of the training {type(loader).__name__}", size)
    window = trainer.accumulate_grad_batches
    how = "`batch_size` of the training loader x `Trainer(accumulate_grad_batches)` x the number of processes"
    given.agree("train_batch_size", f"{how} ({size} x {window} x {world})", size * window * world)


def agree_on_optimizer(given: Given, module: str, optimizer: Optimizer | None) -> None:
    """Refuse an optimizer of `configure_optimizers` that is not the configuration's, option by option."""
    named = given.at("optimizer.type")
    if named is None or optimizer is None:
        return
    if str(named).lower() != type(optimizer).__name__.lower():
        raise given.conflict("optimizer.type", f"what {module}.configure_optimizers returns", type(optimizer).__name__)
    params = given.at("optimizer.params")
    for name, value in (params if isinstance(params, Mapping) else {}).items():
        told = [group[name] for group in optimizer.param_groups if name in group]
        other = next((found for found in told if _plain(found) != _plain(value)), None)
        if other is not None or not told:
            whose = f"`{name}` of the {type(optimizer).__name__} that {module}.configure_optimizers returns"
            raise given.conflict(f"optimizer.params.{name}", whose, other)


def agree_on_schedule(given: Given, module: str, schedule: Any) -> None:
    """Refuse two learning-rate schedules."""
    named = given.at("scheduler.type")
    if named is not None and schedule is not None:
        raise given.conflict(
            "scheduler.type", f"the schedule that {module}.configure_optimizers returns", type(schedule).__name__
        )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value
