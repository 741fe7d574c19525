"""The file that an augmentation writes, and what is written beside it to know it again."""

import csv
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from lightning_tricks.data._journal import first_difference
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.storage._atomic import atomic_file

__all__ = ["AugmentReport", "finished", "unfinished", "write_report"]


@dataclasses.dataclass(frozen=True)
class AugmentReport:
    """What became of the texts.

    Args:
        path: the file that was written.
        sources: rows of the input.
        written: rows of the output.
        duplicates: left out, as too like their source, or like another text.
        empty: left out, as nothing came of them, or no end.
        too_long: not tried, as they have more tokens than the model takes.

    Example:
        >>> print(AugmentReport(Path("more.csv"), sources=10, written=17, duplicates=2, empty=1, too_long=0))
        Wrote `more.csv`: 17 texts made of 10. Left out: 2 near-duplicates, 1 empty or without an end, 0 too long.
    """

    path: Path
    sources: int
    written: int
    duplicates: int
    empty: int
    too_long: int

    def __str__(self) -> str:
        return (
            f"Wrote `{self.path}`: {self.written} texts made of {self.sources}. Left out: {self.duplicates}"
            f" near-duplicates, {self.empty} empty or without an end, {self.too_long} too long."
        )


def unfinished(out: Path) -> Path:
    """The file that holds what is made so far."""
    return out.with_name(f"{out.name}.unfinished")


def write_report(report: AugmentReport, header: list[str], rows: list[list[Any]], asked: dict[str, Any]) -> None:
    """Write the rows, then what was asked for and came about. Interrupted between the two, the run is not finished."""
    with atomic_file(report.path) as partial:
        with partial.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(rows)
        digest = _digest(partial)
    counts = {name: value for name, value in dataclasses.asdict(report).items() if name != "path"}
    with atomic_file(_beside(report.path)) as partial:
        content = {"sha256": digest, "counts": counts, "asked": asked}
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def finished(out: Path, asked: dict[str, Any]) -> AugmentReport | None:
    """What a finished run of the same came to; None if the file is not there, or was not finished."""
    if not out.exists() or unfinished(out).exists():
        return None
    try:
        before = json.loads(_beside(out).read_text(encoding="utf-8"))
        same = before["sha256"] == _digest(out)
        difference = first_difference(before["asked"], asked) if same else "other contents"
    except (OSError, ValueError, KeyError, TypeError):
        difference = "unknown options"
    if difference is not None:
        raise MisconfigurationError(
            f"`{out}` is there already, of a run with {difference}. Give another, or remove it."
        )
    return AugmentReport(out, **before["counts"])


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _beside(out: Path) -> Path:
    return out.with_name(f"{out.name}.json")
