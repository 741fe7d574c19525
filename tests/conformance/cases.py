"""The rows of the matrix: one for each trick.

How to add a row
    1. Write a top-level function that returns a `Run`: the module to fit, its callbacks, further Trainer options, the
       number of samples. It is called on every rank, with the same seed, before every fit. `tests/conformance/model.py`
       has the module to start from; build on it without dropout, whose masks depend on the number of ranks.
    2. If the trick has outcomes besides the weights and what it logs (a best step, a file), write
       `observe(run, trainer)`: it is called on every rank after a fit and returns plain values and tensors by name.
    3. Write `check(outcome)`: what shows that the trick did something in this fit, so that its cells are not vacuous
       (clipping really clipped), and any truth that needs no second engine (the file is the mean of its members).
    4. Add `Case(trick="YourTrick", build=..., ...)` to `CASES`; `trick` is the exported name.
    5. `make matrix` runs all cells and renders docs/matrix.md; `pytest tests/conformance -k YourTrick` runs the row.

Each cell, on its own engine and precision, does two fits of three epochs: an uninterrupted one, and one that is
interrupted in the second epoch, two batches after its checkpoint, and resumed. It then asserts that
    - the uninterrupted fit gave the outcome of the same fit on one device: the same names, weights within `tolerance`
      of each tensor's largest value, likewise whatever was logged and observed (other values: equal);
    - the resumed fit gave the outcome of the uninterrupted one, within `resume_tolerance` (0: bit for bit);
    - `check` holds.
Global batches are the same on every engine; the last one of an epoch is smaller, and sequences are ragged.

An engine that cannot do the trick exactly must refuse it. Declare that as `refused={(engine, precision): pattern}`:
the cell then asserts that the fit raises `UnsupportedError` with a message in which `re.search(pattern)` finds a match.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning as L

from tests.conformance.model import Classifier

__all__ = ["CASES", "Case", "Run", "case_named"]

EXACT = {"32-true": 2e-5, "bf16-mixed": 2e-2}


@dataclass(frozen=True)
class Run:
    """What is fitted: built anew for each fit."""

    module: L.LightningModule
    callbacks: tuple[L.Callback, ...] = ()
    trainer: Mapping[str, Any] = field(default_factory=dict)  # options of the Trainer
    samples: int = 54  # global batches of 8: six whole ones and one of 6
    validation_samples: int = 28


def nothing(run: Run, trainer: L.Trainer) -> dict[str, Any]:
    """Observe nothing but the weights and what is logged."""
    return {}


@dataclass(frozen=True)
class Case:
    """One row: a trick, how to fit with it, and what must hold.

    Args:
        trick: the trick's exported name.
        build: makes the `Run`.
        check: raises AssertionError if an uninterrupted fit's outcome shows that the trick did nothing, or wrong.
        observe: outcomes besides the weights and what is logged; collective.
        variant: tells several rows of one trick apart.
        tolerance: largest deviation from one device by precision, relative to each tensor's largest value.
        resume_tolerance: the same for resumed against uninterrupted, on one engine.
        refused: pattern of the message with which (engine, precision) refuses the trick.
    """

    trick: str
    build: Callable[[], Run]
    check: Callable[[dict[str, Any]], None]
    observe: Callable[[Run, L.Trainer], dict[str, Any]] = nothing
    variant: str = ""
    tolerance: Mapping[str, float] = field(default_factory=lambda: EXACT)
    resume_tolerance: float = 0.0
    refused: Mapping[tuple[str, str], str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.trick} ({self.variant})" if self.variant else self.trick


# -- no trick ----------------------------------------------------------------------------------------------------------


def plain() -> Run:
    return Run(Classifier())


def plain_accumulating() -> Run:
    """Seven batches in windows of two: the last window of an epoch is half a one."""
    return Run(Classifier(), trainer={"accumulate_grad_batches": 2})


def check_learned(outcome: dict[str, Any]) -> None:
    losses = outcome["logged"]["val/loss"]["values"]
    assert losses[-1] < losses[0] - 0.02


CASES = (
    Case("Plain", plain, check_learned),
    Case("Plain", plain_accumulating, check_learned, variant="accumulating"),
)


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)
