"""A user's own DeepSpeed configuration: read, held against the options of `zero()`, and laid over the preset's."""

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_tricks.errors import MisconfigurationError

__all__ = ["Config", "Given", "merged", "read_config"]

Config = dict[str, Any] | str | Path | None

# What DeepSpeed would read and the suite counts or builds itself: held against the Trainer, then left out.
_MANAGED = ("gradient_accumulation_steps", "managed_gradient_accumulation", "optimizer", "train_batch_size")
_SECTIONS = ("bf16", "checkpoint", "fp16", "optimizer", "scheduler", "zero_optimization")
_DEPRECATED = {
    "cpu_offload": 'offload_optimizer: {"device": "cpu"}',
    "cpu_offload_param": 'offload_param: {"device": "cpu"}',
    "cpu_offload_use_pin_memory": "pin_memory in offload_optimizer and offload_param",
}


@dataclass(frozen=True)
class Given:
    """The keys of a user's DeepSpeed configuration, without those that are "auto", and where they came from.

    Args:
        values: the keys; the user's own dict is not among them.
        source: a file's path, or where a dict was given.
    """

    values: Mapping[str, Any]
    source: str

    def at(self, path: str) -> Any:
        """The value of a key, its sections divided by dots; `None` where it is left out.

        Example:
            >>> Given({"fp16": {"enabled": True}}, "ds.json").at("fp16.enabled")
            True
        """
        value: Any = self.values
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def conflict(self, path: str, other: str, value: Any) -> MisconfigurationError:
        """The error that a key contradicts something else, both values named.

        Example:
            >>> print(Given({"fp16": {"enabled": True}}, "ds.json").conflict("fp16.enabled", "`precision`", "32-true"))
            ds.json sets `fp16.enabled` to true, but `precision` is '32-true': leave one of them out.
        """
        return MisconfigurationError(
            f"{self.source} sets `{path}` to {json.dumps(self.at(path), default=repr)}, but {other} is {value!r}: leave"
            " one of them out."
        )

    def agree(self, path: str, other: str, value: Any) -> None:
        """Raise unless the key is left out or equal to `value`."""
        if self.at(path) is not None and self.at(path) != value:
            raise self.conflict(path, other, value)

    def for_deepspeed(self) -> dict[str, Any]:
        """What DeepSpeed is to read of it."""
        return copy.deepcopy({name: value for name, value in self.values.items() if name not in _MANAGED})


def read_config(config: Config, environment_variable: str) -> Given:
    """The configuration of the argument, or else of the file that Lightning's environment variable names.

    Raises:
        MisconfigurationError: if it is no JSON object, or has a key that cannot be meant.
    """
    source = "`zero(config=...)`"
    if config is None and environment_variable in os.environ:
        config, source = os.environ[environment_variable], f"{environment_variable}={os.environ[environment_variable]}"
    elif isinstance(config, str | Path):
        source = str(config)
    if config is not None and not isinstance(config, dict | str | Path):
        raise MisconfigurationError(f"`config` must be a dict or the path of a JSON file, got {config!r}.")
    values = _parsed(Path(config), source) if isinstance(config, str | Path) else copy.deepcopy(config or {})
    given = Given(_without_auto(values), source)
    _refuse_keys(given)
    return given


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Both mappings' keys, sections key by key; `over` wins.

    Example:
        >>> merged({"aio": {"block_size": 1, "queue_depth": 8}}, {"aio": {"block_size": 2}})
        {'aio': {'block_size': 2, 'queue_depth': 8}}
    """
    result = dict(base)
    for name, value in over.items():
        below = result.get(name)
        result[name] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


def _parsed(path: Path, source: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise MisconfigurationError(
            f"The DeepSpeed configuration {source} cannot be read ({error.strerror}): name a JSON file."
        ) from error
    except ValueError as error:  # what JSON and UTF-8 raise, and a key that occurs twice
        raise MisconfigurationError(f"The DeepSpeed configuration {source} is no valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise MisconfigurationError(f"The DeepSpeed configuration {source} must hold a JSON object, got {content!r}.")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key `{name}` occurs twice")
        found[name] = value
    return found


def _without_auto(values: Mapping[str, Any]) -> dict[str, Any]:
    """Auto asks whoever reads the configuration to choose, as leaving the key out does here."""
    return {
        name: _without_auto(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if not (isinstance(value, str) and value == "auto")
    }


def _refuse_keys(given: Given) -> None:
    for name in _SECTIONS:
        if not isinstance(given.values.get(name, {}), Mapping):
            raise MisconfigurationError(
                f"{given.source} sets `{name}` to {given.values[name]!r}: it must be an object, its options inside."
            )
    for name, instead in _DEPRECATED.items():
        if given.at(f"zero_optimization.{name}") is not None:
            raise MisconfigurationError(
                f"{given.source} sets `zero_optimization.{name}`, which DeepSpeed has given up: write `{instead}`."
            )
    if given.at("managed_gradient_accumulation") is False or given.at("checkpoint.load_universal"):
        name = "checkpoint.load_universal" if given.at("checkpoint.load_universal") else "managed_gradient_accumulation"
        raise MisconfigurationError(f"{given.source} sets `{name}`, which `zero()` looks after itself: leave it out.")
