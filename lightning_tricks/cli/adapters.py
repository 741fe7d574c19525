"""`adapters`: list, merge, export and import adapters in the format of Hugging Face's peft."""

import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_tricks.engines import Stored, open_checkpoint, write_checkpoint
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.mixins._adapter_folder import read_folder
from lightning_tricks.mixins._merge_folder import merge_folder

__all__ = ["adapters"]


def adapters(arguments: list[str]) -> int:
    """Work on adapter folders, as `peft` and `save_adapter` write them.

    Args:
        arguments: `list FOLDER ...`, `merge FOLDER BASE OUT`, `export CHECKPOINT FOLDER [--name NAME]`, or
            `import FOLDER CHECKPOINT OUT [--name NAME]`.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
        MisconfigurationError: if it cannot be done with this method.
    """
    parser = ArgumentParser("lightning-tricks adapters", description="Adapters in the format of Hugging Face's peft.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("list", help="what adapter folders hold, one line each")
    verb.add_argument("folders", type=Path, nargs="+")
    verb = verbs.add_parser("merge", help="the base's weights with an adapter in them, as one file")
    verb.add_argument("folder", type=Path)
    verb.add_argument("base", type=Path, help="the .safetensors file of the model that it was trained on")
    verb.add_argument("out", type=Path, help="the .safetensors file to write")
    verb = verbs.add_parser("export", help="the adapter in the checkpoint of a TextClassifier, as a folder")
    verb.add_argument("checkpoint", type=Path)
    verb.add_argument("folder", type=Path)
    _add_name(verb)
    verb = verbs.add_parser("import", help="the checkpoint of a TextClassifier with the adapter of a folder in it")
    verb.add_argument("folder", type=Path)
    verb.add_argument("checkpoint", type=Path)
    verb.add_argument("out", type=Path, help="the .ckpt file to write")
    _add_name(verb)
    chosen = parser.parse_args(arguments)
    {"list": _list, "merge": _merge, "export": _export, "import": _import}[chosen.verb](chosen)
    return 0


def _add_name(verb: ArgumentParser) -> None:
    verb.add_argument("--name", default="default", help="which of the classifier's adapters (default: %(default)s)")


def _list(chosen: Any) -> None:
    for folder in chosen.folders:
        content = read_folder(folder)
        numbers = sum(tensor.numel() for tensor in content.tensors.values())
        size = sum(tensor.nbytes for tensor in content.tensors.values())
        kind = "DORA" if content.config.get("use_dora") else content.config["peft_type"]
        rank = f" r={content.config['r']} alpha={content.config['lora_alpha']:g}" if "r" in content.config else ""
        known = f"knows its base by {len(content.base)} tensors" if content.base else "does not know its base"
        sys.stdout.write(f"{folder}: {kind}{rank}, {numbers:,} numbers, {size / 1e6:.2f} MB, {known}\n")


def _merge(chosen: Any) -> None:
    changed = merge_folder(chosen.folder, chosen.base, chosen.out)
    _say(f"Wrote `{chosen.out}`: the adapter is in {changed} tensors.")


def _export(chosen: Any) -> None:
    _, model = _trained(chosen.checkpoint)
    model.save_adapter(chosen.folder, name=chosen.name)
    _say(f"Wrote `{chosen.folder}`. The head stays in the checkpoint: it is no part of the encoder's adapter.")


def _import(chosen: Any) -> None:
    stored, model = _trained(chosen.checkpoint)
    if chosen.name not in model.adapter_names:
        raise MisconfigurationError(
            f"the classifier of {chosen.checkpoint} has no adapter {chosen.name!r}: there are "
            f"{', '.join(model.adapter_names) or 'none'}. Name one of them, or load the folder in Python."
        )
    model.load_adapter(chosen.folder, module=model.encoder, name=chosen.name)
    state = model.state_dict()
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    write_checkpoint(chosen.out, layout, state.items(), stored.rest)
    _say(f"Wrote `{chosen.out}`: the adapter of `{chosen.folder}` with the head of `{chosen.checkpoint}`.")


def _trained(path: Path) -> tuple[Stored, Any]:
    """The checkpoint, and a new classifier with its weights, on the base that they were trained on."""
    from lightning_tricks.cli.prediction import build_classifier

    stored = open_checkpoint(path)
    model = build_classifier(stored.rest, path)
    model.on_load_checkpoint({**stored.rest, "state_dict": dict.fromkeys(stored.weights)})
    model.load_state_dict({name: stored.tensor(name) for name in stored.weights})
    return stored, model


def _say(text: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True, markup=False).print(text)
