"""`kill -9` of a whole `lightning-tricks fit` at a random moment; `--resume` ends with uninterrupted weights."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from lightning_tricks.data.packages import minilm_folder
from lightning_tricks.engines import read_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(290)]

STEPS = 40  # of the whole run
ENGINES = {"one_device": ["--data.batch_size=8"], "zero_2": ["--strategy=zero_2", "--devices=2", "--data.batch_size=4"]}
WORDS = ["a", "dull", "film", "of", "the", "plot"]
CONFIG = """
trainer:
  accelerator: cpu
  max_epochs: 2
  val_check_interval: 0.5
  default_root_dir: .
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
  - class_path: lightning_tricks.callbacks.GradientClipping
  - class_path: lightning_tricks.callbacks.EarlyStopping
    init_args: {monitor: val/loss, patience: 9}
  - class_path: lightning_tricks.callbacks.CheckpointEnsemble
    init_args:
      members: {class_path: lightning_tricks.callbacks.TopK, init_args: {k: 2, monitor: val/loss}}
  - class_path: lightning.pytorch.callbacks.ModelCheckpoint
    init_args: {dirpath: checkpoints, filename: "{step}", every_n_train_steps: 1, save_top_k: -1}
model:
  init_args: {name: ENCODER, lr: 0.01}
data:
  init_args: {path: DATA, label: mood, tokenizer: ENCODER, max_length: 16}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A tiny encoder of real architecture, 200 texts of three classes, and a config that trains it on them."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("kill")
    torch.manual_seed(0)
    tiny = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    BertModel(tiny).save_pretrained(folder / "encoder")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (folder / "encoder" / name).write_bytes((minilm_folder() / name).read_bytes())
    generator = random.Random(0)
    rows = ["mood,text"]
    for mood, count in {"calm": 100, "keen": 60, "rare": 40}.items():
        rows += [f"{mood},{mood} {' '.join(generator.choices(WORDS, k=5))}" for _ in range(count)]
    (folder / "texts.csv").write_text("\n".join(rows) + "\n")
    text = CONFIG.replace("ENCODER", str(folder / "encoder")).replace("DATA", str(folder / "texts.csv"))
    (folder / "config.yaml").write_text(text)
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    """The folder of a run that nothing interrupted, by engine."""
    done = {}

    def run(engine):
        if engine not in done:
            done[engine] = tmp_path_factory.mktemp(engine)
            finish(config, engine, done[engine])
        return done[engine]

    return run


@contextlib.contextmanager
def started(config, engine, folder, *arguments):
    """The command in a process group of its own, which is gone afterwards. Its output is in `log`."""
    command = [sys.executable, "-m", "lightning_tricks", "fit", "--config", str(config), *ENGINES[engine], *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(config.parent / "cache")}
    environment.pop("LIGHTNING_TRICKS_RESUME", None)
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def finish(config, engine, folder, *arguments):
    with started(config, engine, folder, *arguments) as process:
        assert process.wait(timeout=200) == 0, (folder / "log").read_text()


def kill(config, engine, folder, moment):
    """Kill the run when it has saved so many steps (a real number: in the middle of the next one)."""
    with started(config, engine, folder) as process:
        reach(process, folder, int(moment) - 4)
        before = time.monotonic()
        reach(process, folder, int(moment))
        time.sleep((time.monotonic() - before) / 4 * (moment % 1))
        assert process.poll() is None, "the run ended before it was killed"
        os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def reach(process, folder, step):
    deadline = time.monotonic() + 200
    while not any(folder.glob(f"checkpoints/step={step}*")):
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.002)


@pytest.mark.parametrize(("engine", "seed"), [("one_device", 0), ("one_device", 1), ("zero_2", 0)])
def test_killed_and_resumed_ends_with_the_same_weights(config, uninterrupted, tmp_path, engine, seed):
    moment = random.Random(f"{engine} {seed}").uniform(5, STEPS - 3)
    kill(config, engine, tmp_path, moment)
    assert not (tmp_path / f"checkpoints/step={STEPS}.ckpt").exists()
    assert not list(tmp_path.rglob("ensemble.ckpt"))
    finish(config, engine, tmp_path, "--resume")
    assert "Resuming from" in (tmp_path / "log").read_text()
    for name in (f"checkpoints/step={STEPS}.ckpt", "checkpoint_ensemble/val_loss/ensemble.ckpt"):
        found, wanted = (read_checkpoint(run / name)["state_dict"] for run in (tmp_path, uninterrupted(engine)))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), f"{name} differs"
