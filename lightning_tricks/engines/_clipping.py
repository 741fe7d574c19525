"""Who clips gradients besides callbacks: the Trainer, and DeepSpeed's configuration."""

from typing import Any

from lightning.pytorch import Trainer

__all__ = ["deepspeed_config", "deepspeed_threshold", "options_that_clip"]


def options_that_clip(trainer: Trainer) -> list[str]:
    """The options that clip gradients, in the words of an error."""
    found = []
    if trainer.gradient_clip_val:
        found.append(f"`Trainer(gradient_clip_val={trainer.gradient_clip_val})`")
    if threshold := deepspeed_threshold(trainer):
        found.append(f"the DeepSpeed configuration (`gradient_clipping: {threshold}`)")
    return found


def deepspeed_threshold(trainer: Trainer) -> float | None:
    """What DeepSpeed's configuration clips at, if that is not what the Trainer says: it would win in silence.

    Lightning copies the Trainer's value into the configuration when a fit begins.
    """
    threshold: float | None = deepspeed_config(trainer).get("gradient_clipping")
    return None if (threshold or 0) == (trainer.gradient_clip_val or 0) else threshold


def deepspeed_config(trainer: Trainer) -> dict[str, Any]:
    """DeepSpeed's configuration; empty under any other strategy."""
    config: dict[str, Any] = getattr(trainer.strategy, "config", None) or {}
    return config
