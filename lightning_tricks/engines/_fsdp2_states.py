"""Parameters that a checkpoint of FSDP2 holds no moments of: torch would ask it for those of all."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from lightning_tricks.engines._fsdp2_names import keys_of, own_name
from lightning_tricks.errors import CheckpointError

__all__ = ["asked_for_its_moments", "refuse_half_a_state"]


@contextmanager
def asked_for_its_moments(module: nn.Module, path: Path) -> Iterator[None]:
    """Within the block torch restores the moments that the folder holds, and leaves the other parameters without.

    Torch makes state for whatever requires a gradient, with a step counted, and fails where the folder has none: of a
    parameter that has never had a gradient, such as one in a layer that is still frozen.

    Args:
        module: whose parameters the optimizers hold.
        path: a checkpoint folder.
    """
    held = _with_state(path)
    own = {own_name(name): parameter for name, parameter in module.named_parameters()}
    silent = [parameter for name, parameter in own.items() if parameter.requires_grad and name not in held]
    without = silent if held else []  # an optimizer without state
    for parameter in without:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in without:
            parameter.requires_grad_(True)


def refuse_half_a_state(saved: Mapping[str, Any], path: Path) -> None:
    """Refuse a single file with the moments of a part of the parameters, which torch cannot spread over shards."""
    for state in saved.get("optimizer_states", ()):
        held = sum(bool(entry) for entry in state["state"].values())
        if 0 < held < sum(len(group["params"]) for group in state["param_groups"]):
            raise CheckpointError(
                f"{path} is a single file without the moments of some parameters, as of layers that were still frozen:"
                " FSDP2 cannot resume from it. Resume on the engine that wrote it, or from a folder that FSDP2 wrote."
            )


def _with_state(path: Path) -> set[str]:
    """The names of the parameters that a folder holds optimizer state of."""
    states = [key.partition(".state.")[2] for key in keys_of(path) if key.startswith("optimizer_") and ".state." in key]
    return {state.rpartition(".")[0] for state in states}
