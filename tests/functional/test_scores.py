"""Directions of metrics, improvements and rankings."""

import math

import pytest

from lightning_tricks.functional import infer_mode, is_improvement, rank_scores


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("val_loss", "min"),
        ("val/loss", "min"),
        ("Validation-Perplexity", "min"),
        ("error_rate", "min"),
        ("val/accuracy", "max"),
        ("val_macro_f1", "max"),
        ("val/recall_rotten", "max"),
        ("val/rougeL", "max"),
        ("f1_loss", None),
        ("val/score", None),
        ("glossary", None),
        ("", None),
    ],
)
def test_infer_mode(name, mode):
    assert infer_mode(name) == mode


@pytest.mark.parametrize(
    ("score", "best", "mode", "min_delta", "expected"),
    [
        (1.0, None, "min", 0.0, True),
        (0.9, 1.0, "min", 0.0, True),
        (1.1, 1.0, "min", 0.0, False),
        (1.1, 1.0, "max", 0.0, True),
        (1.0, 1.0, "max", 0.0, False),
        (0.5, 1.0, "min", 0.5, False),
        (0.4, 1.0, "min", 0.5, True),
        (math.nan, None, "min", 0.0, False),
        (-math.inf, 1.0, "min", 0.0, False),
        (math.inf, 1.0, "max", 0.0, False),
    ],
)
def test_is_improvement(score, best, mode, min_delta, expected):
    assert is_improvement(score, best, mode=mode, min_delta=min_delta) is expected


def test_rank_scores():
    scores = [2.0, math.nan, 1.0, 2.0, math.inf, 3.0]
    assert rank_scores(scores, mode="min") == [2, 0, 3, 5]
    assert rank_scores(scores, mode="max") == [5, 0, 3, 2]
    assert rank_scores([], mode="max") == []
