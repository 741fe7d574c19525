"""Write docs/matrix.md from the results of the matrix: `python -m tests.conformance.render`, or `make matrix`.

It runs all cells first; `--from-last-run` renders what runs of the tests left in build/conformance, so that after a new
row `pytest tests/conformance -k NewRow` is enough.
"""

import argparse
import json
import subprocess
import sys

from tests.conformance.cases import CASES
from tests.conformance.engines import ENGINES, PRECISIONS, ROOT

PAGE = ROOT / "docs" / "matrix.md"
RESULTS = ROOT / "build" / "conformance"  # a file for each engine, whose cells one process runs
STALE = "docs/matrix.md is stale. Run: make matrix"

INTRODUCTION = """\
<!-- Rendered by `make matrix` from the results of tests/conformance. Do not edit. -->
# The conformance matrix

Every trick, on every engine, at every precision, on CPU; all engines but `one_device` with 2 processes over gloo.
A cell is the outcome of its test:

- **exact**: the fit gave what the same fit gave on one device (weights, logged values, files), within the row's
  tolerance of each tensor's largest value; interrupted in mid-epoch and resumed, it gave what the uninterrupted fit
  gave, within the row's tolerance for that; and the trick demonstrably did something.
  `one_device` is what the others are compared with.
- **refused**: the engine cannot do it exactly, and the fit raises `UnsupportedError` with this reason.

To add a row, see tests/conformance/cases.py.
"""

Results = dict[tuple[str, str, str], str]  # (row, engine, precision) -> result


def render(results: Results) -> str:
    """The page. It depends on the results and the rows alone: no dates, no timings."""
    tables = (f"\n## {precision}\n\n{_table(results, precision)}" for precision in PRECISIONS)
    return INTRODUCTION + "".join(tables)


def _table(results: Results, precision: str) -> str:
    rows = [["row", *ENGINES, "tolerance", "resumed"], ["---"] * (len(ENGINES) + 3)]
    for case in CASES:
        tolerances = [f"{case.tolerance[precision]:g}", f"{case.resume_tolerance:g}"]
        rows.append([case.name, *(results[case.name, engine, precision] for engine in ENGINES), *tolerances])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def remember(results: Results) -> None:
    """Keep what cells showed, beside what was kept of others before."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for engine in {engine for _, engine, _ in results}:
        kept = {cell: result for cell, result in (remembered() | results).items() if cell[1] == engine}
        (RESULTS / f"{engine}.json").write_text(json.dumps([[*cell, kept[cell]] for cell in kept], indent=0))


def remembered() -> Results:
    """What was kept."""
    lines = (line for file in sorted(RESULTS.glob("*.json")) for line in json.loads(file.read_text()))
    return {(row, engine, precision): result for row, engine, precision, result in lines}


def cells(page: str) -> Results:
    """The results that a rendered page shows."""
    found: Results = {}
    precision, engines = "", []
    for line in page.splitlines():
        if line.startswith("## "):
            precision = line.removeprefix("## ")
        elif line.startswith("| row |"):
            engines = _columns(line)[1:-2]
        elif line.startswith("| ") and not line.startswith("| ---"):
            row, *results = _columns(line)[:-2]
            found |= {(row, engine, precision): result for engine, result in zip(engines, results, strict=True)}
    return found


def _columns(line: str) -> list[str]:
    return [column.strip() for column in line.strip("| ").split(" | ")]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance.render", description=__doc__)
    parser.add_argument("--from-last-run", action="store_true", help="do not run the cells again")
    if not parser.parse_args().from_last_run:
        tests = "tests/conformance/test_matrix.py -k test_cell -q"
        subprocess.run([sys.executable, "-m", "pytest", *tests.split()], cwd=ROOT, check=False)
    results = remembered()
    wanted = [(case.name, engine, precision) for case in CASES for engine in ENGINES for precision in PRECISIONS]
    open_cells = [cell for cell in wanted if results.get(cell, "failed") == "failed"]
    if open_cells:
        sys.exit(f"docs/matrix.md is left as it is, for these cells failed or were not run: {open_cells}")
    PAGE.write_text(render(results))


if __name__ == "__main__":
    main()
