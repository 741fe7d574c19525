"""Runs the functions of `checks.py` on an engine's processes, after one device has written the reference."""

from pathlib import Path

from tests.conformance.engines import Group, WorkerError
from tests.engines import checks

JOBS = "tests.engines.check_runs"
FAMILIES = {"one_device": 1, "ddp": 2, "fsdp2": 2, "zero": 2}  # the first letters of an engine -> its processes


def prepare() -> None:
    import logging
    import warnings

    import torch

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def run_check(engine: str, check: str, folder: str) -> None:
    getattr(checks, check)(checks.Run(engine, Path(folder)))


class Checks:
    """The processes of each family of engines, and what became of the references.

    Args:
        folder: where references and logs go.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._groups = {
            family: Group(world, folder / "logs" / family, f"{JOBS}:prepare") for family, world in FAMILIES.items()
        }
        self._references: dict[str, WorkerError | None] = {}

    def run(self, engine: str, check: str) -> None:
        """Run a check on every rank of an engine.

        Raises:
            WorkerError: if it fails on a rank, or on one device before.
        """
        if "one_device" in checks.ONLY.get(check, ("one_device",)):
            self._reference(check)
        if engine != "one_device":
            self._call(engine, check)

    def close(self) -> None:
        for group in self._groups.values():
            group.close()

    def _reference(self, check: str) -> None:
        if check not in self._references:
            self._references[check] = None
            try:
                self._call("one_device", check)
            except WorkerError as error:
                self._references[check] = error
        if (error := self._references[check]) is not None:
            raise error

    def _call(self, engine: str, check: str) -> None:
        family = next(family for family in FAMILIES if engine.startswith(family))
        self._groups[family].call(f"{JOBS}:run_check", engine=engine, check=check, folder=f"{self._folder}")
