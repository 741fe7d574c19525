"""What a disk that takes no more says, as one error that tells where, how much and what to do."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_tricks.errors import CheckpointError

__all__ = ["disk_errors", "is_disk_error", "unwritable"]

_TORCH = ("inline_container", "PytorchStreamWriter", "iostream error")  # all that torch's own writer says


@contextmanager
def disk_errors(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn what a disk refuses within the block into a CheckpointError; other errors are left as they are.

    Args:
        path: what is being written.
        needed: its bytes, if known.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not is_disk_error(error):
            raise
        raise unwritable(path, error, needed=needed) from error


def is_disk_error(error: BaseException) -> bool:
    """Whether the disk caused it: torch's writer reports that as a RuntimeError of its own.

    Example:
        >>> is_disk_error(OSError(28, "No space left on device")), is_disk_error(RuntimeError("shapes differ"))
        (True, False)
    """
    return _cause(error) is not None or any(word in str(error) for word in _TORCH)


def unwritable(
    path: Path, error: BaseException, *, needed: int | None = None, written: int | None = None, writer: str = ""
) -> CheckpointError:
    """The error for what could not be written.

    Args:
        path: what was being written.
        error: what went wrong.
        needed: its bytes, if known.
        written: how many of them were written, if known.
        writer: which process could not, if there are several.

    Example:
        >>> print(unwritable(Path("no/such.ckpt"), OSError(28, "No space left on device"), needed=3_000_000))
        no/such.ckpt could not be saved (No space left on device): it needs about 3.0 MB. What was saved ...
    """
    cause = _cause(error)
    reason = (cause.strerror or f"{cause}") if cause is not None else _first_line(error)
    facts = [] if needed is None else [f"it needs about {_megabytes(needed)}"]
    facts += [] if written is None else [f"{_megabytes(written)} of it were written"]
    if (free := _free(path)) is not None:
        facts.append(f"{_megabytes(free)} are free there")
    told = f": {' and '.join(facts)}" if facts else ""
    return CheckpointError(
        f"{path} could not be saved{writer} ({reason}){told}. What was saved before it is as it was: make room or"
        " choose another folder, and go on from there."
    )


def _cause(error: BaseException | None) -> OSError | None:
    seen = 0
    while error is not None and not isinstance(error, OSError) and seen < 10:
        error, seen = error.__cause__ or error.__context__, seen + 1
    return error if isinstance(error, OSError) else None


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _free(path: Path) -> int | None:
    try:
        return shutil.disk_usage(path.absolute().parent).free
    except OSError:
        return None  # the folder itself is gone: the reason says so


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
