"""Lengths of samples: checked, rounded, and cut or left out where they are too long."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from lightning_tricks.data._plan import check_whole
from lightning_tricks.errors import DataError, MisconfigurationError

__all__ = ["TooLong", "check_collator", "checked_lengths", "keep_within", "padded"]

TooLong = Literal["own_batch", "truncate", "drop", "error"]
POLICIES = ("own_batch", "truncate", "drop", "error")
LONGEST = 2**31 - 1


def checked_lengths(lengths: Any) -> np.ndarray:
    """Lengths as int32 of shape (samples,).

    Raises:
        DataError: if there are none, or one is not a whole number from 1 to 2^31 - 1.

    Example:
        >>> checked_lengths([3, 1]).tolist()
        [3, 1]
    """
    found = np.asarray(lengths)
    if found.ndim != 1 or not len(found) or found.dtype.kind not in "iu":
        raise DataError(
            f"`lengths` must be a sequence of whole numbers, one for each sample, got shape {found.shape} of"
            f" {found.dtype}. `measure_lengths` measures those of a dataset."
        )
    wrong = np.flatnonzero((found < 1) | (found > LONGEST))
    if len(wrong):
        raise DataError(
            f"Sample {wrong[0]} has length {found[wrong[0]]}, and {len(wrong) - 1} more are not from 1 to 2^31 - 1."
            " Leave empty samples out of the dataset."
        )
    return found.astype(np.int32, copy=False)


def padded(lengths: np.ndarray, pad_to: int | Sequence[int]) -> np.ndarray:
    """Lengths rounded up to a multiple, or to the next of a few lengths.

    Raises:
        MisconfigurationError: if `pad_to` is neither.
        DataError: if a sample is longer than the longest of the few lengths.

    Example:
        >>> padded(np.array([3, 9], np.int32), 8).tolist(), padded(np.array([3, 9], np.int32), (4, 12)).tolist()
        ([8, 16], [4, 12])
    """
    if not isinstance(pad_to, Sequence):
        check_whole("pad_to", pad_to, 1)
        return lengths if pad_to == 1 else np.asarray(-(-lengths // pad_to) * pad_to)
    shapes = np.asarray(sorted(set(pad_to)), np.int32)
    for shape in pad_to:
        check_whole("pad_to", shape, 1)
    if not len(shapes) or int(lengths.max()) > shapes[-1]:
        raise DataError(
            f"A sample of length {int(lengths.max())} has no place in `pad_to={tuple(pad_to)}`. Add a longer shape."
        )
    return shapes[np.searchsorted(shapes, lengths)]


def keep_within(
    lengths: np.ndarray, longest: int, too_long: TooLong, pad_to: int | Sequence[int]
) -> tuple[np.ndarray, np.ndarray | None, int | None]:
    """Treat samples that, padded, exceed `longest` as `too_long` says.

    Returns:
        Padded lengths of all samples; the indices of those kept, None for all; and the length to which samples must be
        cut, None for none.

    Raises:
        MisconfigurationError: if `too_long` is no policy.
        DataError: if it is "error" and a sample is too long, or none is left.

    Example:
        >>> keep_within(np.array([3, 9], np.int32), 8, "drop", 1)[1].tolist()
        [0]
    """
    if too_long not in POLICIES:
        raise MisconfigurationError(f"`too_long` must be one of {', '.join(POLICIES)}, got {too_long!r}.")
    cut = _longest_padded(longest, pad_to) if too_long == "truncate" else None
    costs = padded(lengths if cut is None else np.minimum(lengths, cut), pad_to)
    over = np.flatnonzero(costs > longest)
    if not len(over) or too_long == "own_batch":
        return costs, None, cut
    if too_long == "error":
        raise DataError(
            f"Sample {over[0]} has length {lengths[over[0]]}, padded {costs[over[0]]}, and {len(over) - 1} more exceed"
            f" `max_tokens={longest}`. Raise it, or choose `too_long=`'own_batch', 'truncate' or 'drop'."
        )
    if len(over) == len(lengths):
        raise DataError(f"Every sample is longer than `max_tokens={longest}`. Raise it.")
    return costs, np.flatnonzero(costs <= longest).astype(np.uint32), None


def _longest_padded(longest: int, pad_to: int | Sequence[int]) -> int:
    fits = [s for s in pad_to if s <= longest] if isinstance(pad_to, Sequence) else [longest // pad_to * pad_to]
    if not fits or max(fits) < 1:
        raise MisconfigurationError(f"`max_tokens={longest}` is less than any length of `pad_to={pad_to!r}`. Raise it.")
    return max(fits)


def check_collator(collate_fn: Any, longest: int | None, pad_to: int | Sequence[int] | None) -> None:
    """Refuse a collator whose batches would not be those that the steps were cut for.

    Args:
        collate_fn: of the loader; what it says of itself by `max_length` and `pad_to` counts.
        longest: tokens to which it must cut samples; None: nothing must be cut.
        pad_to: what the tokens of a budget were counted with; None: there is no budget.

    Raises:
        MisconfigurationError: if its `max_length` is absent or larger, or its `pad_to` is another.
    """
    cut = getattr(collate_fn, "max_length", None)
    if longest is not None and (cut is None or cut > longest):
        raise MisconfigurationError(
            f"`too_long='truncate'` needs a `collate_fn` that cuts samples to {longest} tokens and says so"
            f" by its `max_length`, which is {cut}. DynamicPaddingCollator(max_length={longest}) does."
        )
    own = getattr(collate_fn, "pad_to", None)
    if pad_to is not None and own is not None and _shapes(own) != _shapes(pad_to):
        raise MisconfigurationError(
            f"The sampler counts tokens with `pad_to={pad_to!r}`, but the `collate_fn` pads with `pad_to={own!r}`:"
            " batches would not be those of `max_tokens`. Give both the same."
        )


def _shapes(pad_to: int | Sequence[int]) -> list[int] | int:
    return sorted(set(pad_to)) if isinstance(pad_to, Sequence) else pad_to
