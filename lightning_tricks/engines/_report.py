"""What `check` finds: one line for each trick, and a table of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from lightning_tricks.engines._tricks import Verdict
from lightning_tricks.errors import TricksError

__all__ = ["Finding", "Report"]


@dataclass(frozen=True)
class Finding:
    """What becomes of one trick.

    Args:
        trick: the trick, or the option, as users write it.
        engine: the engine's name.
        verdict: `"exact"`: what it does on one device; `"degraded"`: something else, as `reason` says; `"refused"`:
            a fit would not begin.
        reason: why, as a clause; of an exact trick, what is not known before a fit.
        remedy: what to do instead, as an imperative clause; empty if it is exact.
        error: what a fit raises before its first step, if it is refused.

    Example:
        >>> print(Finding("EarlyStopping", "ddp", "exact"))
        EarlyStopping on ddp: exact.
    """

    trick: str
    engine: str
    verdict: Verdict
    reason: str = ""
    remedy: str = ""
    error: TricksError | None = field(default=None, repr=False, compare=False)

    @property
    def why(self) -> str:
        """The reason and the remedy, as one clause."""
        return f"{self.reason}: {self.remedy}" if self.remedy else self.reason

    def __str__(self) -> str:
        return f"{self.trick} on {self.engine}: {self.verdict}{'. ' * bool(self.why)}{self.why}."


class Report:
    """The findings of `check`, in the order of the Trainer's callbacks: iterate over it, or print it.

    Args:
        findings: one or more for each trick in use.

    Example:
        >>> report = Report([Finding("EarlyStopping", "ddp", "exact")])
        >>> [finding.trick for finding in report], report.verdict
        (['EarlyStopping'], 'exact')
        >>> print(report)
        EarlyStopping  ddp  exact
    """

    def __init__(self, findings: Sequence[Finding]) -> None:
        self.findings = tuple(findings)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def of(self, verdict: Verdict) -> list[Finding]:
        """The findings with this verdict."""
        return [finding for finding in self if finding.verdict == verdict]

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of all."""
        return "refused" if self.of("refused") else "degraded" if self.of("degraded") else "exact"

    def __str__(self) -> str:
        rows = [(finding.trick, finding.engine, finding.verdict, finding.why) for finding in self]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
        lines = ["  ".join([*map(str.ljust, row, widths), row[3]]) for row in rows]
        return "\n".join(line.rstrip() for line in lines)
