"""The greedy soup's choice, against the paper's recipe written out, on every order of some scores."""

import itertools
import math

import pytest

from lightning_tricks.functional import greedy_selection


def recipe(values, score):
    """Recipe 1 of Wortsman et al., with numbers for models: sort by score, add whatever does not lower it."""
    ingredients = []
    for value in sorted(values, key=lambda value: -score([value])):
        if not ingredients or score([*ingredients, value]) >= score(ingredients):
            ingredients.append(value)
    return ingredients


def accuracy(values):
    mean = sum(values) / len(values)
    return -abs(mean - 3.1)


@pytest.mark.parametrize("values", list(itertools.permutations([0.5, 2.0, 4.5, 9.0, 3.9])))
@pytest.mark.parametrize("mode", ["min", "max"])
def test_is_the_papers_recipe(values, mode):
    sign = 1 if mode == "max" else -1
    found = greedy_selection(
        [sign * accuracy([value]) for value in values],
        lambda places: sign * accuracy([values[place] for place in places]),
        mode=mode,
    )
    assert [values[place] for place in found.chosen] == recipe(values, accuracy)
    assert sign * found.score == accuracy([values[place] for place in found.chosen])
    assert sign * found.score >= max(accuracy([value]) for value in values)
    assert {*found.chosen, *found.tried} == set(range(5))


def test_equal_scores_keep_their_order():
    assert greedy_selection([1.0, 1.0, 1.0], lambda _: 1.0, mode="max").chosen == [0, 1, 2]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_what_is_not_finite_never_wins(bad, mode):
    found = greedy_selection([bad, 0.2, 0.3], lambda places: bad, mode=mode)
    assert found.chosen == [1 if mode == "min" else 2]
    assert len(found.tried) == 2
    with pytest.raises(ValueError, match="no score is finite"):
        greedy_selection([bad, bad], lambda places: 0.0, mode=mode)
