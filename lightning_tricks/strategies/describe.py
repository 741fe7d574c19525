"""What a Trainer's engine really keeps, computes in and allocates."""

from dataclasses import dataclass

from lightning.pytorch import Trainer

from lightning_tricks.engines import Memory, Precisions, engine_of

__all__ = ["Description", "describe"]


@dataclass(frozen=True)
class Description:
    """An engine at one moment, on one rank. `print` it.

    Args:
        engine: the engine's name.
        ranks: the number of processes.
        precision: the dtypes in force.
        memory: the bytes of this rank.
    """

    engine: str
    ranks: int
    precision: Precisions
    memory: Memory

    def __str__(self) -> str:
        dtypes, sizes = self.precision.words(), self.memory.words()
        rows = {"engine": f"{self.engine} on {self.ranks} rank{'s' * (self.ranks > 1)}"}
        rows |= {kind: _both(kind, dtypes, sizes) for kind in ("parameters", "masters")}
        rows |= {kind: dtypes[kind] for kind in ("compute", "reduction", "batch")}
        rows |= {kind: sizes[kind] for kind in ("gradients", "optimizer state", "buffers")}
        rows |= {"engine's own": sizes["engine"], "all": f"{self.memory.total} on this rank"}
        width = max(map(len, rows))
        return "\n".join(f"{kind:<{width}}  {text}" for kind, text in rows.items())


def describe(trainer: Trainer) -> Description:
    """What the engine behind a Trainer keeps, computes in and has allocated on this rank, at this moment.

    Everything is read from the engine and its tensors, nothing from the options. Gradients and the optimizer's state
    are reported once they exist, so ask in `on_before_optimizer_step`, from the second step on, for the most there is.

    Args:
        trainer: a `lightning.pytorch.Trainer` in `on_fit_start` or later; after `fit`, what is left is described.

    Raises:
        MisconfigurationError: if the engine is not set up yet.
        UnsupportedError: if the suite has no engine for the Trainer's strategy.

    Example:
        >>> from lightning import Trainer
        >>> describe(Trainer(accelerator="cpu", logger=False, enable_checkpointing=False))
        Traceback (most recent call last):
        ...
        lightning_tricks.errors.MisconfigurationError: The engine one_device does not exist yet, ...
    """
    engine = engine_of(trainer)
    return Description(engine.name, engine.world_size, engine.precision(), engine.memory())


def _both(kind: str, dtypes: dict[str, str], sizes: dict[str, str]) -> str:
    return dtypes[kind] if sizes[kind] == "none" else f"{dtypes[kind]}, {sizes[kind]}"
