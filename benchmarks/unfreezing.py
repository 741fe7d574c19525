"""What LayerwiseUnfreezing costs, beside a step of the reviews recipe: MiniLM on one device and one thread.

Run it by `python benchmarks/unfreezing.py`: about a minute. The CPU time that its hooks take within real steps, with
all but the top layer frozen, is compared with that of the step without them.
"""

import argparse
import logging
import warnings
from pathlib import Path

import _report
import torch
from gradients import fit

from lightning_tricks.callbacks import Epochs, LayerwiseUnfreezing

BOUND = 0.005


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--output", type=Path, default=_report.RESULTS / "unfreezing.json")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    busy = _report.load_average()
    frozen = fit([LayerwiseUnfreezing(Epochs(100), factor=2.6)], options.steps)
    share = frozen["hooks"] / frozen["step"]
    _report.write(
        options.output,
        "CPU time of LayerwiseUnfreezing's hooks over that of a MiniLM step, 32 texts of the reviews",
        {"one layer in training": {"share_of_a_step": round(share, 5), "bound": BOUND, "holds": share <= BOUND}},
        load_average_before=busy,
        steps=options.steps,
        rows={"one layer in training": frozen},
    )


if __name__ == "__main__":
    main()
