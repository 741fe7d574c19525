"""What tells one dataset's content from another's, where that is cheap to have."""

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

__all__ = ["checksum_of", "fingerprint_of", "own_fingerprint"]

PROBES = 8  # samples by which a dataset that has no fingerprint is told from another one


def checksum_of(costs: np.ndarray, kept: np.ndarray | None) -> str:
    """A checksum of all samples' padded lengths, and of which are kept; None: all.

    Example:
        >>> costs = np.array([3, 9], np.int32)
        >>> checksum_of(costs, None), checksum_of(costs, np.array([0], np.uint32))
        ('96a59700', '13040fb4')
    """
    found = zlib.crc32(np.ascontiguousarray(costs).data)
    return f"{found if kept is None else zlib.crc32(np.ascontiguousarray(kept).data, found):08x}"


def own_fingerprint(dataset: Any) -> str | None:
    """The dataset's own: its method `fingerprint()`, or what Hugging Face's datasets keep; None without one.

    Example:
        >>> class Data:
        ...     def fingerprint(self):
        ...         return "3 files, 41 bytes"
        >>> own_fingerprint(Data()), own_fingerprint([1, 2])
        ('3 files, 41 bytes', None)
    """
    own = getattr(dataset, "fingerprint", None)
    if callable(own):
        return str(own())
    kept = getattr(dataset, "_fingerprint", None)  # no public name: their own code passes it as `new_fingerprint`
    return kept if isinstance(kept, str) else None


def fingerprint_of(dataset: Any) -> str | None:
    """The dataset's own; else, of a few samples.

    Samples are read twice, and the random numbers left as they were. None if a sample cannot be read here, or comes
    another time as another one.

    Example:
        >>> fingerprint_of([1, 2])
        'samples 618d0388'
    """
    return own_fingerprint(dataset) or _probed(dataset)


def _probed(dataset: Any) -> str | None:
    places = sorted({int(place) for place in np.linspace(0, len(dataset) - 1, PROBES).round()})
    with isolate_rng(include_cuda=False):
        try:
            found = [[_checksum(dataset[place], 0) for place in places] for _ in range(2)]
        except Exception:  # whatever it is: datasets may open their files in workers alone, and need not be read here
            return None
    return f"samples {zlib.crc32(repr(found[0]).encode()):08x}" if found[0] == found[1] else None


def _checksum(value: Any, found: int) -> int:
    """Of tensors, arrays, numbers, texts and what holds them; of anything else, its type."""
    if isinstance(value, Mapping):
        for each in value.items():
            found = _checksum(each, found)
    elif isinstance(value, list | tuple):
        for each in value:
            found = _checksum(each, found)
    elif isinstance(value, Tensor):
        return _checksum(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy(), found)
    elif isinstance(value, np.ndarray) and value.dtype != object:
        return zlib.crc32(np.ascontiguousarray(value).tobytes(), found)
    plain = (
        value if isinstance(value, str | bytes | int | float | complex | np.generic | None) else type(value).__name__
    )
    return zlib.crc32(repr(plain).encode("utf-8", "surrogatepass"), found)
