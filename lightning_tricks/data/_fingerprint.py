"""What tells one dataset's content from another's, where that is cheap to have."""

from typing import Any

__all__ = ["fingerprint_of"]


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
