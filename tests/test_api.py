"""The public API is what `__all__` says, and every exported trick is complete: card, YAML, matrix row."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import lightning as L
import pytest

import lightning_tricks
from lightning_tricks import callbacks, mixins
from lightning_tricks.strategies import PRESETS

ROOT = Path(__file__).parents[1]
CARD_SECTIONS = ("What", "Why", "When it helps", "Options", "Engines", "Cost", "Source")

PACKAGES = [
    "lightning_tricks",
    *(f"lightning_tricks.{m.name}" for m in pkgutil.iter_modules(lightning_tricks.__path__) if m.ispkg),
]
CALLBACKS = [name for name in callbacks.__all__ if issubclass(getattr(callbacks, name), L.Callback)]
MIXINS = [name for name in mixins.__all__ if name.endswith("Mixin")]


def snake(name: str) -> str:
    """`LoRAMixin` -> `lora_mixin`, `GradientClipping` -> `gradient_clipping`."""
    name = name.replace("LoRA", "Lora")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def test_there_are_tricks():
    assert {"EarlyStopping", "GradientClipping", "CheckpointEnsemble"} <= set(CALLBACKS)
    assert {"LoRAMixin", "ClassWeightedLossMixin"} <= set(MIXINS)
    assert {"fsdp2", "zero_1", "zero_2", "zero_3"} <= set(PRESETS)


@pytest.mark.parametrize("name", PACKAGES)
def test_all_is_sorted_and_true(name):
    package = importlib.import_module(name)
    declared = package.__all__
    assert list(declared) == sorted(declared)
    present = {
        n for n, value in vars(package).items() if not n.startswith("_") and not isinstance(value, ModuleType)
    } | ({"__version__"} & set(declared))
    assert present == set(declared)


@pytest.mark.parametrize("name", PACKAGES)
def test_public_names_are_documented(name):
    package = importlib.import_module(name)
    for public in package.__all__:
        value = getattr(package, public)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{name}.{public} has no docstring"


@pytest.mark.parametrize("stem", [*map(snake, CALLBACKS), *map(snake, MIXINS), *PRESETS])
def test_trick_has_a_card(stem):
    card = ROOT / "docs" / "cards" / f"{stem}.md"
    assert card.is_file(), f"write docs/cards/{stem}.md"
    headings = re.findall(r"^## (.+)$", card.read_text(), flags=re.MULTILINE)
    assert headings == list(CARD_SECTIONS)


@pytest.mark.parametrize(
    "path", [*(f"callbacks/{snake(n)}.yaml" for n in CALLBACKS), *(f"strategies/{n}.yaml" for n in PRESETS)]
)
def test_trick_has_a_catalogue_file(path):
    assert (ROOT / path).is_file(), f"run `make catalogue` to render {path}"


@pytest.mark.parametrize("folder", ["callbacks", "strategies"])
def test_catalogue_holds_no_python(folder):
    assert not list((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("name", [*CALLBACKS, *MIXINS])
def test_trick_has_a_matrix_row(name):
    from tests.conformance.cases import CASES

    assert name in {case.trick for case in CASES}, f"add a row for {name} to tests/conformance/cases.py"


def test_presets_are_columns_of_the_matrix():
    from tests.conformance.engines import ELSEWHERE, ENGINES

    assert set(PRESETS) - set(ELSEWHERE) <= set(ENGINES)
    assert all((ROOT / path).is_file() for path in ELSEWHERE.values())
