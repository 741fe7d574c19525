"""What the suite touches of DeepSpeed's own is listed, and DeepSpeed still has it."""

import ast
import importlib
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_tricks import engines
from lightning_tricks.engines import _zero_private
from lightning_tricks.engines._zero_private import ENGINE, FRAGMENT, MODULES, OPTIMIZER, PARAMETER, require
from lightning_tricks.errors import UnsupportedError

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="not run: needs DeepSpeed")
FOLDER = Path(engines.__file__).parent
FILES = sorted([*FOLDER.glob("_zero_*.py"), FOLDER / "_deepspeed.py", FOLDER / "_universal.py"])
USERS = [path for path in FILES if path.name != "_zero_private.py"]
# Names of torch's modules, of the standard library, and marks that may be missing: looked for with a default.
OTHERS = {
    *("_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_state_dict_hooks", "_foreach_norm", "_foreach_zero_", "_lightning_tricks_zero"),
    "_zero_padding",
}


def touched(path):
    """Names with a leading underscore, or of ZeRO-3's parameters, that the code looks for on anything but itself."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "super()"):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield node.value


@pytest.mark.parametrize("path", USERS, ids=lambda path: path.name)
def test_private_names_are_listed(path):
    stages = (*OPTIMIZER.values(), *PARAMETER.values(), *MODULES.values())
    listed = {*OTHERS, *ENGINE, *FRAGMENT, *(name for names in stages for name in names)}
    private = {name for name in touched(path) if name.startswith(("_", "ds_")) and not name.startswith("__")}
    own = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
    assert private - listed - own == set()


def test_the_list_has_no_name_that_nothing_touches():
    used = {name for path in USERS for name in touched(path)}
    listed = {*ENGINE, *FRAGMENT, *(name for names in (*OPTIMIZER.values(), *PARAMETER.values()) for name in names)}
    assert listed - used == set()


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", MODULES)
def test_deepspeed_still_has_them(path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    module, _, last = path.rpartition(".")
    owner = getattr(importlib.import_module(module), last) if last[0].isupper() else importlib.import_module(path)
    assert [name for name in MODULES[path] if not hasattr(owner, name)] == []


def built(stage, without):
    """An engine with all names of the list but one."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    owners = {"engine": SimpleNamespace(), "optimizer": SimpleNamespace(), "parameter": parameter}
    names = {"engine": ENGINE, "optimizer": OPTIMIZER[stage], "parameter": PARAMETER[stage]}
    for what, owner in owners.items():
        for name in names[what]:
            if f"{what}.{name}" != without:
                setattr(owner, name, None)
    owners["engine"].optimizer = owners["optimizer"]
    owners["engine"].module = SimpleNamespace(parameters=lambda: iter([parameter]))
    return owners["engine"]


@needs_deepspeed
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("stage", "gone"),
    [(1, "optimizer.scaled_global_norm"), (2, "parameter._hp_mapping"), (3, "parameter.ds_id"), (3, "engine._config")],
)
def test_an_engine_without_one_is_refused(stage, gone, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    require(built(stage, without=None), stage)
    with pytest.raises(
        UnsupportedError, match=rf"DeepSpeed .*: it has no `{gone}`\. Instead, install the DeepSpeed of"
    ):
        require(built(stage, without=gone), stage)


def test_every_stage_has_its_lists():
    assert set(_zero_private.OPTIMIZER) == set(_zero_private.PARAMETER) == {1, 2, 3}
