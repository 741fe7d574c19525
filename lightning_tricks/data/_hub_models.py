"""Hugging Face models that make text: loaded, refused if they cannot, and asked for it reproducibly."""

import dataclasses
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from lightning_tricks.data.tokens import load_tokenizer
from lightning_tricks.errors import MisconfigurationError, MissingDependencyError

__all__ = ["HubModel", "Kind", "generate", "load_hub_model", "room", "seeded", "tokens_of"]

Kind = Literal["masked", "translation", "paraphrase"]
LONGEST = 1024  # tokens, where neither model nor tokenizer says
GROWTH, SPARE = 1.5, 16  # an output may have so many times the tokens of its source, and so many more
WANTED = {
    "masked": "has no trained head for masked words: choose a masked language model, such as `bert-base-uncased`",
    "translation": "is no encoder with a decoder: choose a translation model, such as `Helsinki-NLP/opus-mt-en-de`",
    "paraphrase": "does not generate text: choose a model with a decoder, such as `google/flan-t5-base`",
}


@dataclasses.dataclass(frozen=True)
class HubModel:
    """A loaded model.

    Args:
        name: its Hugging Face id or folder.
        model: in evaluation mode, fp32.
        tokenizer: its own.
        longest: the most tokens that it takes.
        checksum: of the weights and the vocabulary.
    """

    name: str
    model: Any
    tokenizer: Any
    longest: int
    checksum: str

    @property
    def decoder_only(self) -> bool:
        """Whether an output goes on from its prompt."""
        return not self.model.config.is_encoder_decoder


def load_hub_model(name: str, kind: Kind, device: torch.device) -> HubModel:
    """Load a model and its tokenizer.

    Raises:
        MissingDependencyError: without transformers, or without what the tokenizer needs.
        MisconfigurationError: if there is no such model, or none of this kind, or its weights are not all there.
        DataError: if there is no such tokenizer.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            "Augmentation needs transformers. Run: pip install 'lightning-tricks[transformers]'"
        ) from error
    try:
        with _quiet():
            kinds = _classes(transformers.AutoConfig.from_pretrained(name), kind)
            model, found = getattr(transformers, kinds).from_pretrained(name, output_loading_info=True)
    except OSError as error:
        raise MisconfigurationError(
            f"There is no model `{name}`: give a folder or a Hugging Face id. {error}"
        ) from error
    except ValueError as error:
        raise MisconfigurationError(f"`{name}` {WANTED[kind]}.") from error
    if lacking := sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]])):
        raise MisconfigurationError(f"`{name}` {WANTED[kind]}. (Not in it, or of another shape: `{lacking[0]}`.)")
    try:
        tokenizer = load_tokenizer(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"The tokenizer of `{name}` needs more. Run: pip install sentencepiece sacremoses ({error})"
        ) from error
    if kind == "masked" and tokenizer.mask_token_id is None:
        raise MisconfigurationError(f"The tokenizer of `{name}` has no mask token: {WANTED[kind]}.")
    if kind == "translation" and hasattr(tokenizer, "src_lang"):
        raise MisconfigurationError(
            f"`{name}` translates between many languages and must be told which: choose a model of one pair, such as"
            " `Helsinki-NLP/opus-mt-en-de`."
        )
    model = model.float().eval().to(device)
    return HubModel(name, model, tokenizer, _longest(model.config, tokenizer), _checksum(model, tokenizer))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' table of missing weights, which are refused, and its bars."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _classes(config: Any, kind: Kind) -> str:
    if kind == "masked":
        return "AutoModelForMaskedLM"
    if config.is_encoder_decoder or kind == "translation":
        return "AutoModelForSeq2SeqLM"
    return "AutoModelForCausalLM"


def _longest(config: Any, tokenizer: Any) -> int:
    sizes = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    return min(int(tokenizer.model_max_length), *(int(size) for size in sizes if size), LONGEST)


def _checksum(model: Any, tokenizer: Any) -> str:
    found = zlib.crc32(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    for name, values in sorted(model.state_dict().items()):
        found = zlib.crc32(values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, found)
        found = zlib.crc32(name.encode(), found)
    return f"{found:08x}"


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from `seed`, and leave the random numbers of everything else as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def generate(hub: HubModel, prompts: Sequence[str], *, seed: int, temperature: float, top_p: float) -> list[str]:
    """One output for each prompt; "" for an empty prompt or one too long, and where the model came to no end.

    Args:
        hub: the model.
        prompts: what it is given.
        seed: of the draw.
        temperature: 0 takes the likeliest token each time.
        top_p: tokens of so much probability altogether are drawn from.
    """
    outputs = [""] * len(prompts)
    tokens = tokens_of(hub, prompts)
    rows = [row for row, found in enumerate(tokens) if prompts[row].strip() and len(found) <= room(hub)]
    if not rows:
        return outputs
    hub.tokenizer.padding_side = "left" if hub.decoder_only else "right"
    batch = hub.tokenizer.pad({"input_ids": [tokens[row] for row in rows]}, return_tensors="pt").to(hub.model.device)
    width = batch["input_ids"].shape[1]
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    with torch.inference_mode(), seeded(seed, hub.model.device), _quiet():
        made = hub.model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            num_beams=1,
            max_length=None,
            max_new_tokens=min(int(GROWTH * width) + SPARE, hub.longest - 1),
            pad_token_id=hub.tokenizer.pad_token_id,
            **drawn,
        )
    made = made[:, width if hub.decoder_only else 1 :]  # the start of a decoder may be its end token
    ended = _ended(hub, made)
    for row, text, end in zip(rows, hub.tokenizer.batch_decode(made, skip_special_tokens=True), ended, strict=True):
        outputs[row] = text.strip() if end else ""
    return outputs


def tokens_of(hub: HubModel, prompts: Sequence[str]) -> list[list[int]]:
    """What the model is given, as token ids; a model for conversations is asked as a user would ask it."""
    chat = hub.decoder_only and getattr(hub.tokenizer, "chat_template", None) is not None
    if chat:
        prompts = [
            hub.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            for prompt in prompts
        ]
    with _quiet():  # of what is too long there is a count
        found: list[list[int]] = hub.tokenizer(list(prompts), add_special_tokens=not chat)["input_ids"]
    return found


def room(hub: HubModel) -> int:
    """The most tokens of a prompt; one that an output goes on from leaves space for it."""
    return int((hub.longest - SPARE) / (1 + GROWTH)) if hub.decoder_only else hub.longest


def _ended(hub: HubModel, made: torch.Tensor) -> list[bool]:
    ends = hub.model.generation_config.eos_token_id
    if ends is None:
        return [True] * len(made)
    known = torch.tensor(ends if isinstance(ends, list) else [ends], device=made.device)
    found: list[bool] = torch.isin(made, known).any(1).tolist()
    return found
