"""How batches are loaded: the options that go on to torch's DataLoader, and workers that stay from epoch to epoch."""

from collections.abc import Iterator
from typing import Any

from lightning_tricks.data._plan import check_whole
from lightning_tricks.errors import MisconfigurationError

__all__ = ["LOADING", "Changing", "check_loading", "loading_of"]

LOADING = (
    "pin_memory",
    "prefetch_factor",
    "persistent_workers",
    "worker_init_fn",
    "multiprocessing_context",
    "timeout",
)
OF_WORKERS = ("prefetch_factor", "persistent_workers", "multiprocessing_context", "timeout")


def check_loading(num_workers: Any, **options: Any) -> None:
    """Refuse now what torch would refuse at the first batch.

    Raises:
        MisconfigurationError: for a number out of range, or an option of workers without workers.
    """
    check_whole("num_workers", num_workers, 0)
    for name in OF_WORKERS:
        if options[name] and not num_workers:
            raise MisconfigurationError(f"`{name}={options[name]!r}` is for workers: set `num_workers` to 1 or more.")
    if options["prefetch_factor"] is not None:
        check_whole("prefetch_factor", options["prefetch_factor"], 1)
    if options["timeout"] < 0:
        raise MisconfigurationError(f"`timeout` must be seconds, at least 0, got {options['timeout']!r}.")


def loading_of(loader: Any) -> dict[str, Any]:
    """These options of a loader, the number of workers among them."""
    return {name: getattr(loader, name) for name in ("num_workers", *LOADING)}


class Changing:
    """Batches that can be exchanged for other ones: a DataLoader whose workers stay must keep its batch sampler."""

    def __init__(self) -> None:
        self.batches: Any = ()

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.batches
