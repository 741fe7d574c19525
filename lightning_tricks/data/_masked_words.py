"""Replace words of a text by what a masked language model puts in their place."""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_tricks.data._hub_models import HubModel, tokens_of

__all__ = ["Vocabulary", "replace_words"]

WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
STARTS = ("Ġ", "▁")  # how byte-level BPE and SentencePiece mark the first token of a word; WordPiece marks the others
Spans = list[tuple[int, int]]


class Vocabulary:
    """The tokens that are a word each.

    Args:
        tokenizer: a Hugging Face tokenizer.
        size: of the model's output, which may be more than the tokenizer has.
        device: of the model.
    """

    def __init__(self, tokenizer: Any, size: int, device: torch.device) -> None:
        tokens = {token: index for token, index in tokenizer.get_vocab().items() if index < size}
        start = next((mark for mark in STARTS if sum(token.startswith(mark) for token in tokens) > 1), "")
        self.words: dict[int, str] = {}
        self._same: dict[str, list[int]] = defaultdict(list)
        for token, index in tokens.items():
            if token.startswith(start) and WORD.fullmatch(word := token.removeprefix(start)):
                self.words[index] = word
                self._same[word.casefold()].append(index)
        self.barred = torch.ones(size, dtype=torch.bool, device=device)
        self.barred[list(self.words)] = False

    def same_as(self, word: str) -> list[int]:
        """The tokens that are this word, in whatever case."""
        return self._same.get(word.casefold(), [])


def replace_words(
    hub: HubModel, vocabulary: Vocabulary, texts: Sequence[str], *, share: float, top_k: int, seed: int
) -> list[str]:
    """Replace a share of each text's words, at least one; "" for a text without any.

    Args:
        hub: a masked language model.
        vocabulary: its words.
        texts: one batch.
        share: of the words.
        top_k: the likeliest words to draw from.
        seed: of the choice and the draw.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    chosen = [_choose(text, share, rng) for text in texts]
    masked = [_masked(text, spans, hub.tokenizer.mask_token) for text, spans in zip(texts, chosen, strict=True)]
    batch = hub.tokenizer.pad({"input_ids": tokens_of(hub, masked)}, return_tensors="pt").to(hub.model.device)
    ids, mask = batch["input_ids"][:, : hub.longest], batch["attention_mask"][:, : hub.longest]
    with torch.inference_mode():
        logits = hub.model(input_ids=ids, attention_mask=mask).logits.float()
    places = ids == hub.tokenizer.mask_token_id
    drawn = [
        _draw(scores[place], [text[a:b] for a, b in spans], vocabulary, top_k, rng)
        for text, spans, scores, place in zip(texts, chosen, logits, places, strict=True)
    ]
    return [_spliced(text, spans, found) for text, spans, found in zip(texts, chosen, drawn, strict=True)]


def _choose(text: str, share: float, rng: np.random.Generator) -> Spans:
    spans = [match.span() for match in WORD.finditer(text)]
    count = min(len(spans), max(1, round(share * len(spans))))
    return [spans[place] for place in sorted(rng.permutation(len(spans))[:count].tolist())]


def _masked(text: str, spans: Spans, mask: str) -> str:
    # A mask that the text itself holds would be counted as one of ours.
    bounds = [0, *(bound for span in spans for bound in span), len(text)]
    kept = [text[a:b].replace(mask, " ") for a, b in zip(bounds[::2], bounds[1::2], strict=True)]
    return mask.join(kept)


def _draw(
    scores: Tensor, originals: list[str], vocabulary: Vocabulary, top_k: int, rng: np.random.Generator
) -> list[str]:
    """A word for each mask that the model saw, from its logits there, (masks, vocabulary)."""
    found = []
    for row, original in zip(scores, originals, strict=False):
        row = row.masked_fill(vocabulary.barred, -torch.inf)
        row[vocabulary.same_as(original)] = -torch.inf
        likely = row.topk(min(top_k, len(row)))
        shares = likely.values.softmax(0).cumsum(0).double().cpu().numpy()
        place = min(int(np.searchsorted(shares, rng.random() * shares[-1], side="right")), len(shares) - 1)
        word = vocabulary.words.get(int(likely.indices[place]), original)
        found.append(_in_case_of(original, word))
    return found


def _in_case_of(original: str, word: str) -> str:
    if original.isupper() and len(original) > 1:
        return word.upper()
    return word[:1].upper() + word[1:] if original[:1].isupper() else word


def _spliced(text: str, spans: Spans, found: list[str]) -> str:
    if not spans:
        return ""
    parts, end = [], 0
    for (start, stop), word in zip(spans, found, strict=False):
        parts += [text[end:start], word]
        end = stop
    return "".join(parts) + text[end:]
