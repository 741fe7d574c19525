"""A ZeRO checkpoint folder, of any number of ranks, read back into a live engine."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy

from lightning_tricks.engines._universal import convert_for_other_ranks, loads_universal, restore_the_rest

__all__ = ["leaves_frozen_out", "load_folder"]


def load_folder(strategy: DeepSpeedStrategy, path: Path, load: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Let Lightning `load` a folder. The clipping threshold stays the one configured now."""
    module: LightningModule = strategy.lightning_module  # type: ignore[assignment]
    engine = strategy.deepspeed_engine
    other_ranks = module.trainer.state.fn == "fit" and _ranks_of(path) not in (0, strategy.world_size)
    if other_ranks:
        convert_for_other_ranks(strategy, path)
    if strategy.zero_stage_3 and not hasattr(engine.optimizer, "_restore_from_bit16_weights"):
        engine.optimizer._restore_from_bit16_weights = lambda: None  # ZeRO-3 without training: there are no masters
    universal = loads_universal(engine) if other_ranks else contextlib.nullcontext()
    with universal, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        state = load()
    if other_ranks:
        restore_the_rest(module, path)
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = engine.gradient_clipping()
    return state


def leaves_frozen_out(module: LightningModule) -> bool:
    """Whether the module's state dict leaves out all of its frozen parameters, as an adapter's does."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return bool(frozen) and frozen.isdisjoint(module.state_dict())


def _ranks_of(path: Path) -> int:
    """The number of ranks that saved optimizer state in the folder."""
    return len(list(path.glob("checkpoint/*zero_pp_rank_*_optim_states.pt")))
