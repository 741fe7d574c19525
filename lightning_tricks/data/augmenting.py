"""Make more texts of labelled texts, with language models, once and before training."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from lightning_tricks.data._augment_output import AugmentReport, finished, unfinished, write_report
from lightning_tricks.data._augment_rows import PROVENANCE, checksum, chosen_rows
from lightning_tricks.data._journal import Journal
from lightning_tricks.data._plan import check_whole
from lightning_tricks.data.augmentations import Augmentation
from lightning_tricks.data.texts import read_texts
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional.batching import cut_steps, deal_to_windows

__all__ = ["AugmentReport", "augment"]


class _Batch(NamedTuple):
    way: int
    copy: int
    number: int
    rows: np.ndarray


def augment(
    path: str,
    out: str | Path,
    methods: Sequence[Augmentation],
    *,
    text: str = "text",
    label: str = "category",
    copies: int = 1,
    max_similarity: float = 0.9,
    max_tokens: int = 4096,
    seed: int = 0,
    device: str = "auto",
) -> AugmentReport:
    """Write a CSV of new texts with their sources' labels, for `TextClassificationData(augmented=...)`.

    Interrupted at any point and run again it goes on, and the file is the same to the byte. On one machine it is a pure
    function of the input, the models, the options and the seed. A run that is finished is not run again.

    Every row says what it was made of: `source_row` counts from 1 without the header, `source_checksum` is that text's;
    then the method, the model, the seed, which copy it is, and how like its source it is.

    Args:
        path: CSV, TSV, Parquet or JSON lines, plain, `.bz2` or `.gz`; `reviews` is the corpus that comes as a package.
        out: the `.csv` file to write. What is made so far is kept beside it, with `.unfinished` after its name; what
            was asked for and came about, with `.json`.
        methods: `MaskedReplacement`, `BackTranslation`, `Paraphrase` or your own `Augmentation`, each applied to every
            text. Their models are in memory together.
        text: the column of texts.
        label: the column of classes.
        copies: of each text by each method, 1 or more.
        max_similarity: leave out what shares more than this with its source or another copy of it, in pairs of
            neighbouring words, 0 to 1 (Dice's coefficient). The same words as those of any text in the input or the
            output are left out always.
        max_tokens: padded tokens that a model gets at a time, 1 or more; a longer text is a batch by itself.
        seed: of the draw, 0 or more.
        device: `cpu`, `cuda`, `cuda:1`; `auto` takes a GPU if there is one.

    Raises:
        MisconfigurationError: for an option out of range, a model that cannot do what it should, or an `out` of
            another run; before any text is made.
        DataError: if the file is missing, empty, or lacks a column, or a cell of either is blank.
        MissingDependencyError: without transformers.
    """
    out = Path(out)
    _check(out, methods, (text, label), copies, max_similarity, max_tokens, seed)
    texts, labels = read_texts(str(path), text), read_texts(str(path), label)
    place = _device(device)
    asked = {
        "input": f"{checksum(chr(0).join(texts))} {checksum(chr(0).join(labels))}, {len(texts)} rows",
        "columns": [text, label],
        "options": [copies, max_similarity, max_tokens, seed],
        "methods": [[way.method, *way.models, way.load(place)] for way in methods],
        "device": place.type,
        "versions": _versions(),
    }
    if (done := finished(out, asked)) is not None:
        return done
    batches, too_long = _batches(methods, texts, copies, max_tokens)
    journal = Journal(unfinished(out), asked)
    _make(journal, batches, methods, texts, seed)
    made = {
        (int(row), batch.way, batch.copy): found
        for batch, kept in zip(batches, journal.batches, strict=True)
        for row, found in zip(batch.rows, kept, strict=True)
    }
    rows, counts = chosen_rows(made, texts, labels, methods, max_similarity, seed)
    report = AugmentReport(out, len(texts), len(rows), too_long=too_long, **counts)
    write_report(report, [text, label, *PROVENANCE], rows, asked)
    journal.path.unlink()
    return report


def _make(
    journal: Journal, batches: list[_Batch], methods: Sequence[Augmentation], texts: list[str], seed: int
) -> None:
    done = len(journal.batches)
    if done > len(batches):
        raise MisconfigurationError(f"`{journal.path}` holds more than there is to make. Remove it.")
    console = Console(stderr=True)
    left = track(batches[done:], "Augmenting", console=console, disable=not console.is_terminal)
    for batch in left:
        key = (seed, batch.way, batch.copy, batch.number)
        drawn = int(np.random.SeedSequence(key).generate_state(1)[0])
        journal.add(methods[batch.way].make([texts[row] for row in batch.rows], drawn))


def _batches(
    methods: Sequence[Augmentation], texts: list[str], copies: int, max_tokens: int
) -> tuple[list[_Batch], int]:
    """For each method and copy, batches of about the same length within the budget; and how many were too long."""
    found, too_long = [], 0
    for way, method in enumerate(methods):
        lengths = np.asarray(method.lengths(texts), np.int64)
        rows = np.flatnonzero(lengths <= method.longest)
        too_long += len(texts) - len(rows)
        if not len(rows):
            raise MisconfigurationError(
                f"Every text has more than the {method.longest} tokens that `{method.models[0]}` takes."
            )
        rows, falling = deal_to_windows(rows, lengths, len(rows))
        sizes = cut_steps(falling, len(rows), 1, per_rank=None, budget=max_tokens)
        parts = np.split(rows, np.cumsum(sizes)[:-1])
        found += [_Batch(way, copy, number, part) for copy in range(copies) for number, part in enumerate(parts)]
    return found, too_long


def _versions() -> list[str]:
    import transformers

    return [f"torch {torch.__version__}", f"transformers {transformers.__version__}"]


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (AssertionError, RuntimeError) as error:
        raise MisconfigurationError(f"`device={name}` is not to be had here: {error}") from error
    return found


def _check(
    out: Path,
    methods: Sequence[Augmentation],
    columns: tuple[str, str],
    copies: int,
    most: float,
    max_tokens: int,
    seed: int,
) -> None:
    if not methods or not all(isinstance(method, Augmentation) for method in methods):
        raise MisconfigurationError(f"`methods` must hold at least one `Augmentation`, got {methods!r}.")
    if out.suffix != ".csv":
        raise MisconfigurationError(f"`out` must be the name of a `.csv` file, got `{out}`.")
    for name, value, least in (("copies", copies, 1), ("max_tokens", max_tokens, 1), ("seed", seed, 0)):
        check_whole(name, value, least)
    if not 0 <= most <= 1:
        raise MisconfigurationError(f"`max_similarity` must be from 0 to 1, got {most}. 0.9 is usual.")
    if clash := sorted({*columns} & {*PROVENANCE}) or columns[0] == columns[1]:
        raise MisconfigurationError(
            f"The columns {columns} must differ from one another and from {', '.join(PROVENANCE)} ({clash})."
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MisconfigurationError(f"The folder of `out={out}` cannot be made ({error.strerror}).") from error
