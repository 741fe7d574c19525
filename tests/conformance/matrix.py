"""Runs cells in groups of processes, and compares what came of them."""

import re
from pathlib import Path
from typing import Any

import torch

from tests.conformance.compare import differences
from tests.conformance.engines import ENGINES, NODES, REFERENCE, Group

__all__ = ["Matrix", "outcome"]


class Matrix:
    """The cells of some rows, each fitted once, when it is first asked for.

    Args:
        rows: the module whose `CASES` are the rows.
        folder: where outcomes and logs go.
    """

    def __init__(self, rows: str, folder: Path) -> None:
        self.rows = rows
        self.folder = folder
        self.results: dict[tuple[str, str, str], str] = {}  # (row, engine, precision) -> what the page says
        self._groups: dict[str, Group] = {}
        self._replies: dict[tuple[str, str, str], list[dict[str, str]]] = {}

    def fit(self, case: Any, engine: str, precision: str) -> tuple[dict[str, str], Path]:
        """The group's reply, and the cell's folder with the outcomes of its fits."""
        key = (case.name, engine, precision)
        folder = self.folder / engine / precision / re.sub(r"\W+", "_", case.name)
        if key not in self._replies:
            folder.mkdir(parents=True)
            arguments = {"case": case.name, "engine": engine, "precision": precision, "folder": str(folder)}
            group = self._group(engine)
            self._replies[key] = group.call("tests.conformance.fits:cell", rows=self.rows, **arguments)
        first, *others = self._replies[key]
        assert all(reply == first for reply in others), f"the ranks disagree: {self._replies[key]}"
        return first, folder

    def deviations(self, case: Any, engine: str, precision: str) -> list[str]:
        """In what the cell's fits differ from one device, and the resumed one from the uninterrupted one."""
        _, folder = self.fit(case, engine, precision)
        _, reference_folder = self.fit(case, REFERENCE, precision)
        reference, straight = outcome(reference_folder, "straight"), outcome(folder, "straight")
        for each in (reference, straight):
            each["weights"] |= {name: w.float() for name, w in each["weights"].items() if re.search(case.at_rest, name)}
        off = differences(straight, reference, case.tolerance[precision])
        lost = differences(outcome(folder, "resumed"), outcome(folder, "straight"), case.resume_tolerance)
        return [
            *(f"against one device: {line}" for line in off),
            *(f"resumed against uninterrupted: {line}" for line in lost),
        ]

    def close(self) -> None:
        """End all processes."""
        for group in self._groups.values():
            group.close()

    def _group(self, engine: str) -> Group:
        if engine != REFERENCE:  # which is asked for between the cells of another engine
            for name in [name for name in self._groups if name not in (engine, REFERENCE)]:
                self._groups.pop(name).close()
        if engine not in self._groups:
            world, nodes = ENGINES[engine][1], NODES.get(engine, 1)
            self._groups[engine] = Group(world, self.folder / engine, "tests.conformance.fits:warm_up", nodes)
        return self._groups[engine]


def outcome(folder: Path, name: str) -> dict[str, Any]:
    """What a fit left in its cell's folder."""
    return torch.load(folder / f"{name}.pt", weights_only=True)
