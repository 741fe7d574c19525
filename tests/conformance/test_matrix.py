"""The conformance matrix: every trick on every engine at every precision. `cases.py` says what a cell asserts."""

import re

import pytest

from tests.conformance.cases import CASES
from tests.conformance.engines import ENGINES, PRECISIONS
from tests.conformance.matrix import Matrix, outcome
from tests.conformance.render import PAGE, STALE, cells, remember, render

# An engine's cells come one after the other, the reference's first: one group of processes runs at a time.
CELLS = [
    pytest.param(case, engine, precision, id=f"{case.name}-{engine}-{precision}")
    for engine in ENGINES
    for precision in PRECISIONS
    for case in CASES
]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    matrix = Matrix("tests.conformance.cases", tmp_path_factory.mktemp("matrix"))
    yield matrix
    matrix.close()
    remember(matrix.results)


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
        off = matrix.deviations(case, engine, precision)
        assert not off, "\n".join(off)
        case.check(outcome(folder, "straight"))
        matrix.results[cell] = "exact"


@pytest.mark.slow
@pytest.mark.parametrize("engine", list(ENGINES))
def test_the_page_shows_what_the_cells_showed(matrix, engine):
    shown = cells(PAGE.read_text())
    ran = {cell: result for cell, result in matrix.results.items() if cell[1] == engine and result != "failed"}
    assert ran, "run this test together with the engine's cells"
    assert {cell: shown.get(cell) for cell in ran} == ran, STALE


def test_the_page_is_rendered():
    page = PAGE.read_text()
    assert page == render(cells(page)), STALE


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
