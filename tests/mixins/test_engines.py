"""The mixins on two processes: every engine gives what one device gives, and one process group serves them all."""

import pytest
import torch

from tests.mixins.jobs import expected_losses
from tests.mixins.models import Classifier

pytestmark = pytest.mark.slow

ENGINES = ["ddp", "fsdp2", "zero_1", "zero_2", "zero_3"]
TRAINED = {name for name, parameter in Classifier().named_parameters() if parameter.requires_grad}


def outcome(group, strategy, folder, *, late, precision="32-true"):
    options = {"strategy": strategy, "devices": group.world, "precision": precision, "late": late}
    answers = group.call("tests.mixins.jobs:adapt_and_resume", folder=str(folder), **options)
    weights = [torch.load(folder / f"{name}.pt", weights_only=True) for name in ("straight", "resumed")]
    return answers[0], *weights


def assert_near(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        worst = (found[name].double() - tensor.double()).abs().max()
        assert worst <= tolerance * tensor.abs().max() + 1e-12, f"{name}: {worst:.3g}"


@pytest.fixture(scope="module", params=[False, True], ids=["in __init__", "in configure_model"])
def reference(request, one_device, tmp_path_factory):
    return request.param, outcome(one_device, "auto", tmp_path_factory.mktemp("reference"), late=request.param)


@pytest.mark.parametrize("strategy", ENGINES)
def test_adapters_train_and_resume_alike(strategy, reference, group, tmp_path):
    late, (_, expected, _) = reference
    answer, straight, resumed = outcome(group, strategy, tmp_path, late=late)
    assert {name for name in straight if "gain" not in name} == TRAINED | ({"encoder.pooler.bias"} if late else set())
    assert_near(straight, expected, 2e-5)
    assert_near(resumed, straight, 0)
    assert "`encoder.layer.0.query.weight` is not the tensor that this checkpoint was trained on" in answer["refusal"]


@pytest.mark.parametrize("strategy", ENGINES)
def test_adapters_train_and_resume_in_bf16(strategy, group, tmp_path):
    answer, straight, resumed = outcome(group, strategy, tmp_path, late=strategy == "zero_3", precision="bf16-mixed")
    assert straight["encoder.layer.0.query.lora_B"].abs().max() > 1e-3
    assert_near(resumed, straight, 0)
    assert "is not the tensor that this checkpoint was trained on" in answer["refusal"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_adapters_stay_fp32_beside_a_bf16_base(strategy, group):
    answers = group.call("tests.mixins.jobs:adapt_low_precision", strategy=strategy)
    assert answers == [["torch.float32", "torch.bfloat16"]] * 2


@pytest.mark.parametrize("strategy", ENGINES)
def test_the_weighted_mean_is_that_of_the_whole_batch(strategy, group, tmp_path):
    values, weights = expected_losses()
    (first, second) = group.call(
        "tests.mixins.jobs:weigh", strategy=strategy, devices=2, precision="32-true", folder=str(tmp_path)
    )
    assert first == pytest.approx(values, rel=1e-5)
    assert first == second
    assert_near(torch.load(tmp_path / "weighted.pt", weights_only=True), weights, 2e-5)


@pytest.mark.parametrize("strategy", ENGINES)
def test_the_weights_of_classes_stay_fp32(strategy, group, tmp_path):
    _, weights = expected_losses()
    group.call("tests.mixins.jobs:weigh", strategy=strategy, devices=2, precision="bf16-mixed", folder=str(tmp_path))
    found = torch.load(tmp_path / "weighted.pt", weights_only=True)["class_weights"]
    assert torch.equal(found, weights["class_weights"])


@pytest.mark.parametrize("strategy", ENGINES)
def test_adapters_at_rest_are_saved_and_come_back(strategy, group, tmp_path):
    assert group.call("tests.mixins.jobs:rest_and_resume", strategy=strategy, folder=str(tmp_path)) == [[True] * 3] * 2


@pytest.mark.parametrize("strategy", ["ddp", "zero_2"])
def test_adapters_at_rest_that_are_rounded_are_told_of(strategy, group):
    told, _ = group.call("tests.mixins.jobs:degraded_at_rest", strategy=strategy)
    assert len(told) == (strategy == "zero_2")
    assert not told or "the adapters at rest (default) are rounded to 16 bits" in told[0]
