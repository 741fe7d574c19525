"""`fit`, `validate` and `test`: Lightning's own command, with the recipes as defaults and checks before training."""

import os
from argparse import ArgumentError
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from lightning_tricks import callbacks  # noqa: F401  (so that `--trainer.callbacks+=GradientClipping` is known)
from lightning_tricks.cli.arguments import explain, lengthen
from lightning_tricks.cli.checks import check_checkpoint, check_devices, check_folder, check_strategy
from lightning_tricks.cli.resume import resume_from
from lightning_tricks.engines import save_safely
from lightning_tricks.errors import MisconfigurationError

__all__ = ["TricksCLI", "fit", "run", "test", "validate"]

DEFAULTS = {
    "model": {"class_path": "lightning_tricks.recipes.TextClassifier"},
    "data": {"class_path": "lightning_tricks.recipes.TextClassificationData"},
}
ABOUT_FIT = "Train. `--resume` goes on from the newest complete checkpoint below `--trainer.default_root_dir`."


def fit(arguments: list[str]) -> int:
    """`lightning-tricks fit`. See `run`."""
    return run("fit", arguments)


def validate(arguments: list[str]) -> int:
    """`lightning-tricks validate`. See `run`."""
    return run("validate", arguments)


def test(arguments: list[str]) -> int:
    """`lightning-tricks test`. See `run`."""
    return run("test", arguments)


def run(command: str, arguments: list[str]) -> int:
    """Run one of LightningCLI's commands.

    Args:
        command: `fit`, `validate`, `test` or `predict`.
        arguments: its options.

    Raises:
        MisconfigurationError: for what cannot be meant, before training.
    """
    resume = command == "fit" and "--resume" in arguments
    rest = [argument for argument in arguments if not (resume and argument == "--resume")]
    try:
        TricksCLI([command, *rest], resume=resume)
    except MisconfigurationException as error:  # Lightning's own
        raise MisconfigurationError(str(error)) from error
    return 0


class TricksCLI(LightningCLI):
    """LightningCLI with the text-classification recipe as its default model and data.

    A model with the options `labels` and `class_counts` gets them from data that has attributes of these names.

    Args:
        args: the subcommand and its options; `--strategy` and `--devices` are short for the Trainer's.
        resume: whether `fit` goes on from the newest checkpoint of the run's folder.

    Raises:
        MisconfigurationError: for an unknown option, strategy or callback, with the nearest names.
    """

    def __init__(self, args: list[str], *, resume: bool = False) -> None:
        self.resume = resume
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            trainer_defaults={"default_root_dir": "runs"},
            parser_kwargs={"fit": {"description": ABOUT_FIT}},
            args=lengthen(args),
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that raises instead of exiting, and resolves OmegaConf's interpolations."""
        return super().init_parser(parser_mode="omegaconf", exit_on_error=False, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The default model and data, and what the model learns from the data."""
        parser.set_defaults(DEFAULTS)
        for name in ("labels", "class_counts"):
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and explain what cannot be parsed."""
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            chosen = self._subcommand_parsers.get(args[0], parser)
            options = [option for action in chosen._actions for option in action.option_strings]
            raise explain(error, options) from error

    def _parse_ckpt_path(self) -> None:
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path and path not in ("best", "last", "hpc") and "://" not in path and not path.startswith("registry"):
            check_checkpoint(path)
        if self.config.subcommand != "fit":  # what is evaluated is what was trained
            super()._parse_ckpt_path()

    def before_instantiate_classes(self) -> None:
        """Refuse what cannot work before anything is built or downloaded."""
        trainer = self.config[self.subcommand].trainer
        check_strategy(trainer.strategy)
        check_devices(trainer.accelerator, trainer.devices)
        check_folder(trainer.default_root_dir or os.getcwd())

    def before_fit(self) -> None:
        """Choose the checkpoint to go on from, and check where new ones go."""
        save_safely(self.trainer)
        for folder in self._folders():
            check_folder(folder)
        if self.resume:
            self._choose_checkpoint()

    def _choose_checkpoint(self) -> None:
        if self.config_init.fit.ckpt_path:
            raise MisconfigurationError("`--resume` and `--ckpt_path` both name a checkpoint: give one of them.")
        found = resume_from(self._folders())
        self.config_init.fit.ckpt_path = str(found) if found else None
        place = ", ".join(f"`{folder}`" for folder in self._folders())
        _say(f"Resuming from `{found}`." if found else f"No checkpoint to resume from in {place}: starting afresh.")

    def _folders(self) -> list[Path]:
        """Where this run writes checkpoints: its folder, and those that its ModelCheckpoints name."""
        return list(dict.fromkeys([Path(self.trainer.default_root_dir), *self._named_folders()]))

    def _named_folders(self) -> Iterator[Path]:
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath:
                yield Path(callback.dirpath)


@rank_zero_only
def _say(text: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(text)
