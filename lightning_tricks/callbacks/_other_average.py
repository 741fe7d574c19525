"""What WeightAveraging says of a checkpoint whose average is one of other options."""

from collections.abc import Collection, Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_tricks.callbacks._average import Average
from lightning_tricks.engines import Engine
from lightning_tricks.errors import MisconfigurationError

__all__ = ["ENDED", "tell_of_others"]

ENDED = (
    "WeightAveraging: the checkpoint was saved when its fit had ended and the module held the average. Training goes on"
    " from that, and a new average begins. Resume from one saved in the fit to go on exactly."
)


def tell_of_others(
    engine: Engine, checkpoint: Mapping[str, Any], ours: str, known: Collection[str], purpose: str | None
) -> None:
    """Say what happens to an average in a checkpoint that no instance goes on with, if there is one.

    Args:
        engine: the engine of the Trainer that loads the checkpoint.
        checkpoint: it, without anything under the key `ours`.
        ours: the key of the instance that asks.
        known: the keys of all instances.
        purpose: `fit`, `test` for an evaluation of the average, or None for one of the raw weights.

    Raises:
        MisconfigurationError: for `test`.
    """
    states = {key: state for key, state in checkpoint["callbacks"].items() if key.startswith("WeightAveraging{")}
    others = [key for key, state in states.items() if state["updates"] and key not in known]
    if not others or purpose is None:
        return
    told = f"WeightAveraging: the checkpoint holds the average of `{others[0]}`, and this one is `{ours}`."
    if not Average.find(engine, checkpoint, others[0]):  # its weights are the average
        if purpose == "fit":
            rank_zero_warn(ENDED)
    elif purpose == "fit":
        rank_zero_warn(
            f"{told} The fit goes on from the raw weights, that average is left, and a new one begins. Give the options"
            " of the checkpoint to go on with its average."
        )
    else:
        raise MisconfigurationError(
            f"{told} Without it the raw weights would be evaluated. Give the options of the checkpoint; to evaluate the"
            " raw weights, take WeightAveraging out or leave `test` out of `use_for`."
        )
