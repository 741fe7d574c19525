"""Parts of a model by the names of their parameters: a prefix, or a pattern."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from lightning.pytorch import LightningModule

from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional import is_glob

__all__ = ["none_selected", "plain_name", "selected", "trained_names"]

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def trained_names(module: LightningModule) -> list[str]:
    """The names of the parameters in training, as the plain module has them."""
    return [plain_name(name) for name, parameter in module.named_parameters() if parameter.requires_grad]


def selected(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a pattern selects: all below a prefix, or all that a glob matches.

    Example:
        >>> names = ["encoder.0.weight", "encoder.0.bias", "head.weight"]
        >>> selected("encoder", names), selected("*.bias", names), selected("enc", names)
        (['encoder.0.weight', 'encoder.0.bias'], ['encoder.0.bias'], [])
    """
    return [name for name in names if _is_in(pattern, name)]


def none_selected(what: str, pattern: str, module: LightningModule, names: Sequence[str]) -> MisconfigurationError:
    """The error for a pattern that selects nothing."""
    return MisconfigurationError(
        f"{what} `{pattern}` selects no trained parameter of {type(module).__name__}: pass a prefix such as"
        f" `{names[0].partition('.')[0] if names else '...'}`, or a pattern with `*`."
    )


def _is_in(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) if is_glob(pattern) else name == pattern or name.startswith(f"{pattern}.")


def plain_name(name: str) -> str:
    """A parameter's or module's name without the wrappers' parts."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
