"""Render each trick from its own signature and docstring: the catalogue's files, and what `show` prints."""

import dataclasses
import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from lightning_tricks.cli.signatures import (
    argument_lines,
    call_in_example,
    code_in_example,
    defaults,
    own_methods,
    signature_text,
    summary,
)

__all__ = ["Entry", "entries", "write"]

FOLDERS = {"callback": "callbacks", "strategy": "strategies"}
NOTES = {
    "callback": "`callbacks+:` adds to the callbacks that are there; `callbacks:` would replace them.",
    "strategy": "`--strategy NAME` does the same as its file; `--devices N` sets the number of devices.",
}
INDEX = """# {title}

One file to stack for each; the code is in `lightning_tricks.{folder}`.

```console
$ lightning-tricks fit --config my.yaml --config {file}
```

Later files and options win over earlier ones. {note}

The files are rendered from the code by `make catalogue`: copy them, do not edit them here.

| name | what it does | more |
|---|---|---|
{rows}
"""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One trick of the catalogue.

    Args:
        name: what a user types: `GradientClipping`, `zero_2`, `LoRAMixin`.
        kind: `callback`, `strategy` or `mixin`.
        summary: the first line of its docstring.
        text: a YAML file to stack, or, for a mixin, the code to start from.

    Example:
        >>> Entry("zero_2", "strategy", "ZeRO stage 2.", "").path
        'strategies/zero_2.yaml'
    """

    name: str
    kind: Literal["callback", "strategy", "mixin"]
    summary: str
    text: str

    @property
    def path(self) -> str | None:
        """Where its file lies in the repository; `None` for a mixin, which has none."""
        return f"{FOLDERS[self.kind]}/{_snake(self.name)}.yaml" if self.kind in FOLDERS else None


def entries() -> dict[str, Entry]:
    """Every exported callback, mixin and strategy flag by name, rendered.

    Example:
        >>> "zero_2" in entries()
        True
    """
    from lightning.pytorch import Callback

    from lightning_tricks import callbacks, mixins
    from lightning_tricks.strategies import PRESETS

    tricks = [getattr(callbacks, name) for name in callbacks.__all__]
    found = [_callback(trick) for trick in tricks if inspect.isclass(trick) and issubclass(trick, Callback)]
    found += [_preset(flag, preset) for flag, preset in PRESETS.items()]
    found += [_mixin(getattr(mixins, name)) for name in mixins.__all__ if name.endswith("Mixin")]
    return {entry.name: entry for entry in found}


def write(root: Path) -> list[Path]:
    """Write the catalogue's files, one per callback and per strategy flag, and their indexes.

    Args:
        root: the repository's folder.

    Returns:
        The files written.
    """
    written = []
    rendered = list(entries().values())
    for kind, folder in FOLDERS.items():
        chosen = [entry for entry in rendered if entry.kind == kind]
        files = {str(entry.path): entry.text for entry in chosen} | {f"{folder}/README.md": index(kind, chosen)}
        for path, text in files.items():
            (root / folder).mkdir(exist_ok=True)
            (root / path).write_text(text, encoding="utf-8")
            written.append(root / path)
    return written


def index(kind: str, chosen: list[Entry]) -> str:
    """The README of one of the catalogue's folders.

    Args:
        kind: `callback` or `strategy`.
        chosen: its entries.

    Example:
        >>> index("strategy", [Entry("zero_2", "strategy", "ZeRO stage 2.", "")]).splitlines()[0]
        '# Strategies'
    """
    folder = FOLDERS[kind]
    rows = [
        f"| [{e.name}]({_snake(e.name)}.yaml) | {e.summary} | [card](../docs/cards/{_snake(e.name)}.md) |"
        for e in chosen
    ]
    return INDEX.format(
        title=folder.capitalize(), folder=folder, file=chosen[-1].path, note=NOTES[kind], rows="\n".join(rows)
    )


# -- one entry of each kind ----------------------------------------------------------------------------------------


def _callback(trick: type[Any]) -> Entry:
    path, arguments = call_in_example(trick)
    item = {"class_path": path, "init_args": arguments} if arguments else {"class_path": path}
    head = [summary(trick), "", *argument_lines(trick, arguments)]
    return Entry(trick.__name__, "callback", summary(trick), _file(head, {"trainer": {"callbacks+": [item]}}))


def _preset(flag: str, preset: Any) -> Entry:
    function = preset.function
    path = f"lightning_tricks.strategies.{function.__name__}"
    options = defaults(function) | dict(preset.arguments)
    longer = _yaml({"trainer": {"strategy": {"class_path": path, "init_args": options}}})
    head = [preset.doc, "", *argument_lines(function, {}), "To change an option, write this instead:", ""]
    head += [f"    {line}" for line in longer.splitlines()]
    return Entry(flag, "strategy", preset.doc, _file([*head, ""], {"trainer": {"strategy": flag}}))


def _mixin(trick: type[Any]) -> Entry:
    lines = [summary(trick), "", *argument_lines(trick, {})]
    for name, method in own_methods(trick).items():
        lines += [f"self.{name}{signature_text(method)}", f"    {summary(method)}"]
        lines += [f"    {line}" for line in argument_lines(method, {})]
    return Entry(trick.__name__, "mixin", summary(trick), f"{_comment(lines)}\n\n{code_in_example(trick)}")


def _file(head: list[str], content: Mapping[str, Any]) -> str:
    return f"{_comment(head)}\n{_yaml(content)}"


def _comment(lines: list[str]) -> str:
    return "\n".join(f"# {line}".rstrip() for line in lines).rstrip("#\n ")


def _yaml(content: Mapping[str, Any]) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(dict(content)))


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.replace("LoRA", "Lora")).lower()


if __name__ == "__main__":
    for path in write(Path.cwd()):
        sys.stdout.write(f"{path.relative_to(Path.cwd())}\n")
