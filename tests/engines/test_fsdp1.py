"""Lightning's FSDPStrategy on two real processes, against one device."""

from types import SimpleNamespace

import pytest

from lightning_tricks.engines import _flat
from lightning_tricks.errors import UnsupportedError
from tests.engines.check_runs import Checks

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

# All but those that test a module after its fit, which Lightning's strategy cannot do, or save a checkpoint, in which
# torch's FSDP1 crashes on CPUs.
CHECKS = [
    "names_and_ranks",
    "twenty_steps",
    "accumulation",
    "clipping",
    "scaled_gradients",
    "weights_file_bf16",
    "mismatches",
    "unwritable",
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
    "shards_misfit",
]


WAYS = [
    {"sharding_strategy": "SHARD_GRAD_OP"},
    {"sharding_strategy": "NO_SHARD"},
    {"sharding_strategy": "HYBRID_SHARD", "device_mesh": [1, 2]},
    {"auto_wrap_policy": None},
]


class Runs(Checks):
    """Checks whose two processes train under FSDP1."""

    def _call(self, engine, check):
        if engine == "fsdp1":
            self.job("run_check", check=check)
        else:
            super()._call(engine, check)

    def job(self, name, **arguments):
        self._groups["fsdp2"].call(f"tests.engines.fsdp1_jobs:{name}", folder=f"{self._folder}", **arguments)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = Runs(tmp_path_factory.mktemp("fsdp1"))
    yield made
    made.close()


@pytest.mark.parametrize("check", CHECKS)
def test_check(runs, check):
    runs.run("fsdp1", check)


@pytest.mark.parametrize("options", WAYS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("check", ["clipping", "weights_file_bf16"])
def test_other_ways_to_shard(runs, check, options):
    runs.run("one_device", check)
    runs.job("run_check", check=check, **options)


JOBS = ["frozen_left_out", "signs_survive", "shards_to_a_file", "root_is_freed", "refusals", "values_clamped"]


@pytest.mark.parametrize("job", JOBS)
def test_job(runs, job):
    runs.job(job)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_what_it_holds_is_told(runs, precision):
    runs.job("described", precision=precision)


def test_what_torch_has_moved_is_told():
    with pytest.raises(
        UnsupportedError, match=r"torch \d.*: its FSDP1 has no `_handle`\. Instead, install the torch of"
    ):
        _flat.private(SimpleNamespace(), "_handle")


def test_weights_in_another_order_than_row_by_row_are_refused(monkeypatch):
    info = SimpleNamespace(intra_param_start_idx=0)
    flat = SimpleNamespace(_params=[object()], _shapes=[(2, 3)], _shard_param_infos=[info], _contiguities=[False])
    handle = SimpleNamespace(flat_param=flat, process_group=SimpleNamespace(size=lambda: 1), uses_sharded_strategy=True)
    monkeypatch.setattr(_flat, "handles", lambda root: [handle])
    with pytest.raises(UnsupportedError, match=r"shape \[2, 3\] does not lie row by row .* leave `channels_last` out"):
        _flat.places(None)
    handle.uses_sharded_strategy = False
    assert next(iter(_flat.places(None).values())).group is None
