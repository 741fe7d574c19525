"""What tells one dataset's content from another's, where that is cheap to have."""

import zlib
from typing import Any

import numpy as np

__all__ = ["checksum_of", "fingerprint_of"]


def checksum_of(costs: np.ndarray, kept: np.ndarray | None) -> str:
    """A checksum of all samples' padded lengths, and of which are kept; None: all.

    Example:
        >>> costs = np.array([3, 9], np.int32)
        >>> checksum_of(costs, None), checksum_of(costs, np.array([0], np.uint32))
        ('96a59700', '13040fb4')
    """
    found = zlib.crc32(np.ascontiguousarray(costs).data)
    return f"{found if kept is None else zlib.crc32(np.ascontiguousarray(kept).data, found):08x}"


def fingerprint_of(dataset: Any) -> str | None:
    """The dataset's own fingerprint: its method `fingerprint()`, or what Hugging Face's datasets keep; None without.

    Example:
        >>> class Data:
        ...     def fingerprint(self):
        ...         return "3 files, 41 bytes"
        >>> fingerprint_of(Data()), fingerprint_of([1, 2])
        ('3 files, 41 bytes', None)
    """
    own = getattr(dataset, "fingerprint", None)
    if callable(own):
        return str(own())
    kept = getattr(dataset, "_fingerprint", None)  # no public name: their own code passes it as `new_fingerprint`
    return kept if isinstance(kept, str) else None
