"""What a checkpoint records of its adapters, and whether it fits those that are here."""

from collections.abc import Mapping
from typing import Any

from lightning_tricks.errors import CheckpointError

__all__ = ["require_same_records"]


def require_same_records(here: Mapping[str, Mapping[str, Any]], record: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose adapters are others than those here.

    Args:
        here: prefix -> name -> options, of the adapters of the module.
        record: what the checkpoint holds for the suite: `adapters` in the same form, or `lora`, as it was once.

    Raises:
        CheckpointError: naming the first option that differs.
    """
    recorded = record.get("adapters")
    if recorded is None:
        recorded = {prefix: {"default": options} for prefix, options in record.get("lora", {}).items()}
    for prefix, adapters in recorded.items():
        for name, options in adapters.items():
            _require_the_same(prefix, name, options, here.get(prefix, {}).get(name, {}))


def _require_the_same(prefix: str, name: str, recorded: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    which = f"`{prefix}`" if name == "default" else f"`{prefix}` (adapter {name!r})"
    for option, value in recorded.items():
        if option == "parts":
            _require_the_same_parts(which, value, here.get(option) or {})
        elif here.get(option) != value:
            raise CheckpointError(
                f"{which} was adapted with {option}={_told(value)} in this checkpoint, here with "
                f"{option}={_told(here.get(option))}: adapt it with the options that the checkpoint was trained with."
            )


def _require_the_same_parts(which: str, recorded: Mapping[str, str], here: Mapping[str, str]) -> None:
    for path in (*recorded, *here):
        there, now = (parts.get(path, "all") for parts in (recorded, here))
        if there != now:
            raise CheckpointError(
                f"{which} was adapted at the outputs {there} of `{path}` in this checkpoint, here at {now}: adapt it "
                "with the targets that the checkpoint was trained with."
            )


def _told(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else f"{value}"
