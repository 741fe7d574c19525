"""A base in few bits on two processes: every engine gives what one device gives, and resumes to the bit."""

import pytest
import torch

from tests.mixins.small_base_jobs import Small
from tests.mixins.test_engines import assert_near

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ENGINES = ["ddp", "fsdp2", "zero_1", "zero_2", "zero_3"]


def outcome(group, strategy, folder, base, *, precision="32-true", **options):
    options = {"strategy": strategy, "devices": group.world, "precision": precision, "base": base, **options}
    answers = group.call("tests.mixins.small_base_jobs:fit_and_resume", folder=str(folder), **options)
    names = ("straight", "resumed", "straight_base", "resumed_base")
    return answers, *(torch.load(folder / f"{name}.pt", weights_only=True) for name in names)


KEPT = {"nf4": "LoRA", "int8": "DoRA", "bf16": "LoRA"}


@pytest.fixture(scope="module", params=KEPT)
def reference(request, one_device, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    _, straight, *_ = outcome(one_device, "auto", folder, request.param, method=KEPT[request.param])
    return request.param, straight


@pytest.mark.parametrize("strategy", ENGINES)
def test_trains_and_resumes_as_on_one_device(strategy, reference, group, tmp_path):
    base, expected = reference
    answers, straight, resumed, *packed = outcome(group, strategy, tmp_path, base, method=KEPT[base])
    assert_near(straight, expected, 2e-5 if base != "bf16" else 1e-2)
    assert_near(resumed, straight, 0)
    original = {f"encoder.layer.{i}.{n}": getattr(Small(base).encoder.layer[i], n).kept for i in (0, 1) for n in NAMES}
    for found in packed:
        assert found.keys() == original.keys()
        assert all(torch.equal(found[path], value) for path, value in original.items()), "the bytes have changed"
    for answer in answers:
        other_base, other_kind = answer["refusals"]
        assert "is not the tensor that this checkpoint was trained on" in other_base
        assert f"was adapted with base={base} in this checkpoint, here with base=" in other_kind
    whole = {path: value.numel() for path, value in original.items()}
    held = {path: sum(answer["held"][path] for answer in answers) for path in whole}
    copies = 1 if strategy in ("fsdp2", "zero_3") else 2
    assert all(copies * size <= held[path] <= copies * size + 8 for path, size in whole.items()), (held, whole)


NAMES = ("query", "value")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero_2", "zero_3"])
def test_bf16_mixed(strategy, group, tmp_path):
    _, straight, resumed, *packed = outcome(group, strategy, tmp_path, "nf4", precision="bf16-mixed")
    assert straight["encoder.layer.0.query.lora_B"].abs().max() > 1e-3
    assert_near(resumed, straight, 0)
    assert torch.equal(packed[0]["encoder.layer.0.query"], Small("nf4").encoder.layer[0].query.kept)


@pytest.mark.parametrize("strategy", ENGINES)
def test_adapted_in_configure_model(strategy, group, one_device, tmp_path):
    (tmp_path / "one").mkdir()
    _, expected, *_ = outcome(one_device, "auto", tmp_path / "one", "nf4", late=True)
    _, straight, resumed, *_ = outcome(group, strategy, tmp_path, "nf4", late=True)
    assert_near(straight, expected, 5e-5)
    assert_near(resumed, straight, 0)
