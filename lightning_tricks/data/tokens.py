"""Tokenise texts once, and keep the result in a cache that is found by content."""

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from torch.utils.data import Dataset

from lightning_tricks.errors import DataError, MissingDependencyError

__all__ = ["TokenDataset", "TokenizedTexts", "cache_folder", "load_tokenizer", "tokenize"]

CHUNK = 500  # texts tokenised at a time
EDGE = 4096  # tokens at either end that a fingerprint goes by
VERSION = "1"  # of the cache's layout


class TokenizedTexts:
    """Token ids of many texts: one flat array and the offset of each text, memory-mapped.

    Args:
        tokens: int32 ids of all texts, one after the other.
        offsets: int64, one more than there are texts: text `i` is `tokens[offsets[i]:offsets[i + 1]]`.

    Example:
        >>> texts = TokenizedTexts(np.array([5, 6, 7], np.int32), np.array([0, 2, 3]))
        >>> len(texts), texts[0].tolist(), texts.lengths.tolist()
        (2, [5, 6], [2, 1])
    """

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray) -> None:
        self.tokens = tokens
        self.offsets = offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        # A copy: what leaves the map is writable, as torch wants it.
        return np.array(self.tokens[self.offsets[index] : self.offsets[index + 1]])

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each text."""
        return np.diff(self.offsets)


class TokenDataset(Dataset[dict[str, Any]]):
    """Samples `{"input_ids", "label"}` of some of the texts, in the order of `rows`.

    Args:
        texts: all texts.
        rows: which of them.
        labels: the class index of each of `texts`; without it samples have no `label`.

    Example:
        >>> texts = TokenizedTexts(np.array([5, 6, 7], np.int32), np.array([0, 2, 3]))
        >>> TokenDataset(texts, [1], labels=[0, 3])[0]
        {'input_ids': array([7], dtype=int32), 'label': 3}
    """

    def __init__(self, texts: TokenizedTexts, rows: Sequence[int] | np.ndarray, labels: Any = None) -> None:
        self.texts = texts
        self.rows = rows
        self.labels = labels

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        """A checksum of the chosen rows, of all texts' lengths and labels, and of the first and the last tokens."""
        parts = [
            np.asarray(self.rows, np.int64),
            self.texts.offsets,
            self.texts.tokens[:EDGE],
            self.texts.tokens[-EDGE:],
        ]
        if self.labels is not None:
            parts.append(np.asarray(self.labels, np.int64))
        checksum = 0
        for part in parts:
            checksum = zlib.crc32(np.ascontiguousarray(part).data, checksum)
        return f"{checksum:08x}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = int(self.rows[index])
        sample: dict[str, Any] = {"input_ids": self.texts[row]}
        if self.labels is not None:
            sample["label"] = int(self.labels[row])
        return sample


def cache_folder() -> Path:
    """Where tokenised texts are kept: `lightning-tricks` below `XDG_CACHE_HOME`, or below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning-tricks"


def load_tokenizer(name: str | Path) -> Any:
    """A Hugging Face tokenizer by id or folder.

    Raises:
        MissingDependencyError: without transformers.
        DataError: if there is no such tokenizer, or it has no token to pad with.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingDependencyError(
            "Tokenising needs transformers. Run: pip install 'lightning-tricks[transformers]'"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name))
    except (OSError, ValueError) as error:
        raise DataError(f"There is no tokenizer `{name}`: give a folder or a Hugging Face id. {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise DataError(f"The tokenizer `{name}` has no token to pad with. Set its `pad_token` and save it again.")
    return tokenizer


def tokenize(texts: Sequence[str], tokenizer: Any, *, max_length: int, folder: Path | None = None) -> TokenizedTexts:
    """The token ids of `texts`, from the cache if the same texts were tokenised in the same way before.

    An entry appears in the cache only when it is complete, so several processes may run this at the same time.

    Args:
        texts: what to tokenise.
        tokenizer: a Hugging Face tokenizer.
        max_length: the most tokens of a text, special ones included; what is longer is cut at the end.
        folder: the cache, `cache_folder()` by default.

    Raises:
        DataError: if the cache cannot be written or is damaged.
    """
    folder = cache_folder() if folder is None else Path(folder)
    entry = folder / _content_key(texts, tokenizer, max_length)
    if not entry.is_dir():
        _write(entry, *_tokenize(texts, tokenizer, max_length))
    return _load(entry)


def _content_key(texts: Sequence[str], tokenizer: Any, max_length: int) -> str:
    digest = hashlib.sha256(f"{VERSION} {max_length} {len(texts)} {_identity(tokenizer)}".encode())
    for text in texts:
        content = text.encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def _identity(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return f"{type(tokenizer).__name__} {sorted(tokenizer.get_vocab().items())} {tokenizer.init_kwargs}"
    rules = json.loads(backend.to_str())
    # These two are left behind by the latest call, not part of the tokenizer.
    return json.dumps({**rules, "truncation": None, "padding": None}, sort_keys=True)


def _tokenize(texts: Sequence[str], tokenizer: Any, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    console = Console(stderr=True)
    rows: list[list[int]] = []
    starts = range(0, len(texts), CHUNK)
    for start in track(starts, "Tokenising", console=console, disable=not console.is_terminal):
        chunk = list(texts[start : start + CHUNK])
        rows += tokenizer(chunk, truncation=True, max_length=max_length)["input_ids"]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
    return np.fromiter((token for row in rows for token in row), np.int32, offsets[-1]), offsets


def _write(entry: Path, tokens: np.ndarray, offsets: np.ndarray) -> None:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=entry.parent))
    except OSError as error:
        raise DataError(
            f"The cache folder `{entry.parent}` cannot be written ({error.strerror})."
            " Set XDG_CACHE_HOME to one that can."
        ) from error
    try:
        _save(partial / "tokens.npy", tokens)
        _save(partial / "offsets.npy", offsets)
        partial.rename(entry)
    except OSError:
        if not entry.is_dir():  # else another process was quicker, with the same content
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _save(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())


def _load(entry: Path) -> TokenizedTexts:
    try:
        tokens = np.load(entry / "tokens.npy", mmap_mode="r")
        offsets = np.load(entry / "offsets.npy")
        if len(tokens) == offsets[-1]:
            return TokenizedTexts(tokens, offsets)
        problem = "its parts do not match"
    except (EOFError, OSError, ValueError) as error:
        problem = str(error)
    raise DataError(f"The cache entry `{entry}` is damaged: {problem}. Delete it; it will be written again.")
