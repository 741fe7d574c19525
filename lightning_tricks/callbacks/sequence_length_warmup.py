"""Train on short sequences first, and let them grow with the tokens that were seen."""

from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_tricks.callbacks._base import TrickCallback
from lightning_tricks.engines import Trick
from lightning_tricks.errors import MisconfigurationError

__all__ = ["SequenceLengthWarmup"]


class SequenceLengthWarmup(TrickCallback):
    """Cuts the sequences of training batches to a length that grows from `start` to `end`.

    The length is linear in the real tokens that were trained on so far, over all ranks: at `tokens` it has grown. They
    are counted as they are cut, survive a resume, and are the same on any number of ranks. Every tensor of the batch
    whose first two dimensions are those of `key` is cut. Batches are dictionaries, possibly nested ones. The length is
    logged as `sequence_length`. Validation and test see whole sequences.

    Args:
        start: the first length, in tokens, 1 or more.
        end: the last length: what training sequences have at most.
        tokens: real tokens over which the length grows, 1 or more.
        multiple: lengths are rounded down to a multiple of this, but not below `start`; 8 suits tensor cores.
        key: of the sequences that are counted and cut, shape (batch, length).
        mask: of what is real in them, of the same shape; a batch without it has no padding.

    Raises:
        MisconfigurationError: if an option is out of range, or a batch is no dictionary with `key`.

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
    ) -> None:
        super().__init__()
        for name, value in (("start", start), ("end", end), ("tokens", tokens), ("multiple", multiple)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise MisconfigurationError(f"`{name}` must be a whole number above 0, got {value!r}.")
        if start >= end:
            raise MisconfigurationError(f"`start={start}` must be below `end={end}`, or there is nothing to warm up.")
        self.start, self.end, self.tokens, self.multiple = start, end, tokens, multiple
        self.key, self.mask = key, mask
        self.tokens_seen = 0

    @property
    def length(self) -> int:
        """The longest sequence that the next batch keeps."""
        if self.tokens_seen >= self.tokens:
            return self.end
        grown = self.start + (self.end - self.start) * self.tokens_seen // self.tokens
        return max(self.start, grown // self.multiple * self.multiple)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Cut the batch in place, and count it. Done when the warm-up is: nothing more is cut, counted or sent."""
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
        shape = held[self.key].shape[:2]
        for entries in _mappings(batch):
            for name, value in entries.items():
                if isinstance(value, Tensor) and value.shape[:2] == shape:
                    entries[name] = value[:, :length]
        self.tokens_seen += self._count(held)

    def _count(self, held: MutableMapping[str, Any]) -> int:
        real = held[self.mask].sum() if self.mask in held else torch.tensor(held[self.key].numel())
        return int(self.engine.sum_over_ranks(real.detach().long()))

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


def _find(batch: Any, key: str) -> MutableMapping[str, Any] | None:
    for entries in _mappings(batch):
        if isinstance(entries.get(key), Tensor) and entries[key].ndim >= 2:
            return entries
    return None
