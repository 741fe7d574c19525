"""`augment`: more training texts, made of the labelled ones by language models, once and before training."""

import sys
from argparse import ArgumentError

from jsonargparse import ArgumentParser

from lightning_tricks.cli.arguments import explain
from lightning_tricks.data import augment as make
from lightning_tricks.errors import MisconfigurationError

__all__ = ["augment"]


def augment(arguments: list[str]) -> int:
    """Write a CSV of new texts; run again after an interruption, go on.

    Args:
        arguments: `--config`, or the options of `lightning_tricks.data.augment`.

    Raises:
        MisconfigurationError: for an unknown option, one out of range, or a model that cannot do what it should.
        DataError: if the file lacks a column, or a cell is blank.
    """
    parser = ArgumentParser(
        "lightning-tricks augment",
        description="Make more training texts of labelled ones: masked words, back-translation, paraphrases."
        " Interrupted and run again it goes on. `fit --data.augmented FILE` trains on them too.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="such as examples/augment/config.yaml")
    parser.add_function_arguments(make)
    try:
        found = parser.instantiate_classes(parser.parse_args(arguments))
    except ArgumentError as error:
        raise _explained(error, parser) from error
    found.pop("config", None)
    sys.stdout.write(f"{make(**found.as_dict())}\n")
    return 0


def _explained(error: ArgumentError, parser: ArgumentParser) -> MisconfigurationError:
    return explain(error, [option for action in parser._actions for option in action.option_strings])
