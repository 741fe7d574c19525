"""The conformance matrix: every trick on every engine at every precision. `cases.py` says what a cell asserts."""

import json
import re

import pytest
import torch

from tests.conformance.cases import CASES
from tests.conformance.compare import differences
from tests.conformance.engines import ENGINES, PRECISIONS, REFERENCE, Group
from tests.conformance.render import PAGE, RESULTS, STALE, cells, render

# An engine's cells come one after the other, the reference's first: one group of processes runs at a time.
CELLS = [
    pytest.param(case, engine, precision, id=f"{case.name}-{engine}-{precision}")
    for engine in ENGINES
    for precision in PRECISIONS
    for case in CASES
]


class Matrix:
    """Runs cells, each once, and keeps what they showed."""

    def __init__(self, folder):
        self.folder = folder
        self.results = {}  # (row, engine, precision) -> what the page says
        self._groups = {}
        self._replies = {}

    def fit(self, case, engine, precision):
        """The group's reply, and the cell's folder with the outcomes of its fits."""
        key = (case.name, engine, precision)
        folder = self.folder / engine / precision / re.sub(r"\W+", "_", case.name)
        if key not in self._replies:
            folder.mkdir(parents=True)
            arguments = {"case": case.name, "engine": engine, "precision": precision, "folder": str(folder)}
            self._replies[key] = self._group(engine).call("tests.conformance.fits:cell", **arguments)
        first, *others = self._replies[key]
        assert all(reply == first for reply in others), f"the ranks disagree: {self._replies[key]}"
        return first, folder

    def _group(self, engine):
        for name in [name for name in self._groups if name not in (engine, REFERENCE)]:
            self._groups.pop(name).close()
        if engine not in self._groups:
            self._groups[engine] = Group(ENGINES[engine][1], self.folder / engine, "tests.conformance.fits:warm_up")
        return self._groups[engine]

    def close(self):
        for group in self._groups.values():
            group.close()
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps([[*cell, result] for cell, result in self.results.items()], indent=0))


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    matrix = Matrix(tmp_path_factory.mktemp("matrix"))
    yield matrix
    matrix.close()


@pytest.mark.slow
@pytest.mark.parametrize(("case", "engine", "precision"), CELLS)
def test_cell(matrix, case, engine, precision):
    cell = (case.name, engine, precision)
    matrix.results[cell] = "failed"
    reply, folder = matrix.fit(case, engine, precision)
    if (engine, precision) in case.refused:
        assert reply, "declared as refused, but it trained: take the pair out of the row's `refused`"
        assert re.search(case.refused[engine, precision], reply["message"])
        matrix.results[cell] = f"refused: {reply['reason']}"
    else:
        assert not reply, f"refused, which the row does not declare: {reply['message']}"
        assert_exact(matrix, case, precision, folder)
        matrix.results[cell] = "exact"


def assert_exact(matrix, case, precision, folder):
    _, reference_folder = matrix.fit(case, REFERENCE, precision)
    reference, straight, resumed = (
        torch.load(path, weights_only=True)
        for path in (reference_folder / "straight.pt", folder / "straight.pt", folder / "resumed.pt")
    )
    off = [
        *(f"against one device: {line}" for line in differences(straight, reference, case.tolerance[precision])),
        *(f"resumed against uninterrupted: {line}" for line in differences(resumed, straight, case.resume_tolerance)),
    ]
    assert not off, "\n".join(off)
    case.check(straight)


@pytest.mark.slow
def test_the_page_shows_what_the_cells_showed(matrix):
    shown = cells(PAGE.read_text())
    ran = {cell: result for cell, result in matrix.results.items() if result != "failed"}
    assert ran, "run this test together with the cells"
    assert {cell: shown.get(cell) for cell in ran} == ran, STALE
    if len(ran) == len(CELLS):
        assert PAGE.read_text() == render(ran), STALE


def test_the_page_has_every_cell():
    shown = cells(PAGE.read_text())
    declared = {
        (case.name, engine, precision): "refused" if (engine, precision) in case.refused else "exact"
        for case, engine, precision in (param.values for param in CELLS)
    }
    assert {cell: result.partition(":")[0] for cell, result in shown.items()} == declared, STALE


def test_rows_have_names_of_their_own():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
