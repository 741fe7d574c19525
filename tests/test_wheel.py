"""The built distribution works where nothing but it and its dependencies are installed."""

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRAINING = """
import warnings
import lightning as L, torch
import lightning_tricks
from lightning_tricks.callbacks import CheckpointEnsemble, GradientClipping, TopK
from lightning_tricks.mixins import LoRA, LoRAMixin

assert "site-packages" in lightning_tricks.__file__, lightning_tricks.__file__

class Module(LoRAMixin, L.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.ModuleDict({"query": torch.nn.Linear(4, 4)})
        self.head = torch.nn.Linear(4, 2)
        self.adapt(self.body, LoRA(rank=2, targets=("query",)))
    def step(self, batch):
        x, y = batch
        return torch.nn.functional.cross_entropy(self.head(self.body["query"](x)), y)
    def training_step(self, batch, index):
        return self.step(batch)
    def validation_step(self, batch, index):
        self.log("val/loss", self.step(batch))
    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad])

data = torch.utils.data.TensorDataset(torch.randn(16, 4), torch.arange(16) % 2)
loader = torch.utils.data.DataLoader(data, batch_size=4)
tricks = [GradientClipping(1.0), CheckpointEnsemble(TopK(2, monitor="val/loss"))]
quiet = dict(logger=False, enable_progress_bar=False, enable_checkpointing=False)
trainer = L.Trainer(accelerator="cpu", max_epochs=2, callbacks=tricks, **quiet)
trainer.fit(Module(), loader, loader)
assert trainer.global_step == 8
print("trained")
"""


def run(*command, cwd):
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=540, cwd=cwd)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    return out


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_wheel_holds_the_package_alone(distributions):
    names = zipfile.ZipFile(next(distributions.glob("*.whl"))).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lightning_tricks"}
    assert "lightning_tricks/py.typed" in names
    assert "lightning_tricks/recipes/text_classification.py" in names


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sdist_holds_the_catalogue(distributions):
    with tarfile.open(next(distributions.glob("*.tar.gz"))) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "callbacks/gradient_clipping.yaml", "strategies/zero_2.yaml"} <= inside


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_wheel_trains_in_an_empty_environment(distributions, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
    run(*pip, "torch", cwd=tmp_path)
    run(*pip, next(distributions.glob("*.whl")), cwd=tmp_path)
    assert "trained" in run(python, "-c", TRAINING, cwd=tmp_path)
    assert "GradientClipping" in run(tmp_path / "env" / "bin" / "lightning-tricks", "list", cwd=tmp_path)
