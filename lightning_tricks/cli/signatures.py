"""What the code says about itself: a trick's summary, its arguments, and how its example builds it."""

import ast
import dataclasses
import doctest
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import docstring_parser
from lightning.pytorch import LightningModule

from lightning_tricks.errors import MisconfigurationError

__all__ = [
    "argument_lines",
    "call_in_example",
    "code_in_example",
    "defaults",
    "own_methods",
    "signature_text",
    "summary",
]

WIDTH = 116


def summary(trick: Callable[..., Any]) -> str:
    """The first line of its docstring.

    Args:
        trick: a documented class or function.

    Example:
        >>> summary(dict.fromkeys)
        'Create a new dictionary with keys from iterable and values set to value.'
    """
    return (inspect.getdoc(trick) or "").split("\n", 1)[0]


def argument_lines(trick: Callable[..., Any], arguments: Mapping[str, Any]) -> Iterator[str]:
    """`name: what it is`, wrapped, with the arguments of a nested policy below its own.

    Args:
        trick: a class or function with a Google docstring.
        arguments: the values it gets; those that are configurations of policies are explained as well.
    """
    params = docstring_parser.parse(inspect.getdoc(trick) or "", docstring_parser.DocstringStyle.GOOGLE).params
    documented = [param for param in params if param.args[0] == "param"]  # not the attributes
    for parameter in documented:
        text = f"{parameter.arg_name}: {' '.join((parameter.description or '').split())}"
        yield from textwrap.wrap(text, WIDTH - 2, subsequent_indent="    ")
        value = arguments.get(parameter.arg_name)
        if isinstance(value, dict) and "class_path" in value:
            policy = _named(value["class_path"])
            yield from (f"    {line}" for line in argument_lines(policy, value.get("init_args", {})) if line)
    if documented:
        yield ""


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """The arguments that may be left out, with their defaults as YAML can hold them.

    Args:
        function: a class or function.

    Example:
        >>> def clip(limit, *, norm_type=2.0): ...
        >>> defaults(clip)
        {'norm_type': 2.0}
    """
    parameters = inspect.signature(function).parameters.values()
    return {p.name: _plain(p.default) for p in parameters if p.default is not p.empty}


def own_methods(mixin: type[Any]) -> dict[str, Callable[..., Any]]:
    """What a mixin adds to a LightningModule for its user to call, without the hooks that Lightning calls.

    Args:
        mixin: an exported class.
    """
    methods = {name: value for name, value in vars(mixin).items() if inspect.isfunction(value) and name[0] != "_"}
    return {name: method for name, method in methods.items() if not hasattr(LightningModule, name)}


def signature_text(method: Callable[..., Any]) -> str:
    """The names and defaults of a method's arguments.

    Args:
        method: with `self`.

    Example:
        >>> def clip(self, limit, *, norm_type=2.0): ...
        >>> signature_text(clip)
        '(limit, norm_type=2.0)'
    """
    parameters = list(inspect.signature(method).parameters.values())[1:]
    written = (p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)
    return f"({', '.join(written)})"


def code_in_example(trick: type[Any]) -> str:
    """The imports and definitions of its docstring's example, to start from.

    Args:
        trick: an exported class.
    """
    sources = [example.source.rstrip() for example in _examples(trick)]
    imports = [source for source in sources if source.startswith(("import ", "from "))]
    classes = [source for source in sources if source.startswith("class ")]
    return "\n\n\n".join(["\n".join(imports), *classes]) + "\n"


def call_in_example(trick: type[Any]) -> tuple[str, dict[str, Any]]:
    """The trick as its docstring's example builds it, filled up with its defaults.

    Args:
        trick: an exported class whose docstring has an example that constructs it from literals and policies.

    Returns:
        Its import path, and its arguments in the signature's order.

    Raises:
        MisconfigurationError: if the docstring has no such example.
    """
    calls = (node for example in _examples(trick) for node in ast.walk(ast.parse(example.source)))
    for call in calls:
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == trick.__name__:
            return _build(call, sys.modules[_package(trick)], trick)
    raise MisconfigurationError(f"{trick.__name__} has no example in its docstring: write one that constructs it.")


def _examples(trick: Callable[..., Any]) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(inspect.getdoc(trick) or "")


def _build(call: ast.Call, module: Any, trick: type[Any]) -> tuple[str, dict[str, Any]]:
    values = [_value(argument, module) for argument in call.args]
    named = {str(keyword.arg): _value(keyword.value, module) for keyword in call.keywords}
    given = inspect.signature(trick).bind_partial(*values, **named).arguments
    order = inspect.signature(trick).parameters
    merged = defaults(trick) | given
    return f"{_package(trick)}.{trick.__name__}", {name: merged[name] for name in order if name in merged}


def _value(node: ast.expr, module: Any) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        path, arguments = _build(node, module, getattr(module, node.func.id))
        return {"class_path": path, "init_args": arguments}
    return ast.literal_eval(node)


def _plain(value: Any) -> Any:
    """A default as YAML can hold it: a policy becomes its class and its fields."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class_path": f"{_package(type(value))}.{type(value).__name__}", "init_args": fields}
    return list(value) if isinstance(value, tuple) else value


def _package(trick: type[Any]) -> str:
    """`lightning_tricks.callbacks` for whatever its modules define: the name that users import from."""
    return ".".join(trick.__module__.split(".")[:2])


def _named(path: str) -> Any:
    package, name = path.rsplit(".", 1)
    return getattr(sys.modules[package], name)
