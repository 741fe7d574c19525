"""One line in the log about what a fit runs with."""

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lightning_tricks.engines._protocol import Engine
from lightning_tricks.engines._select import engine_of

__all__ = ["headline", "log_headline"]


def log_headline(trainer: Trainer) -> None:
    """Log the line if this is a fit, on rank 0, as Lightning logs its own: at level INFO."""
    if trainer.state.fn == TrainerFn.FITTING:
        rank_zero_info(headline(engine_of(trainer)))


def headline(engine: Engine) -> str:
    """The engine, its dtypes, and the bytes of this rank that are there before the first step."""
    words, memory, ranks = engine.precision().words(), engine.memory(), engine.world_size
    kinds = {"parameters": memory.parameters, "masters": memory.masters, "gradients": memory.gradients}
    kinds |= {"optimizer state": memory.optimizer, "buffers": memory.buffers}
    parts = [f"{part} {kind}" for kind, part in kinds.items() if part is not None and part.total]
    parts += [f"{memory.words()['engine']} engine's own"] * bool(memory.engine)
    return (
        f"{engine.name} on {ranks} rank{'s' * (ranks > 1)}: parameters {words['parameters']}, masters"
        f" {words['masters']}, computes in {words['compute']}, reduces in {words['reduction']}; per rank"
        f" {', '.join(parts)} before the first step"
    )
