"""Lightning's FSDPStrategy on two real processes, against one device."""

import pytest

from tests.engines.check_runs import Checks

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

# All that neither tests a module after its fit, which Lightning's strategy cannot do, nor is of another engine's.
CHECKS = [
    "names_and_ranks",
    "twenty_steps",
    "accumulation",
    "clipping",
    "scaled_gradients",
    "weights_file_bf16",
    "mismatches",
    "unwritable",
    "resume",
    "threshold_stays_behind",
    "overwritten",
    "read",
    "frozen_kept",
    "built_late",
    "engines_keep_no_model_alive",
    "not_finite",
    "vetoed",
    "vetoed_finite",
    "vetoed_scaled",
    "scaler_skips",
    "group_norms",
    "group_norms_frozen",
    "group_norms_low",
    "group_norms_bad",
    "shards_swapped",
    "shards_frozen",
    "shards_misfit",
]


class Runs(Checks):
    """Checks whose two processes train under FSDP1."""

    def _call(self, engine, check, **options):
        if engine != "fsdp1":
            super()._call(engine, check)
            return
        self._groups["fsdp2"].call(
            "tests.engines.fsdp1_jobs:run_check", check=check, folder=f"{self._folder}", **options
        )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = Runs(tmp_path_factory.mktemp("fsdp1"))
    yield made
    made.close()


@pytest.mark.parametrize("check", CHECKS)
def test_check(runs, check):
    runs.run("fsdp1", check)
