"""Patterns that select modules and parameters by their dotted names."""

from fnmatch import fnmatchcase

__all__ = ["is_glob", "path_matches"]


def is_glob(pattern: str) -> bool:
    """Whether a pattern holds one of the wildcards `*`, `?` and `[`.

    Example:
        >>> from lightning_tricks.functional import is_glob
        >>> is_glob("query"), is_glob("layer.[0-3].*.query")
        (False, True)
    """
    return any(wildcard in pattern for wildcard in "*?[")


def path_matches(pattern: str, path: str) -> bool:
    """Whether `pattern` selects `path`: whole names from the end of the path, or a glob.

    Args:
        pattern: the last name (`query`), several names (`self.query`), the whole path, or a glob over such
            (`layer.[0-3].*.query`), in which `*` also spans dots.
        path: a dotted name, as `named_modules` and `named_parameters` give it.

    Example:
        >>> from lightning_tricks.functional import path_matches
        >>> [path_matches(p, "layer.0.self.query") for p in ("query", "self.query", "layer.*.query", "uery", "key")]
        [True, True, True, False, False]
    """
    if is_glob(pattern):
        return fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}")
    return path == pattern or path.endswith(f".{pattern}")
