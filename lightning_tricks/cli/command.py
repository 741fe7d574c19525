"""The command itself: a dictionary of functions, and errors as one clear message."""

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from lightning_tricks.cli.names import nearest
from lightning_tricks.errors import MisconfigurationError, TricksError

__all__ = ["main"]

# name -> (module, function, what it does). A module is imported when its command runs, so that the rest stays quick.
COMMANDS = {
    "fit": ("training", "fit", "Train; `--resume` goes on from the newest checkpoint."),
    "validate": ("training", "validate", "Evaluate on the validation split."),
    "test": ("training", "test", "Evaluate on the test split."),
    "predict": ("prediction", "predict", "Labels and probabilities: `--checkpoint PATH --text '...'`."),
    "demo": ("demo", "demo", "Fine-tune a real transformer five ways; a table and a plot."),
    "check": ("checking", "check_fit", "What a `fit` with these options does exactly, otherwise, or not at all."),
    "average": ("averaging", "average", "The mean of checkpoints of any engine: `A B C --out FILE`."),
    "soup": ("soup", "soup", "Of some checkpoints, those that help: `A B C --monitor METRIC --config CONFIG`."),
    "cross-validate": ("cross_validation", "cross_validate", "Fit once for each fold; `--folds 5`, resumable."),
    "data-report": ("data_report", "data_report", "How much of the training batches is padding, on how many ranks."),
    "augment": ("augmentation", "augment", "More training texts, made by language models: `--config CONFIG`."),
    "adapters": ("adapters", "adapters", "Adapters as folders of peft's format: list, merge, export, import."),
    "consolidate": ("consolidate", "consolidate_checkpoint", "Any checkpoint as one safetensors file: `CKPT OUT`."),
    "inspect": ("inspection", "inspect", "What a checkpoint holds, without running anything in it."),
    "list": ("listing", "list_tricks", "The tricks and the strategy flags, one line each."),
    "show": ("listing", "show", "One of them in full: `show NAME`, ready to stack or to copy."),
}
USAGE_ERROR = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lightning-tricks`.

    An error of the suite is printed as one message, without a traceback; `--debug`, or the environment variable
    `LIGHTNING_TRICKS_DEBUG=1`, shows the traceback.

    Args:
        argv: what follows the command's name; `None` takes `sys.argv`.

    Returns:
        The exit code: 0, 2 when something was asked for that cannot be done, 130 when interrupted.

    Example:
        >>> main(["no-such-command"])
        2
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("LIGHTNING_TRICKS_DEBUG") == "1"
    try:
        return _dispatch([argument for argument in arguments if argument != "--debug"])
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        known = _tricks_error(error)
        if debug or known is None:
            raise
        _complain(known)
        return USAGE_ERROR


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        return _help()
    if arguments[0] == "--version":
        return _version()
    name, *rest = arguments
    if name not in COMMANDS:
        raise MisconfigurationError(
            f"`{name}` is not a command of lightning-tricks. {nearest(name, COMMANDS, 'The commands are')}"
        )
    module, function, _ = COMMANDS[name]
    run: Callable[[list[str]], int] = getattr(import_module(f"lightning_tricks.cli.{module}"), function)
    return run(rest)


def _help() -> int:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, _, text) in COMMANDS.items()]
    sys.stdout.write("usage: lightning-tricks COMMAND ...\n\n" + "\n".join(lines) + "\n\n")
    sys.stdout.write("`lightning-tricks COMMAND --help` shows the options; --debug shows tracebacks.\n")
    return 0


def _version() -> int:
    from lightning_tricks import __version__

    sys.stdout.write(f"lightning-tricks {__version__}\n")
    return 0


def _tricks_error(error: BaseException) -> TricksError | None:
    """The error of ours in the chain: the configuration parser wraps what a constructor raises."""
    seen: set[int] = set()
    chain: list[BaseException | None] = [error]
    while chain:
        link = chain.pop(0)
        if link is None or id(link) in seen:
            continue
        if isinstance(link, TricksError):
            return link
        seen.add(id(link))
        chain += [link.__cause__, link.__context__]
    return None


def _complain(error: TricksError) -> None:
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    where = f" (process {rank})" if rank else ""
    sys.stderr.write(f"lightning-tricks{where}: {error}\n")
