"""Several documents to a row, none of which sees another."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_tricks.data._fingerprint import fingerprint_of
from lightning_tricks.data._lengths import checked_lengths
from lightning_tricks.data._plan import check_whole
from lightning_tricks.errors import DataError, MisconfigurationError
from lightning_tricks.functional.packing import pack_best_fit

__all__ = ["PackedDataset", "SequencePacker"]

Attention = Literal["mask", "cu_seqlens", "position_ids"]
ATTENTIONS = ("mask", "cu_seqlens", "position_ids")
REMEDY = {
    "mask": "with flash attention choose 'cu_seqlens'.",
    "cu_seqlens": "without flash attention pass it `use_cache=False`, or choose 'mask'.",
    "position_ids": "pass it `use_cache=False`, or choose 'mask'.",
}
HIDDEN = torch.finfo(torch.float32).min  # added to a score; not -inf, of which some kernels make NaN


class PackedDataset(Dataset[list[Any]]):
    """Rows of documents: sample `i` is the list of the samples packed into row `i`.

    Args:
        dataset: the documents.
        bins: the row of each.

    Example:
        >>> PackedDataset(["a", "b", "c"], np.array([0, 1, 0]))[0]
        ['a', 'c']
    """

    def __init__(self, dataset: Any, bins: np.ndarray) -> None:
        self.dataset = dataset
        self._order = np.argsort(bins, kind="stable")
        self._stops = np.cumsum(np.bincount(bins))

    def __len__(self) -> int:
        return len(self._stops)

    def fingerprint(self) -> str:
        """A checksum of which documents share a row, and the documents' own fingerprint where they have one."""
        packing = zlib.crc32(self._stops.tobytes(), zlib.crc32(self._order.tobytes()))
        return f"{packing:08x} of {fingerprint_of(self.dataset)}"

    def __getitem__(self, index: int) -> list[Any]:
        stop = int(self._stops[index])
        start = int(self._stops[index - 1]) if index else 0
        return [self.dataset[int(document)] for document in self._order[start:stop]]


class SequencePacker:
    """Packs documents into rows of `capacity` tokens, and collates such rows so that attention stays in a document.

    The model is told where documents end in one of three ways. One that it does not follow trains on in silence, with
    tokens that see other documents: `check_isolation` finds that out.

    - `"mask"`: an fp32 mask of shape (batch, 1, capacity, capacity) to be added to the scores, 0 or the least number.
      transformers' models take it with SDPA and eager attention, torch's `scaled_dot_product_attention` as `attn_mask`.
    - `"cu_seqlens"`: the offsets that variable-length kernels take, such as flash attention's, by the names that
      transformers gives them; all documents in one row, without padding.
    - `"position_ids"`: nothing but positions that start anew in each document; all rows in one, of shape (1, batch *
      capacity), for with more than one transformers' flash attention does not look at positions.

    Without flash attention, transformers' causal models understand the last two by their positions, and only with
    `use_cache=False` (or gradient checkpointing); they then make a mask of all rows' tokens squared.

    Args:
        capacity: tokens to a row, 1 or more.
        attention: how the model is told where documents end.
        causal: whether a token sees only those before it. Then labels are the tokens themselves unless samples have
            some, and the first of each document is no target: it would be predicted from another document.
        pad_id: the token that fills a row up; padding is a document of its own.
        ignore_index: the label of what is no target.

    Raises:
        MisconfigurationError: for an option out of range.

    Example:
        >>> packer = SequencePacker(4)
        >>> rows = packer.pack([{"input_ids": [5, 6]}, {"input_ids": [7, 8, 9]}, {"input_ids": [4]}], [2, 3, 1])
        >>> batch = packer([rows[0]])
        >>> batch["input_ids"].tolist(), batch["position_ids"].tolist(), batch["labels"].tolist()
        ([[7, 8, 9, 4]], [[0, 1, 2, 0]], [[-100, 8, 9, -100]])
        >>> (batch["attention_mask"] == 0)[0, 0].int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]
    """

    def __init__(
        self,
        capacity: int,
        *,
        attention: Attention = "mask",
        causal: bool = True,
        pad_id: int = 0,
        ignore_index: int = -100,
    ) -> None:
        check_whole("capacity", capacity, 1)
        if attention not in ATTENTIONS:
            raise MisconfigurationError(f"`attention` must be one of {', '.join(ATTENTIONS)}, got {attention!r}.")
        self.capacity, self.attention, self.causal = capacity, attention, causal
        self.pad_id, self.ignore_index = pad_id, ignore_index

    def pack(self, dataset: Any, lengths: Sequence[int] | np.ndarray) -> PackedDataset:
        """Rows of as few as best-fit-decreasing needs.

        Args:
            dataset: map-style, of samples `{"input_ids": sequence}`, with `"labels"` of each token or not.
            lengths: of each sample.

        Raises:
            DataError: if the lengths are not those of the dataset, or one exceeds the capacity.
        """
        found = checked_lengths(lengths)
        if len(found) != len(dataset):
            raise DataError(f"There are {len(found)} lengths, but {len(dataset)} samples.")
        if (longest := int(found.max())) > self.capacity:
            raise DataError(
                f"Sample {int(found.argmax())} has length {longest}, more than `capacity={self.capacity}`. Cut or"
                " split such documents first, or raise the capacity."
            )
        return PackedDataset(dataset, pack_best_fit(found, self.capacity)[0])

    def __call__(self, rows: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        """Collate rows of a `PackedDataset`.

        Raises:
            DataError: if a row is longer than the capacity: its documents were not packed by their true lengths.
        """
        if self.attention == "cu_seqlens":
            return self._flat([document for row in rows for document in row])
        parts = [self._row(row) for row in rows]
        batch: dict[str, Any] = {key: torch.stack([part[key] for part in parts]) for key in parts[0]}
        if self.attention == "position_ids":
            return {key: part.view(1, -1) for key, part in batch.items()}
        return {**batch, "attention_mask": self._mask(batch["position_ids"])}

    def _row(self, row: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        parts = self._documents(row)
        missing = self.capacity - len(parts["input_ids"])
        if missing < 0:
            raise DataError(
                f"A row holds {-missing} tokens more than `capacity={self.capacity}`: measure lengths anew."
            )
        fill = {
            "input_ids": torch.full((missing,), self.pad_id),
            "position_ids": torch.arange(missing),
            "labels": torch.full((missing,), self.ignore_index),
        }
        return {key: torch.cat([part, fill[key]]) for key, part in parts.items()}

    def _documents(self, documents: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids = [torch.as_tensor(document["input_ids"]).long() for document in documents]
        parts = {"input_ids": torch.cat(ids), "position_ids": torch.cat([torch.arange(len(each)) for each in ids])}
        if self.causal or "labels" in documents[0]:
            labels = torch.cat([torch.as_tensor(d.get("labels", d["input_ids"])).long() for d in documents])
            first = parts["position_ids"] == 0
            parts["labels"] = labels.masked_fill(first, self.ignore_index) if self.causal else labels
        return parts

    def _flat(self, documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        sizes = torch.tensor([len(document["input_ids"]) for document in documents], dtype=torch.int32)
        offsets = torch.nn.functional.pad(sizes.cumsum(0, dtype=torch.int32), (1, 0))
        longest = int(sizes.max())
        whole = {key: part[None] for key, part in self._documents(documents).items()}
        ends = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": longest, "max_length_k": longest}
        return {**whole, **ends}

    def _mask(self, positions: Tensor) -> Tensor:
        documents = _documents_of(positions)
        same = documents[:, None, :, None] == documents[:, None, None, :]
        seen = same.tril() if self.causal else same
        # Not a boolean one: eager attention would add it to the scores, which hides nothing.
        return torch.zeros(seen.shape).masked_fill(~seen, HIDDEN)

    def check_isolation(self, model: Callable[..., Any], batch: Mapping[str, Any], *, tolerance: float = 1e-4) -> None:
        """See that in this batch no token's output depends on another document, by changing documents.

        Costs a forward pass, and two for each doubling of the number of documents in a row. Leave dropout off.

        Args:
            model: called with the batch's entries but the labels; returns a tensor of shape (batch, length, ...), or
                an object with `logits` or `last_hidden_state`.
            batch: what this packer collated.
            tolerance: the largest change that rounding explains.

        Raises:
            MisconfigurationError: naming a token that does.
        """
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        documents = _documents_of(batch["position_ids"])
        with torch.no_grad():
            before = _output(model(**inputs))
            for bit in range(int(documents.max()).bit_length()):
                for value in (0, 1):
                    changed = (documents >> bit) % 2 == value
                    ids = torch.where(changed, _other(inputs["input_ids"]), inputs["input_ids"])
                    moved = (_output(model(**{**inputs, "input_ids": ids})) - before).abs().flatten(2).amax(-1)
                    self._refuse_leak(moved.masked_fill(changed, 0), tolerance)

    def _refuse_leak(self, moved: Tensor, tolerance: float) -> None:
        if float(moved.max()) > tolerance:
            row, token = divmod(int(moved.argmax()), moved.shape[1])
            raise MisconfigurationError(
                f"Token {token} of row {row} sees another document: its output moved by {float(moved.max()):.2g} when"
                f" only others were changed. The model does not follow `attention={self.attention!r}`;"
                f" {REMEDY[self.attention]}"
            )


def _documents_of(positions: Tensor) -> Tensor:
    """The number of each token's document in its row."""
    return (positions == 0).cumsum(1)


def _other(ids: Tensor) -> Tensor:
    return torch.where(ids > 0, ids - 1, ids + 1)


def _output(found: Any) -> Tensor:
    for name in ("logits", "last_hidden_state"):
        found = getattr(found, name, found)
    return torch.as_tensor(found).float()
