"""Mixins stand before LightningModule, or their hooks are never called."""

import lightning as L
import pytest

from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.mixins import ClassWeightedLossMixin, LoRAMixin


@pytest.mark.parametrize("mixin", [LoRAMixin, ClassWeightedLossMixin])
def test_after_lightning_module_is_refused(mixin):
    with pytest.raises(MisconfigurationError, match=rf"`class Model\({mixin.__name__}, LightningModule\)`"):
        type("Model", (L.LightningModule, mixin), {})


@pytest.mark.parametrize("mixin", [LoRAMixin, ClassWeightedLossMixin])
def test_a_pytorch_lightning_module_is_refused(mixin):
    foreign = type("LightningModule", (), {"__module__": "pytorch_lightning.core.module"})
    with pytest.raises(MisconfigurationError, match=r"needs lightning\.pytorch"):
        type("Model", (mixin, foreign), {})


def test_both_work_together_in_either_order():
    for bases in ((LoRAMixin, ClassWeightedLossMixin), (ClassWeightedLossMixin, LoRAMixin)):
        type("Model", (*bases, L.LightningModule), {})()
