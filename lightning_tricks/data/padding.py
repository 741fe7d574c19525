"""Make a batch of token sequences: padded to the longest of the batch, not of the corpus."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["PadToLongest"]


class PadToLongest:
    """Collate samples `{"input_ids": sequence, "label": int}` into padded tensors.

    Gives `input_ids` and `attention_mask`, both int64 of shape (batch, longest), and `labels`, int64 of shape (batch,),
    if the samples have labels.

    Args:
        pad_id: the token that fills up; its place has 0 in the mask.

    Example:
        >>> batch = PadToLongest(pad_id=0)([{"input_ids": [5, 6], "label": 1}, {"input_ids": [7], "label": 0}])
        >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["labels"].tolist()
        ([[5, 6], [7, 0]], [[1, 1], [1, 0]], [1, 0])
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate `samples`."""
        rows = [torch.as_tensor(sample["input_ids"]) for sample in samples]
        shape = (len(rows), max(len(row) for row in rows))
        ids = torch.full(shape, self.pad_id, dtype=torch.int64)
        mask = torch.zeros(shape, dtype=torch.int64)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = row
            mask[place, : len(row)] = 1
        batch = {"input_ids": ids, "attention_mask": mask}
        if "label" in samples[0]:
            batch["labels"] = torch.tensor([sample["label"] for sample in samples])
        return batch
