"""Which of the texts that were made are kept, and the rows that they become."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_tricks.data._similarity import similarity, words
from lightning_tricks.data.augmentations import Augmentation

__all__ = ["PROVENANCE", "checksum", "chosen_rows"]

PROVENANCE = ("source_row", "source_checksum", "method", "model", "seed", "copy", "similarity")


def checksum(text: str) -> str:
    """CRC-32 of a text in UTF-8.

    Example:
        >>> checksum("film")
        '8244be22'
    """
    return f"{zlib.crc32(text.encode('utf-8', 'surrogatepass')):08x}"


def chosen_rows(
    made: Mapping[tuple[int, int, int], str],
    texts: Sequence[str],
    labels: Sequence[str],
    methods: Sequence[Augmentation],
    most: float,
    seed: int,
) -> tuple[list[list[Any]], dict[str, int]]:
    """The rows to write, in the order of their sources, and how many were left out for what.

    Args:
        made: texts, by the index of their source, the index of the method, and the copy.
        texts: the sources.
        labels: theirs.
        methods: of augmentation.
        most: the similarity from which on a text is a near-duplicate.
        seed: of the run.
    """
    sources = [words(text) for text in texts]
    seen = set(sources)
    kept: dict[int, list[tuple[str, ...]]] = {}
    rows: list[list[Any]] = []
    counts = {"duplicates": 0, "empty": 0}
    for (row, way, copy), text in sorted(made.items()):
        found = words(text)
        if not found:
            counts["empty"] += 1
            continue
        like = similarity(found, sources[row])
        if found in seen or like > most or any(similarity(found, other) > most for other in kept.get(row, [])):
            counts["duplicates"] += 1
            continue
        seen.add(found)
        kept.setdefault(row, []).append(found)
        method = methods[way]
        origin = [row + 1, checksum(texts[row]), method.method, " ".join(method.models), seed, copy]
        rows.append([text, labels[row], *origin, f"{like:.4f}"])
    return rows, counts
