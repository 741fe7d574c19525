"""The nearest names to one that does not exist."""

import difflib
from collections.abc import Iterable

__all__ = ["nearest"]


def nearest(name: str, known: Iterable[str], otherwise: str = "Known are") -> str:
    """A sentence that suggests what `name` may have meant.

    Args:
        name: what was typed.
        known: the names that exist.
        otherwise: how the sentence begins when nothing is near, before all that is known.

    Example:
        >>> nearest("zro_2", ["fsdp2", "zero_1", "zero_2"])
        'Did you mean `zero_2` or `zero_1`?'
        >>> nearest("adam", ["fsdp2", "zero_2"])
        'Known are `fsdp2`, `zero_2`.'
    """
    names = list(known)
    spelling = {candidate.lower(): candidate for candidate in reversed(names)}
    close = [spelling[match] for match in difflib.get_close_matches(name.lower(), spelling, n=2, cutoff=0.6)]
    if close:
        return f"Did you mean {' or '.join(f'`{match}`' for match in close)}?"
    return f"{otherwise} {', '.join(f'`{candidate}`' for candidate in names)}."
