"""One process of a group: runs checks by name on some engines and writes what each came to.

Run by `group.py` with the environment of torchrun: `python worker.py FOLDER ENGINE:CHECK...`.
"""

import json
import sys
import time
import traceback
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))


def main(folder: str, pairs: list[str]) -> None:
    import logging
    import warnings

    import checks
    import pytest
    import torch

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for engine, name in (pair.split(":") for pair in pairs):
        run = checks.Run(engine, Path(folder))
        started = time.monotonic()
        try:
            getattr(checks, name)(run)
            result = "passed"
        except (Exception, pytest.fail.Exception):
            result = traceback.format_exc()
        entry = {"check": name, "result": result, "seconds": round(time.monotonic() - started, 2)}
        with (Path(folder) / f"{engine}-{run.rank}.jsonl").open("a") as stream:
            stream.write(json.dumps(entry) + "\n")
        if result != "passed":
            break  # the other rank may be waiting in a collective: nothing after this can be trusted


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
