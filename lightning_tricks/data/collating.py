"""Make a batch of samples of any make: nested, ragged, with labels for each token or for each sample."""

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_tricks.data._lengths import padded
from lightning_tricks.data._plan import check_whole
from lightning_tricks.errors import DataError, MisconfigurationError

__all__ = ["DynamicPaddingCollator"]

FILL = MappingProxyType({"labels": -100})
MASKS = MappingProxyType({"input_ids": "attention_mask"})
TOKEN_KEYS = ("input_ids", "attention_mask", "labels", "position_ids", "special_tokens_mask", "token_type_ids")


class DynamicPaddingCollator:
    """Pads each sequence of the samples to the longest of the batch, whatever its key and however deep it lies.

    Samples are mappings, nested or not. Sequences of numbers, arrays and tensors become tensors, padded along their
    first dimension to the longest of the batch; numbers are stacked; what else there is, is listed. An int32 sequence
    becomes int64.

    Only sequences of tokens are cut to `max_length` and filled up to `pad_to`: a feature of ten numbers stays one of
    ten. Those are the keys that `sequences` names. Without it, they are the keys of `masks` and `fill` and those usual
    in transformers (`input_ids`, `attention_mask`, `labels`, `position_ids`, `special_tokens_mask`, `token_type_ids`),
    where they have in every sample of the batch the length of the first of them that has a mask, or of `input_ids`.

    Args:
        fill: by key, what fills a sequence up; 0 for keys that are not in it. Labels of tokens take -100, which
            torch's losses ignore.
        masks: by key, the name of a mask to make of what is real (1) and what is filled up (0), beside the sequence.
        pad_to: the length of tokens is rounded up to a multiple of this, or to the next of a few lengths.
        max_length: tokens are cut at their end to this; None: not at all.
        sequences: keys of sequences of tokens, at any depth, each cut and rounded by its own length; None: as above.

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
        sequences: Collection[str] | None = None,
    ) -> None:
        if max_length is not None:
            check_whole("max_length", max_length, 1)
        padded(np.ones(1, np.int32), pad_to)  # refuses what is no length
        if isinstance(sequences, str):
            raise MisconfigurationError(f"`sequences` must be keys, such as ({sequences!r},), got {sequences!r}.")
        self.fill, self.masks, self.pad_to, self.max_length = dict(fill), dict(masks), pad_to, max_length
        self.sequences = None if sequences is None else frozenset(sequences)
        self._measured = list(dict.fromkeys((*masks, "input_ids")))
        self._usual = frozenset((*TOKEN_KEYS, *fill, *masks, *masks.values()))

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate samples.

        Raises:
            DataError: if samples have different keys, or sequences that differ beyond their first dimension, or none
                by which `pad_to` and `max_length` could go.
        """
        return self._batch(samples, self._lengths(samples))

    def _lengths(self, samples: Sequence[Mapping[str, Any]]) -> list[int] | None:
        """Of each sample's tokens; None where nothing depends on them, or `sequences` says what does."""
        if self.sequences is not None or (self.pad_to == 1 and self.max_length is None):
            return None
        for key in self._measured:
            found = [_find(sample, key) for sample in samples]
            if all(_is_sequence(each) and _ndim(each) for each in found):
                return [len(each) for each in found]
        raise DataError(
            f"`pad_to={self.pad_to!r}` and `max_length={self.max_length}` are for sequences of tokens: samples have"
            f" none as `{'` or `'.join(self._measured)}`. Name their keys by `sequences`."
        )

    def _batch(self, samples: Sequence[Mapping[str, Any]], lengths: list[int] | None) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        for key in samples[0]:
            if any(key not in sample or len(sample) != len(samples[0]) for sample in samples):
                raise DataError(f"Samples of one batch have different keys: not all have `{key}` and as many others.")
            batch[key] = self._collate(key, [sample[key] for sample in samples], batch, lengths)
        return batch

    def _collate(self, key: str, values: list[Any], batch: dict[str, Any], lengths: list[int] | None) -> Any:
        first = values[0]
        if isinstance(first, Mapping):
            return self._batch(values, lengths)
        if isinstance(first, bool | int | float | np.number):
            return torch.as_tensor(np.asarray(values))
        if not _is_sequence(first):
            return values
        rows = [_tensor(key, value) for value in values]
        if rows[0].ndim == 0:
            return torch.stack(rows)
        of_tokens = self._of_tokens(key, rows, lengths)
        if of_tokens:
            rows = [row[: self.max_length] for row in rows]
        if (name := self.masks.get(key)) and name not in batch:
            batch[name] = self._pad(key, [torch.ones(len(row), dtype=torch.int64) for row in rows], 0, of_tokens)
        return self._pad(key, rows, self.fill.get(key, 0), of_tokens)

    def _of_tokens(self, key: str, rows: list[Tensor], lengths: list[int] | None) -> bool:
        if self.sequences is not None:
            return key in self.sequences
        return key in self._usual and [len(row) for row in rows] == lengths

    def _pad(self, key: str, rows: list[Tensor], fill: float, of_tokens: bool) -> Tensor:
        if len({row.shape[1:] for row in rows}) > 1:
            raise DataError(
                f"`{key}` has shapes {', '.join(str(tuple(row.shape)) for row in rows[:3])} in one batch: only the"
                " first dimension may differ."
            )
        length = max(1, *(len(row) for row in rows))
        if of_tokens:
            length = int(padded(np.array([length], np.int32), self.pad_to)[0])
        whole = torch.full((len(rows), length, *rows[0].shape[1:]), fill, dtype=rows[0].dtype)
        for place, row in enumerate(rows):
            whole[place, : len(row)] = row
        return whole


def _find(sample: Mapping[str, Any], key: str) -> Any:
    """What a sample has under a key, at whatever depth; None without."""
    if key in sample:
        return sample[key]
    deeper = (_find(value, key) for value in sample.values() if isinstance(value, Mapping))
    return next((found for found in deeper if found is not None), None)


def _is_sequence(value: Any) -> bool:
    if isinstance(value, np.ndarray | Tensor):
        return True
    return isinstance(value, Sequence) and not isinstance(value, str | bytes) and not _holds_others(value)


def _holds_others(value: Sequence[Any]) -> bool:
    return any(isinstance(each, str | bytes | Mapping) or each is None for each in value)


def _ndim(value: Any) -> int:
    return int(getattr(value, "ndim", 1))


def _tensor(key: str, value: Any) -> Tensor:
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"`{key}` of a sample is no tensor: {error}. Lists within a list must be equally long, and hold numbers."
        ) from error
    return found.long() if found.dtype == torch.int32 else found
