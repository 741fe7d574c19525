"""The README's own code blocks run, each as a script of its own, and stay short."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^## (.+?)\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S | re.M)

# What the README takes as the reader's own: a module, its data, and the Trainer's arguments for a quick run on CPU.
PRELUDE = """
import os
from functools import partial
import lightning as L, torch
from torch import nn

class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("query", "value")})
        self.head = nn.Linear(8, 3)
    def forward(self, x):
        return self.head(torch.tanh(self.encoder["value"](torch.tanh(self.encoder["query"](x)))))
    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch["x"]), batch["y"])
    def validation_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch["x"]), batch["y"])
        self.log("val/loss", loss, sync_dist=True)
    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

class Data(L.LightningDataModule):
    def loader(self):
        return torch.utils.data.DataLoader([{"x": torch.randn(8), "y": i % 3} for i in range(32)], batch_size=4)
    train_dataloader = val_dataloader = loader

L.seed_everything(0)
torch.set_num_threads(1)
model, data = Classifier(), Data()
quick = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
             enable_checkpointing=False, log_every_n_steps=1, default_root_dir=os.environ["RUN_FOLDER"])
_init = L.Trainer.__init__
L.Trainer.__init__ = lambda self, **options: _init(self, **{"devices": 1, **quick, **options})
"""
AFTER = {
    "Add a callback": "assert (__import__('pathlib').Path(os.environ['RUN_FOLDER']).rglob('ensemble.ckpt'))",
    "Select a strategy flag": "assert trainer.world_size == 2 and trainer.global_step == 20",
    "Subclass a mixin": "model = Tuned(); L.Trainer(max_epochs=1).fit(model, data)\n"
    "assert not model.encoder['query'].weight.requires_grad",
}


def test_the_three_uses_are_there():
    assert [title for title, _ in BLOCKS] == list(AFTER)


@pytest.mark.parametrize(("title", "code"), BLOCKS, ids=[title for title, _ in BLOCKS])
def test_use_is_under_ten_lines(title, code):
    assert len([line for line in code.splitlines() if line.strip()]) < 10


@pytest.mark.slow
@pytest.mark.parametrize(("title", "code"), BLOCKS, ids=[title for title, _ in BLOCKS])
def test_use_runs(title, code, tmp_path):
    script = tmp_path / "use.py"
    script.write_text(f"{PRELUDE}\n{code}\n{AFTER[title]}\nprint('finished')\n")
    environment = {"PATH": "/usr/bin:/bin", "RUN_FOLDER": str(tmp_path), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=180, cwd=tmp_path, env=environment
    )
    assert run.returncode == 0, run.stderr
    assert "finished" in run.stdout
