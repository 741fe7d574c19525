"""How alike two texts are, by their words."""

import re
from collections import Counter
from itertools import pairwise

__all__ = ["similarity", "words"]

# Scripts that put no spaces between words count character by character.
UNSPACED = "\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")


def words(text: str) -> tuple[str, ...]:
    """The words of a text, without case, punctuation and spaces.

    Example:
        >>> words("A slow,  lovely FILM!")
        ('a', 'slow', 'lovely', 'film')
    """
    return tuple(WORD.findall(text.casefold()))


def similarity(first: tuple[str, ...], second: tuple[str, ...]) -> float:
    """Dice's coefficient of the pairs of neighbouring words, the ends of the texts among them: 1 if all are shared.

    Example:
        >>> similarity(words("a slow lovely film"), words("A slow, lovely film."))
        1.0
        >>> similarity(words("a slow lovely film"), words("a slow dull film"))
        0.6
    """
    pairs = [Counter(pairwise(("", *found, ""))) for found in (first, second)]
    return 2 * (pairs[0] & pairs[1]).total() / (pairs[0].total() + pairs[1].total())
