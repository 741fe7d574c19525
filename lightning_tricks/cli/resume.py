"""Find the newest checkpoint that a run can go on from."""

import logging
import os
import pickletools
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from lightning_tricks.storage._atomic import finish_publishing

__all__ = ["is_complete", "newest_checkpoint", "resume_from"]

CHOSEN = "LIGHTNING_TRICKS_RESUME"  # how the first process tells the ones that it starts
TRAINING_STATE = {"loops", "optimizer_states"}

_log = logging.getLogger(__name__)


def resume_from(folders: Iterable[Path]) -> Path | None:
    """The checkpoint to resume from, the same in every process of a run; `None` to start afresh.

    Lightning starts a run's other processes by executing the same command again. By then the first process may
    have written more, so it hands on its choice.

    Args:
        folders: where the run writes.
    """
    if "LOCAL_RANK" in os.environ and CHOSEN in os.environ:
        return Path(os.environ[CHOSEN]) if os.environ[CHOSEN] else None
    found = newest_checkpoint(folders)
    os.environ[CHOSEN] = str(found or "")
    return found


def newest_checkpoint(folders: Iterable[Path]) -> Path | None:
    """The newest complete checkpoint of a training run below some folders.

    Weights without the optimizer's state (an ensemble, a best model) and what was cut off are passed over. A folder
    that was complete when its run was killed, and had not taken its name yet, takes it now.

    Args:
        folders: searched with all that lies below; those that are not there hold nothing.

    Example:
        >>> newest_checkpoint([Path("no/such/folder")]) is None
        True
    """
    found = {path.resolve() for folder in folders for path in _checkpoints(folder)}
    for path in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        if not is_complete(path):
            _log.warning("`%s` is incomplete and passed over.", path)
        elif path.is_dir() or _strings(path) >= TRAINING_STATE:
            return path
    return None


def is_complete(path: Path) -> bool:
    """Whether a checkpoint was written to its end.

    A file is an archive whose directory comes last, so a file that was cut off has none. A folder takes its name
    only when everything in it is written.

    Args:
        path: a checkpoint, file or folder.
    """
    if path.is_dir():
        return any(path.iterdir())
    return zipfile.is_zipfile(path)


def _checkpoints(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        for path in finish_publishing(Path(parent)):
            _log.warning("`%s` was complete when its run was killed: it has its name now.", path)
            folders[:] = [*(name for name in folders if name != path.name), path.name]
        yield from (Path(parent, name) for name in (*folders, *files) if name.endswith(".ckpt"))
        folders[:] = [name for name in folders if not name.endswith(".ckpt")]


def _strings(path: Path) -> set[str]:
    """The strings in a checkpoint's pickle: its keys among them, read without loading or running anything."""
    with zipfile.ZipFile(path) as archive:
        pickle = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
        if pickle is None:
            return set()
        return {value for _, value, _ in pickletools.genops(archive.read(pickle)) if isinstance(value, str)}
