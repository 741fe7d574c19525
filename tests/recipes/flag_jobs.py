"""The reviews recipe as a user starts it, in a process of a `Group`."""

import logging
import os
import warnings
from pathlib import Path

import lightning as L
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "reviews" / "config.yaml"


SEEN: list[str] = []


class Witness(L.Callback):
    """Notes which engine trained."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        from lightning_tricks.engines import engine_of

        SEEN.append(engine_of(trainer).name)


def prepare() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def fit(flag: str, encoder: str, folder: str) -> tuple[str, dict[str, float]]:
    """`lightning-tricks fit --config examples/reviews/config.yaml --trainer.strategy=FLAG`, with less of everything.

    Returns:
        The engine that trained, and what was logged last, as `{name: value}`; that is empty but on rank 0.
    """
    from lightning_tricks.cli import main

    os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
    place = Path(folder, flag)
    place.mkdir(exist_ok=True)
    os.chdir(place)  # the example writes to `runs/reviews`
    small = ["data.limit=96", "data.batch_size=4", "data.max_length=16", "trainer.max_epochs=1", "trainer.devices=2"]
    small += [f"model.name={encoder}", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false"]
    small += ["trainer.enable_model_summary=false", "trainer.log_every_n_steps=1"]
    small += [f"trainer.callbacks+={__name__}.Witness"]
    code = main(["fit", "--debug", "--config", f"{EXAMPLE}", f"--trainer.strategy={flag}", *(f"--{o}" for o in small)])
    if code:
        raise RuntimeError(f"`fit` ended with {code}")
    return SEEN[-1], _logged(place) if os.environ["RANK"] == "0" else {}


def _logged(place: Path) -> dict[str, float]:
    (table,) = place.rglob("metrics.csv")
    names, *rows = (line.split(",") for line in table.read_text().splitlines())
    return {name: float(value) for row in rows for name, value in zip(names, row, strict=True) if value}
