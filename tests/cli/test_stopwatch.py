"""The stopwatch of the demo: training counts, validation does not."""

import itertools

from lightning_tricks.cli import stopwatch


def test_validations_are_left_out(monkeypatch):
    wall, cpu = itertools.count(0, 10), itertools.count(0, 1)
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(wall))
    monkeypatch.setattr(stopwatch.time, "process_time", lambda: next(cpu))
    watch = stopwatch.Stopwatch()
    watch.on_train_start(None, None)
    watch.on_train_batch_end(None, None, None, {"labels": [0, 1, 2]}, 0)
    watch.on_validation_start(None, None)
    for _ in range(3):  # what a validation takes
        next(wall)
        next(cpu)
    watch.on_validation_end(None, None)
    watch.on_train_batch_end(None, None, None, {"labels": [0, 1]}, 1)
    watch.on_train_end(None, None)
    watch.on_train_end(None, None)
    assert (watch.seconds, watch.cpu_seconds, watch.texts) == (20, 2, 5)
