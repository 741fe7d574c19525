"""Find and load a Hugging Face encoder, and name the layers of it that LoRA adapts."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_tricks.data.packages import minilm_folder
from lightning_tricks.errors import MisconfigurationError, MissingDependencyError

__all__ = ["encoder_source", "load_encoder", "lora_targets", "pool"]

# Query and value projections, as architectures name them: BERT, RoBERTa and ELECTRA; LLaMA, Mistral, Qwen and BART;
# DistilBERT; DeBERTa; MPNet and T5; ModernBERT, where one layer holds them all.
TARGETS = [
    ("query", "value"),
    ("q_proj", "v_proj"),
    ("q_lin", "v_lin"),
    ("query_proj", "value_proj"),
    ("q", "v"),
    ("Wqkv",),
]


def encoder_source(name: str) -> str:
    """What Hugging Face libraries load for `name`: `all-minilm-l6-v2` is the encoder that comes as a package."""
    return str(minilm_folder()) if name == "all-minilm-l6-v2" else name


def load_encoder(name: str) -> nn.Module:
    """The encoder, in fp32 and training mode, without a pooler: nothing in it is left unused by `pool`.

    Raises:
        MissingDependencyError: without transformers.
        MisconfigurationError: if `name` is no model, or one with a decoder that waits for inputs of its own.
    """
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise MissingDependencyError(
            "Encoders need transformers. Run: pip install 'lightning-tricks[transformers]'"
        ) from error
    source = encoder_source(name)
    try:
        with _quiet(source):
            encoder: Any = AutoModel.from_pretrained(source)
    except (OSError, ValueError) as error:
        kind = "folder with a model" if Path(source).exists() else "local folder, nor can it be fetched"
        raise MisconfigurationError(f"`name={name}` is no {kind}: {error}") from error
    if encoder.config.is_encoder_decoder:
        raise MisconfigurationError(f"`name={name}` is an encoder with a decoder. Choose an encoder, such as BERT.")
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # DDP waits for the gradient of every parameter
    return encoder.float().train()  # type: ignore[no-any-return]


@contextmanager
def _quiet(source: str) -> Iterator[None]:
    """Without transformers' bar for loading a local folder, which takes a moment; downloads keep theirs."""
    from transformers.utils import logging

    if not (Path(source).is_dir() and logging.is_progress_bar_enabled()):
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def lora_targets(encoder: nn.Module) -> tuple[str, ...]:
    """The names of the query and value projections of `encoder`; BERT's if it has none that are known."""
    linear = {name.rpartition(".")[2] for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
    return next((names for names in TARGETS if linear.issuperset(names)), TARGETS[0])


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One vector a text.

    Args:
        hidden: token vectors, (batch, tokens, width).
        mask: 1 for tokens, 0 for padding, (batch, tokens).
        pooling: `mean` over the tokens, or the first one's (`cls`).

    Example:
        >>> import torch
        >>> hidden = torch.tensor([[[2.0], [4.0], [90.0]]])
        >>> pool(hidden, torch.tensor([[1, 1, 0]]), "mean").tolist()
        [[3.0]]
    """
    if pooling == "cls":
        return hidden[:, 0]
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
