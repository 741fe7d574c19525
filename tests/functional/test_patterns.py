"""Patterns over dotted names."""

import pytest

from lightning_tricks.functional import is_glob, path_matches

NAME = "encoder.layer.1.attention.self.query"


@pytest.mark.parametrize(
    "pattern", ["query", "self.query", NAME, "*", "layer.1.*", "layer.[01].*.query", "*.query", "quer?"]
)
def test_selects(pattern):
    assert path_matches(pattern, NAME)


@pytest.mark.parametrize("pattern", ["uery", "self", "Query", "layer.[02].*.query", "key", "encoder.query", "?query"])
def test_does_not_select(pattern):
    assert not path_matches(pattern, NAME)


def test_a_glob_has_a_wildcard():
    assert [is_glob(p) for p in ("a.b", "a*", "a?", "[ab]")] == [False, True, True, True]
