"""Train on short sequences first, and let them grow with the tokens that were seen."""

from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_tricks.callbacks._base import TrickCallback
from lightning_tricks.engines import Trick
from lightning_tricks.errors import MisconfigurationError

__all__ = ["SequenceLengthWarmup"]

OFFSETS = "cu_seq"  # how the names of offsets into a packed row begin: cu_seq_lens_q, cu_seqlens


class SequenceLengthWarmup(TrickCallback):
    """Holds the sequences of training batches to a length that grows from `start` to `end`.

    The length is linear in the real tokens that were trained on so far, over all ranks: at `tokens` it has grown. They
    are counted as they are cut, survive a resume, and are the same on any number of ranks. Batches are dictionaries,
    possibly nested ones. The length is logged as `sequence_length`. Validation and test see whole sequences.

    By truncation, every tensor of the batch whose first two dimensions are those of `key` is cut: at its end, or at its
    beginning where the mask says that the padding stands there. By filtering, the
    samples that are longer are left out, of every tensor and list whose first dimension is that of `key`; of a batch
    that has no other, the shortest is kept and cut, so that each rank has something to train on.

    Args:
        start: the first length, in tokens, 1 or more.
        end: the last length: what training sequences have at most.
        tokens: real tokens over which the length grows, 1 or more.
        multiple: lengths are rounded down to a multiple of this, but not below `start`; 8 suits tensor cores.
        key: of the sequences that are counted and cut, shape (batch, length).
        mask: of what is real in them, of the same shape; a batch without it has no padding, and cannot be filtered.
        by: "truncation" or "filtering".

    Raises:
        MisconfigurationError: if an option is out of range, or a batch is no dictionary with `key`, is without `mask`
            where it is to be filtered, has a mask of another shape, is padded at both ends, or packed.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_tricks.callbacks import SequenceLengthWarmup
        >>> warmup = SequenceLengthWarmup(64, 512, tokens=1_000_000)
        >>> trainer = Trainer(callbacks=[warmup], accelerator="cpu", logger=False)
        >>> warmup.length, warmup.tokens_seen
        (64, 0)

    References:
        Li, Zhang, He: The Stability-Efficiency Dilemma: Investigating Sequence Length Warmup for Training GPT Models
        (NeurIPS 2022).
    """

    trick: ClassVar[Trick] = Trick(jobs=("shorten sequences",), needs=("sum_over_ranks",))

    def __init__(
        self,
        start: int,
        end: int,
        *,
        tokens: int,
        multiple: int = 8,
        key: str = "input_ids",
        mask: str = "attention_mask",
        by: Literal["truncation", "filtering"] = "truncation",
    ) -> None:
        super().__init__()
        for name, value in (("start", start), ("end", end), ("tokens", tokens), ("multiple", multiple)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise MisconfigurationError(f"`{name}` must be a whole number above 0, got {value!r}.")
        if start >= end:
            raise MisconfigurationError(f"`start={start}` must be below `end={end}`, or there is nothing to warm up.")
        self.start, self.end, self.tokens, self.multiple = start, end, tokens, multiple
        if by not in ("truncation", "filtering"):
            raise MisconfigurationError(f"`by` must be 'truncation' or 'filtering', got {by!r}.")
        self.key, self.mask, self.by = key, mask, by
        self.tokens_seen = 0

    @property
    def length(self) -> int:
        """The longest sequence that the next batch keeps."""
        if self.tokens_seen >= self.tokens:
            return self.end
        grown = self.start + (self.end - self.start) * self.tokens_seen // self.tokens
        return max(self.start, grown // self.multiple * self.multiple)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Shorten the batch in place, and count it. Done when the warm-up is: nothing more is cut, counted or sent."""
        length = self.length
        pl_module.log("sequence_length", float(length), on_step=True, on_epoch=False)
        if self.tokens_seen >= self.tokens:
            return
        held = _find(batch, self.key)
        if held is None:
            raise MisconfigurationError(
                f"SequenceLengthWarmup needs batches that are dictionaries with `{self.key}` of shape (batch, length),"
                f" got {type(batch).__name__}. Return such from `collate_fn`, or pass another `key`."
            )
        self._refuse_packed(held)
        columns = self._filter(batch, held, length) if self.by == "filtering" else self._columns(held, length)
        if columns is not None:
            _cut(batch, held[self.key].shape[:2], columns)
        self.tokens_seen += self._count(held, two_sided=columns is None)

    def _refuse_packed(self, held: MutableMapping[str, Any]) -> None:
        shape, mask = tuple(held[self.key].shape[:2]), held.get(self.mask)
        if mask is not None and tuple(mask.shape) != shape:
            raise MisconfigurationError(
                f"SequenceLengthWarmup counts and cuts by a `{self.mask}` of shape {shape}, that of `{self.key}`, got"
                f" {tuple(mask.shape)}. Rows of packed documents are full: warm up by SequencePacker's `capacity`."
            )
        if offsets := [name for name in held if name.startswith(OFFSETS)]:
            raise MisconfigurationError(
                f"SequenceLengthWarmup cannot cut a row whose documents end at `{offsets[0]}`: the offsets would lie"
                " beyond it. Warm up by SequencePacker's `capacity`."
            )

    def _columns(self, held: MutableMapping[str, Any], length: int) -> slice | None:
        """The columns to keep: the last ones where the padding comes first. None where it stands at both sides."""
        if self.mask not in held or length >= held[self.key].shape[1]:
            return slice(length)
        real = held[self.mask] != 0
        rows = real[real.any(1)]  # a row of padding alone has no side
        before, after = (bool((~rows[:, side]).any()) for side in (0, -1))
        if before and after:
            return None
        return slice(-length, None) if before else slice(length)

    def _filter(self, batch: Any, held: MutableMapping[str, Any], length: int) -> slice | None:
        """Leave the longer samples out. Returns which columns to keep: those that the others take up."""
        if self.mask not in held:
            raise MisconfigurationError(
                f"`by='filtering'` goes by the lengths of samples, which `{self.mask}` says: the batch has none beside"
                f" `{self.key}`. Return it from `collate_fn` (DynamicPaddingCollator does), or pass another `mask`."
            )
        real = held[self.mask] != 0
        lengths = real.sum(1)
        kept = (lengths <= length).nonzero().flatten()
        if not len(kept):
            _keep(batch, len(lengths), lengths.argmin()[None])
            return self._columns(held, length)
        _keep(batch, len(lengths), kept)
        used = real[kept].any(0).nonzero()
        return slice(1 + int(used.max()) if len(used) else 1)

    def _count(self, held: MutableMapping[str, Any], *, two_sided: bool) -> int:
        """Real tokens over all ranks, which raise together if one of them has padding at both sides."""
        real = held[self.mask].sum() if self.mask in held else torch.tensor(held[self.key].numel())
        told = torch.stack([real.detach().long(), real.new_tensor(two_sided).long()])
        tokens, wrong = self.engine.sum_over_ranks(told).tolist()
        if wrong:
            raise MisconfigurationError(
                f"A batch's `{self.mask}` has padding before some sequences and behind others: cutting either end"
                " would lose tokens and keep padding. Pad them all at the same side."
            )
        return int(tokens)

    def _identity(self) -> dict[str, Any]:
        return {"key": self.key}

    def _capture(self) -> dict[str, Any]:
        return {"tokens_seen": self.tokens_seen}

    def _restore(self, state: dict[str, Any]) -> None:
        self.tokens_seen = state["tokens_seen"]


def _mappings(batch: Any) -> Iterator[MutableMapping[str, Any]]:
    """The batch's dictionaries, however deep they lie."""
    if isinstance(batch, MutableMapping):
        yield batch
        batch = tuple(batch.values())
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        for part in batch:
            yield from _mappings(part)


def _cut(batch: Any, shape: torch.Size, columns: slice) -> None:
    for entries in _mappings(batch):
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.shape[:2] == shape:
                entries[name] = value[:, columns]


def _keep(batch: Any, samples: int, kept: Tensor) -> None:
    for entries in _mappings(batch):
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.ndim and len(value) == samples:
                entries[name] = value[kept.to(value.device)]
            elif isinstance(value, list) and len(value) == samples:
                entries[name] = [value[at] for at in kept.tolist()]


def _find(batch: Any, key: str) -> MutableMapping[str, Any] | None:
    for entries in _mappings(batch):
        if isinstance(entries.get(key), Tensor) and entries[key].ndim >= 2:
            return entries
    return None
