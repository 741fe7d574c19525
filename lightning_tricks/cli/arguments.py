"""What is typed after `fit`, `validate`, `test` and `predict`: short forms, and what was probably meant."""

import re
from argparse import ArgumentError
from collections.abc import Iterable
from importlib import import_module
from inspect import signature

from lightning_tricks.cli.names import nearest
from lightning_tricks.errors import MisconfigurationError

__all__ = ["explain", "lengthen"]

SHORT_FORMS = {"--strategy": "--trainer.strategy", "--devices": "--trainer.devices"}
UNKNOWN = re.compile(r"unrecognized arguments: (\S+)")
UNKNOWN_OPTION = re.compile(r"Problem with given class_path '([\w.]+)':\s+Option '(\w+)' is not accepted")
UNKNOWN_CALLBACK = re.compile(r'Parser key "trainer\.callbacks".*Given value: (?P<value>.+)', re.DOTALL)


def lengthen(arguments: Iterable[str]) -> list[str]:
    """Replace the short forms by what the Trainer's options are really called.

    Args:
        arguments: as typed.

    Example:
        >>> lengthen(["--strategy", "zero_2", "--devices=2"])
        ['--trainer.strategy', 'zero_2', '--trainer.devices=2']
    """
    split = (argument.partition("=") for argument in arguments)
    return [SHORT_FORMS.get(name, name) + equals + value for name, equals, value in split]


def explain(error: ArgumentError, options: Iterable[str]) -> MisconfigurationError:
    """Turn the configuration parser's complaint into one that suggests what was meant.

    Args:
        error: what the parser raised.
        options: the options that exist, with their dashes.

    Example:
        >>> error = ArgumentError(None, "unrecognized arguments: --trainer.max_epoch 3")
        >>> print(explain(error, ["--trainer.max_epochs"]))
        `--trainer.max_epoch` is not an option. Did you mean `--trainer.max_epochs`?
    """
    message = str(error)
    if unknown := UNKNOWN.search(message):
        name = unknown[1].partition("=")[0]
        return MisconfigurationError(f"`{name}` is not an option. {_nearest_option(name, options)}")
    if unknown := UNKNOWN_OPTION.search(message):
        path, name = unknown.groups()
        return MisconfigurationError(f"`{path}` has no option `{name}`. {nearest(name, _parameters(path), 'It has')}")
    if unknown := UNKNOWN_CALLBACK.search(message):
        return MisconfigurationError(f"{message}\n{_nearest_callback(unknown['value'])}")
    return MisconfigurationError(message)


def _nearest_option(name: str, options: Iterable[str]) -> str:
    real = sorted({option for option in options if option.startswith("--")} | set(SHORT_FORMS) | {"--resume"})
    suggestion = nearest(name, real)
    return suggestion if suggestion.startswith("Did") else "`lightning-tricks fit --help` lists them."


def _parameters(path: str) -> list[str]:
    package, name = path.rsplit(".", 1)
    return list(signature(getattr(import_module(package), name)).parameters)


def _nearest_callback(value: str) -> str:
    from lightning_tricks import callbacks

    typed = re.findall(r"[A-Za-z_]\w+", value)
    suggestions = (nearest(word, callbacks.__all__) for word in typed)
    found = next((suggestion for suggestion in suggestions if suggestion.startswith("Did")), "")
    return found or f"The callbacks are {', '.join(f'`{name}`' for name in callbacks.__all__)}."
