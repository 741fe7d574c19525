"""The engines on a CUDA device: NCCL instead of gloo, real loss scaling, fused optimizers."""

import pytest
import torch

from tests.conformance.compare import differences
from tests.conformance.engines import ENGINES, Group

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

FLAGS = {name: flag for name, (flag, _) in ENGINES.items()} | {"fsdp1": "fsdp"}  # the last is Lightning's own
TOLERANCE = {"32-true": 1e-4, "bf16-mixed": 3e-2}


@pytest.fixture(scope="module")
def fit(tmp_path_factory):
    """Fit in a process of its own for each engine, and give its outcome."""
    folder, groups = tmp_path_factory.mktemp("gpu"), {}

    def run(engine, precision, fused=False):
        group = groups.setdefault(engine, Group(1, folder / engine))
        out = folder / f"{engine}-{precision}-{fused}.pt"
        [refusal] = group.call("tests.gpu.jobs:fit", flag=FLAGS[engine], precision=precision, out=f"{out}", fused=fused)
        return refusal or torch.load(out, weights_only=True)

    yield run
    for group in groups.values():
        group.close()


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("engine", [name for name in FLAGS if name != "one_device"])
def test_engine_does_on_a_gpu_what_one_device_does(fit, engine, precision):
    found, wanted = fit(engine, precision), fit("one_device", precision)
    assert list(differences(found["weights"], wanted["weights"], TOLERANCE[precision])) == []


@pytest.mark.parametrize("engine", ["one_device", "fsdp1"])
def test_norms_under_loss_scaling_are_those_of_unscaled_gradients(fit, engine):
    scaled, exact = fit(engine, "16-mixed"), fit("one_device", "32-true")
    ours, theirs = (outcome["logged"]["grad_norm/total"]["values"][0] for outcome in (scaled, exact))
    assert torch.isclose(ours, theirs, rtol=2e-2)


def test_fused_optimizer_with_loss_scaling_is_refused_not_clipped_wrongly(fit):
    assert "fused" in fit("one_device", "16-mixed", fused=True)
