"""What LayerwiseUnfreezing costs and spares, beside a step of the reviews recipe: MiniLM on one device and one thread.

Run it by `python benchmarks/unfreezing.py`: about two minutes. The CPU time that its hooks take within real steps, with
all but the top layer frozen, is compared with that of the step without them, and that step with one of a fit that
trains all layers. Both fits are repeated in turn.
"""

import argparse
import logging
import statistics
import warnings
from pathlib import Path

import _report
import torch
from gradients import fit

from lightning_tricks.callbacks import Epochs, LayerwiseUnfreezing

BOUND = 0.005


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--output", type=Path, default=_report.RESULTS / "unfreezing.json")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    busy, rows = _report.load_average(), {"all layers": [], "one layer": []}
    for _ in range(options.repetitions):
        rows["all layers"].append(fit([], options.steps))
        rows["one layer"].append(fit([LayerwiseUnfreezing(Epochs(100), factor=2.6)], options.steps))
    whole = median(rows["all layers"], "step")
    one, hooks = median(rows["one layer"], "step"), median(rows["one layer"], "hooks")
    _report.write(
        options.output,
        "CPU time of a MiniLM step, 32 texts of the reviews, with the top layer in training and with all",
        {
            "hooks": {"share_of_a_step": round(hooks / one, 5), "bound": BOUND, "holds": hooks / one <= BOUND},
            "one layer": {"times_a_step_of_all": round(one / whole, 3)},
        },
        load_average_before=busy,
        steps=options.steps,
        rows=rows,
    )


def median(rows, name):
    return statistics.median(row[name] for row in rows)


if __name__ == "__main__":
    main()
