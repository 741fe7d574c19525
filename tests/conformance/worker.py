"""One process of a group: does the jobs that `engines.Group` sends, a line each way, until its standard input ends."""

import faulthandler
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback


def main():
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # `Group` asks a hanging worker where it is
    threading.Thread(target=die_with, args=(os.getppid(),), daemon=True).start()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to the log, never between the replies
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=replies, flush=True)


def answer(job):
    try:
        module, name = job["function"].split(":")
        return {"value": getattr(importlib.import_module(module), name)(**job["arguments"])}
    except Exception:
        return {"error": traceback.format_exc()}


def die_with(parent):
    """Leave no process behind when the tests are killed, not even one that waits in a collective."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main()
