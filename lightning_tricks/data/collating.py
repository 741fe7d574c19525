"""Make a batch of samples of any make: nested, ragged, with labels for each token or for each sample."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_tricks.data._lengths import padded
from lightning_tricks.data._plan import check_whole
from lightning_tricks.errors import DataError

__all__ = ["DynamicPaddingCollator"]

FILL = MappingProxyType({"labels": -100})
MASKS = MappingProxyType({"input_ids": "attention_mask"})


class DynamicPaddingCollator:
    """Pads each sequence of the samples to the longest of the batch, whatever its key and however deep it lies.

    Samples are mappings, nested or not. Sequences of numbers, arrays and tensors become tensors, padded along their
    first dimension; numbers are stacked; what else there is, is listed. An int32 sequence becomes int64.

    Args:
        fill: by key, what fills a sequence up; 0 for keys that are not in it. Labels of tokens take -100, which
            torch's losses ignore.
        masks: by key, the name of a mask to make of what is real (1) and what is filled up (0), beside the sequence.
        pad_to: the length is rounded up to a multiple of this, or to the next of a few lengths.
        max_length: sequences are cut at their end to this; None: not at all.

    Raises:
        MisconfigurationError: for an option out of range.

    Example:
        >>> collate = DynamicPaddingCollator(pad_to=4)
        >>> batch = collate([{"text": {"input_ids": [5, 6]}, "label": 1}, {"text": {"input_ids": [7]}, "label": 0}])
        >>> batch["text"]["input_ids"].tolist(), batch["text"]["attention_mask"].tolist(), batch["label"].tolist()
        ([[5, 6, 0, 0], [7, 0, 0, 0]], [[1, 1, 0, 0], [1, 0, 0, 0]], [1, 0])
    """

    def __init__(
        self,
        *,
        fill: Mapping[str, float] = FILL,
        masks: Mapping[str, str] = MASKS,
        pad_to: int | Sequence[int] = 1,
        max_length: int | None = None,
    ) -> None:
        if max_length is not None:
            check_whole("max_length", max_length, 1)
        padded(np.ones(1, np.int32), pad_to)  # refuses what is no length
        self.fill, self.masks, self.pad_to, self.max_length = dict(fill), dict(masks), pad_to, max_length

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate samples.

        Raises:
            DataError: if samples have different keys, or sequences that differ beyond their first dimension.
        """
        batch: dict[str, Any] = {}
        for key in samples[0]:
            if any(key not in sample or len(sample) != len(samples[0]) for sample in samples):
                raise DataError(f"Samples of one batch have different keys: not all have `{key}` and as many others.")
            batch[key] = self._collate(key, [sample[key] for sample in samples], batch)
        return batch

    def _collate(self, key: str, values: list[Any], batch: dict[str, Any]) -> Any:
        first = values[0]
        if isinstance(first, Mapping):
            return self(values)
        if isinstance(first, bool | int | float | np.number):
            return torch.as_tensor(np.asarray(values))
        if not _is_sequence(first):
            return values
        rows = [_tensor(value)[: self.max_length] if _ndim(value) else _tensor(value) for value in values]
        if rows[0].ndim == 0:
            return torch.stack(rows)
        if (name := self.masks.get(key)) and name not in batch:
            batch[name] = self._pad(key, [torch.ones(len(row), dtype=torch.int64) for row in rows], 0)
        return self._pad(key, rows, self.fill.get(key, 0))

    def _pad(self, key: str, rows: list[Tensor], fill: float) -> Tensor:
        if len({row.shape[1:] for row in rows}) > 1:
            raise DataError(
                f"`{key}` has shapes {', '.join(str(tuple(row.shape)) for row in rows[:3])} in one batch: only the"
                " first dimension may differ."
            )
        longest = max(1, *(len(row) for row in rows))
        length = int(padded(np.array([longest], np.int32), self.pad_to)[0])
        whole = torch.full((len(rows), length, *rows[0].shape[1:]), fill, dtype=rows[0].dtype)
        for place, row in enumerate(rows):
            whole[place, : len(row)] = row
        return whole


def _is_sequence(value: Any) -> bool:
    if isinstance(value, np.ndarray | Tensor):
        return True
    return isinstance(value, Sequence) and not isinstance(value, str | bytes) and not _holds_others(value)


def _holds_others(value: Sequence[Any]) -> bool:
    return any(isinstance(each, str | bytes | Mapping) or each is None for each in value)


def _ndim(value: Any) -> int:
    return int(getattr(value, "ndim", 1))


def _tensor(value: Any) -> Tensor:
    found = torch.as_tensor(value)
    return found.long() if found.dtype == torch.int32 else found
