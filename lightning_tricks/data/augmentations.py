"""Three ways to make another text of the same meaning with a language model."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from lightning_tricks.data._hub_models import HubModel, generate, load_hub_model, room, tokens_of
from lightning_tricks.data._masked_words import Vocabulary, replace_words
from lightning_tricks.errors import MisconfigurationError

__all__ = ["Augmentation", "BackTranslation", "MaskedReplacement", "Paraphrase"]


class Augmentation(ABC):
    """A way to make texts of texts, a pure function of the texts and a seed. Subclass it for a way of your own."""

    method: ClassVar[str]  # as the column `method` has it

    @property
    @abstractmethod
    def models(self) -> tuple[str, ...]:
        """The models' Hugging Face ids or folders."""

    @abstractmethod
    def load(self, device: torch.device) -> dict[str, Any]:
        """Load the models, and give all that decides what is made of a text: the options, and checksums of weights.

        Raises:
            MisconfigurationError: for a model that cannot do it.
        """

    @abstractmethod
    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens that each text makes for the model."""

    @property
    @abstractmethod
    def longest(self) -> int:
        """The most tokens of a text; longer ones are left out."""

    @abstractmethod
    def make(self, texts: Sequence[str], seed: int) -> list[str]:
        """One text for each; "" where none came about.

        Args:
            texts: one batch.
            seed: of its draw.
        """


class MaskedReplacement(Augmentation):
    """Masks some words and has a masked language model fill them in; the rest of the text stays to the character.

    A word is replaced by one that the model knows as one token and holds likely, never by itself, with the case of the
    word that it replaces.

    Args:
        model: a masked language model, such as `bert-base-uncased` or `roberta-base`.
        share: of the words to mask, at least one; 0.05 to 0.3. More changes the meaning.
        top_k: the likeliest words to draw from, 1 or more.

    Raises:
        MisconfigurationError: for an option out of range.

    Example:
        >>> MaskedReplacement("bert-base-uncased", share=2)
        Traceback (most recent call last):
        ...
        lightning_tricks.errors.MisconfigurationError: `share` must be above 0 and at most 1, got 2. 0.15 is usual.

    References:
        Kobayashi, *Contextual Augmentation*, NAACL 2018; Wu et al., *Conditional BERT*, ICCS 2019.
    """

    method = "masked_replacement"

    def __init__(self, model: str, *, share: float = 0.15, top_k: int = 10) -> None:
        if not 0 < share <= 1:
            raise MisconfigurationError(f"`share` must be above 0 and at most 1, got {share}. 0.15 is usual.")
        if top_k < 1:
            raise MisconfigurationError(f"`top_k` must be at least 1, got {top_k}.")
        self.model, self.share, self.top_k = str(model), share, top_k

    @property
    def models(self) -> tuple[str, ...]:
        """The one model."""
        return (self.model,)

    def load(self, device: torch.device) -> dict[str, Any]:
        """Load the model and sort its vocabulary."""
        self._hub = load_hub_model(self.model, "masked", device)
        self._vocabulary = Vocabulary(self._hub.tokenizer, int(self._hub.model.config.vocab_size), device)
        return {"share": self.share, "top_k": self.top_k, "checksums": [self._hub.checksum]}

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text."""
        return [len(found) for found in tokens_of(self._hub, texts)]

    @property
    def longest(self) -> int:
        """The most tokens that the model takes."""
        return self._hub.longest

    def make(self, texts: Sequence[str], seed: int) -> list[str]:
        """One text for each."""
        return replace_words(self._hub, self._vocabulary, texts, share=self.share, top_k=self.top_k, seed=seed)


class _Generation(Augmentation):
    def __init__(self, temperature: float, top_p: float) -> None:
        if not 0 <= temperature <= 2:
            raise MisconfigurationError(f"`temperature` must be from 0 to 2, got {temperature}. 0.7 to 1 is usual.")
        if not 0 < top_p <= 1:
            raise MisconfigurationError(f"`top_p` must be above 0 and at most 1, got {top_p}. 0.95 is usual.")
        self.temperature, self.top_p = temperature, top_p

    def _settings(self, *hubs: HubModel) -> dict[str, Any]:
        checksums = [hub.checksum for hub in hubs]
        return {"temperature": self.temperature, "top_p": self.top_p, "checksums": checksums}

    def _generate(self, hub: HubModel, prompts: Sequence[str], seed: int) -> list[str]:
        return generate(hub, prompts, seed=seed, temperature=self.temperature, top_p=self.top_p)


class BackTranslation(_Generation):
    """Translates a text into another language and back.

    Args:
        there: a model from the texts' language into another, such as `Helsinki-NLP/opus-mt-en-de`.
        back: one from that language, such as `Helsinki-NLP/opus-mt-de-en`.
        prefixes: before what each of them is given, such as T5's `translate English to German: `.
        temperature: of the draw, 0 to 2; 0 takes the likeliest word each time, so that copies are all alike.
        top_p: words of so much probability altogether are drawn from, above 0 to 1.

    Raises:
        MisconfigurationError: for an option out of range.

    References:
        Sennrich, Haddow, Birch, ACL 2016; sampling instead of search: Edunov et al., EMNLP 2018.
    """

    method = "back_translation"

    def __init__(
        self,
        there: str,
        back: str,
        *,
        prefixes: tuple[str, str] = ("", ""),
        temperature: float = 0.7,
        top_p: float = 0.95,
    ) -> None:
        super().__init__(temperature, top_p)
        self.there, self.back, self.prefixes = str(there), str(back), tuple(prefixes)

    @property
    def models(self) -> tuple[str, ...]:
        """There, and back."""
        return (self.there, self.back)

    def load(self, device: torch.device) -> dict[str, Any]:
        """Load both models."""
        self._hubs = [load_hub_model(name, "translation", device) for name in self.models]
        return {"prefixes": list(self.prefixes), **self._settings(*self._hubs)}

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text for the first model."""
        return [len(found) for found in tokens_of(self._hubs[0], [self.prefixes[0] + text for text in texts])]

    @property
    def longest(self) -> int:
        """The most tokens that the first model takes."""
        return room(self._hubs[0])

    def make(self, texts: Sequence[str], seed: int) -> list[str]:
        """One text for each."""
        for hub, prefix in zip(self._hubs, self.prefixes, strict=True):
            texts = self._generate(hub, [prefix + text if text else "" for text in texts], seed)
        return list(texts)


class Paraphrase(_Generation):
    """Asks a model for the same in other words: one with encoder and decoder, or one that goes on from a prompt.

    A model for conversations is asked as a user would ask it. Of what a model without encoder says, the first line
    counts.

    Args:
        model: such as `google/flan-t5-base` or `HuggingFaceTB/SmolLM2-360M-Instruct`.
        prompt: what the model is given; `{text}` stands for the text.
        temperature: of the draw, 0 to 2; 0 takes the likeliest word each time, so that copies are all alike.
        top_p: words of so much probability altogether are drawn from, above 0 to 1.

    Raises:
        MisconfigurationError: for an option out of range, or a prompt without `{text}`.
    """

    method = "paraphrase"

    def __init__(
        self,
        model: str,
        *,
        prompt: str = "Paraphrase: {text}",
        temperature: float = 0.7,
        top_p: float = 0.95,
    ) -> None:
        super().__init__(temperature, top_p)
        if "{text}" not in prompt:
            raise MisconfigurationError(f"`prompt` must hold `{{text}}`, where the text goes, got {prompt!r}.")
        self.model, self.prompt = str(model), prompt

    @property
    def models(self) -> tuple[str, ...]:
        """The one model."""
        return (self.model,)

    def load(self, device: torch.device) -> dict[str, Any]:
        """Load the model."""
        self._hub = load_hub_model(self.model, "paraphrase", device)
        return {"prompt": self.prompt, **self._settings(self._hub)}

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each prompt."""
        return [len(found) for found in tokens_of(self._hub, self._prompts(texts))]

    @property
    def longest(self) -> int:
        """The most tokens of a prompt."""
        return room(self._hub)

    def make(self, texts: Sequence[str], seed: int) -> list[str]:
        """One text for each."""
        made = self._generate(self._hub, self._prompts(texts), seed)
        return [text.splitlines()[0].strip(' "') if text else "" for text in made] if self._hub.decoder_only else made

    def _prompts(self, texts: Sequence[str]) -> list[str]:
        return [self.prompt.replace("{text}", text) for text in texts]
