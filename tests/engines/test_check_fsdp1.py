"""What `check` says of Lightning's FSDPStrategy, before any process group exists."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging

import lightning_tricks
from lightning_tricks import callbacks as ours
from lightning_tricks.engines import engine_of
from lightning_tricks.errors import UnsupportedError
from lightning_tricks.mixins import LoRA, LoRAMixin
from tests.engines.checks import Net
from tests.engines.fsdp1_jobs import CPUStrategy

pytestmark = pytest.mark.filterwarnings("ignore")


def trainer_of(*callbacks, strategy=None, **options):
    """FSDP1's Trainer of two ranks, of which none is started."""
    strategy = strategy or CPUStrategy()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(accelerator="cpu", devices=2, strategy=strategy, callbacks=list(callbacks), **quiet, **options)


def the(report, trick):
    (found,) = [found for found in report if found.trick == trick]
    return found


def test_tricks_are_exact_under_fsdp1():
    trainer = trainer_of(ours.GradientClipping(1.0), precision="bf16-mixed")
    report = lightning_tricks.check(trainer, Net())
    assert [(found.trick, found.engine, found.verdict) for found in report] == [
        ("GradientClipping", "fsdp1", "exact"),
        ("precision 'bf16-mixed'", "fsdp1", "exact"),
    ]


def test_lightnings_clipping_by_the_norm_is_refused_and_by_the_value_is_not():
    found = the(lightning_tricks.check(trainer_of(gradient_clip_val=1.0), Net()), "`Trainer(gradient_clip_val=1.0)`")
    assert (found.verdict, found.remedy) == ("refused", "use the callback GradientClipping")
    by_value = trainer_of(gradient_clip_val=1.0, gradient_clip_algorithm="value")
    assert lightning_tricks.check(by_value, Net()).verdict == "exact"


def test_what_knows_weights_by_name_or_whole_is_refused():
    class Adapting(LoRAMixin, Net):
        def __init__(self):
            super().__init__()
            self.adapt(self.blocks, LoRA(rank=2, targets=["wide"]))

    found = the(lightning_tricks.check(trainer_of(), Adapting()), "LoRAMixin")
    assert (found.verdict, found.remedy) == ("refused", "use `strategy='fsdp2'`")
    averaging = the(lightning_tricks.check(trainer_of(WeightAveraging()), Net()), "Lightning's WeightAveraging")
    assert averaging.verdict == "refused"


def test_flat_parameters_are_refused_before_the_fit():
    trainer = trainer_of(ours.GradientClipping(1.0), strategy=CPUStrategy(use_orig_params=False))
    found = the(lightning_tricks.check(trainer, Net()), "GradientClipping")
    assert found.verdict == "refused"
    assert "leave `use_orig_params` out" in found.remedy
    with pytest.raises(UnsupportedError, match="fsdp1 with `use_orig_params=False`"):
        engine_of(trainer)


def test_pieces_of_flat_parameters_are_never_taken_for_whole():
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter._fsdp_flattened = True  # as torch marks them
    with pytest.raises(UnsupportedError, match="does not say what it is a piece of"):
        lightning_tricks.engines.whole(parameter)
