"""Masked words, back-translation and paraphrases: what each method makes of texts, with real models of no training."""

import re

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer, BertConfig, BertForMaskedLM

from lightning_tricks.data import BackTranslation, MaskedReplacement, Paraphrase, _hub_models
from lightning_tricks.data._masked_words import Vocabulary
from lightning_tricks.data.packages import minilm_folder
from lightning_tricks.errors import MisconfigurationError
from tests.data import tiny_models

CPU = torch.device("cpu")
TEXTS = [
    "The plot is VERY slow, not good.",
    "A lovely film!",
    "a long long story [MASK] scene; the actor was great",
    "12 + 3",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    names = ("masked", "translation", "paraphrase", "decoder")
    return {name: getattr(tiny_models, name)(tmp_path_factory.mktemp(name)) for name in names}


def loaded(method):
    method.load(CPU)
    return method


def split(text):
    return re.findall(r"\w+|\W", text)


def test_masked_words_change_and_nothing_else_does(folders):
    made = loaded(MaskedReplacement(folders["masked"], share=0.4)).make(TEXTS, seed=1)
    assert made[3] == ""  # no word to replace
    for source, text in zip(TEXTS[:3], made, strict=False):
        before, after = split(source), split(text)
        changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
        words = [word for word in before if word.isalpha()]
        assert len(changed) == max(1, round(0.4 * len(words)))
        for old, new in changed:
            assert old.isalpha()
            assert new.lower() != old.lower()
            assert new.lower() in [word.lower() for word in tiny_models.WORDS]
            assert new.isupper() if old.isupper() and len(old) > 1 else new[0].isupper() == old[0].isupper()


def test_a_masked_word_is_the_likeliest_that_is_not_itself(folders):
    """Against the model asked directly."""
    text = "a lovely film"
    made = loaded(MaskedReplacement(folders["masked"], share=0.01, top_k=1)).make([text], seed=3)[0]
    place = next(i for i, (a, b) in enumerate(zip(text.split(), made.split(), strict=True)) if a != b)
    masked = " ".join("[MASK]" if i == place else word for i, word in enumerate(text.split()))
    tokenizer, model = (c.from_pretrained(folders["masked"]) for c in (AutoTokenizer, AutoModelForMaskedLM))
    batch = tokenizer(masked, return_tensors="pt")
    logits = model.eval()(input_ids=batch["input_ids"]).logits[0, place]
    words = [w for w in tiny_models.WORDS if w != text.split()[place]]
    assert made.split()[place] == max(words, key=lambda w: logits[tiny_models.VOCABULARY[w]]).lower()


@pytest.mark.parametrize("mark", ["\u0120", "\u2581", ""])
def test_only_whole_words_are_put_in(mark):
    """As byte-level BPE, SentencePiece and WordPiece write them."""

    class Tokenizer:
        def get_vocab(self):
            parts = ["ness", "##ly"] if mark else ["##ness", "##ly"]
            return {t: i for i, t in enumerate(["[MASK]", *parts, f"{mark}film", f"{mark}Film", f"{mark}3", "7", mark])}

    vocabulary = Vocabulary(Tokenizer(), 10, CPU)
    assert vocabulary.words == {3: "film", 4: "Film"}
    assert vocabulary.same_as("FILM") == [3, 4]
    assert (~vocabulary.barred).nonzero().ravel().tolist() == [3, 4]


def test_with_a_vocabulary_of_30522_word_pieces(tmp_path):
    """MiniLM's own tokenizer, lower-case, on a model with BERT's head."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertForMaskedLM(BertConfig(vocab_size=30522, max_position_embeddings=64, **sizes)).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (tmp_path / name).write_bytes((minilm_folder() / name).read_bytes())
    method = loaded(MaskedReplacement(str(tmp_path), share=0.5))
    source = "An extraordinarily well-acted film\u2014Kidman's best, at 107 minutes."
    made = method.make([source] * 3, seed=0)
    pieces = r"(\W+|[\w'-]+)"
    before = [piece for piece in re.split(pieces, source) if piece]
    for text in made:
        after = [piece for piece in re.split(pieces, text) if piece]
        changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
        assert len(changed) == 4  # of 8 words, a number not among them
        assert all(b.isalpha() and b[0].isupper() == a[0].isupper() for a, b in changed)
    assert len(set(made)) == 3


def test_padding_does_not_change_what_is_made(folders):
    method = loaded(MaskedReplacement(folders["masked"], top_k=1, share=1))
    alone = [method.make([text], seed=0)[0] for text in TEXTS[:2]]
    assert method.make(TEXTS[:2], seed=0) == alone


def ways(folders):
    return {
        "masked": MaskedReplacement(folders["masked"]),
        "translation": BackTranslation(folders["translation"], folders["translation"], temperature=1),
        "paraphrase": Paraphrase(folders["paraphrase"], temperature=1),
        "decoder": Paraphrase(folders["decoder"], temperature=1),
    }


@pytest.mark.parametrize("name", ["masked", "translation", "paraphrase", "decoder"])
def test_a_seed_decides_and_nothing_else_is_drawn(folders, name):
    method = loaded(ways(folders)[name])
    texts = TEXTS[:3] * 5
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = method.make(texts, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert method.make(texts, seed=7) == first
    assert any(method.make(texts, seed=seed) != first for seed in range(8, 12))
    assert any(first)
    assert all(isinstance(text, str) and "</s>" not in text and "<pad>" not in text for text in first)


def translated(name, text, seed):
    """By transformers' own generate; None if it came to no end."""
    tokenizer, model = (c.from_pretrained(name) for c in (AutoTokenizer, AutoModelForSeq2SeqLM))
    batch = tokenizer(text, return_tensors="pt")
    torch.manual_seed(seed)
    made = model.eval().generate(**batch, num_beams=1, do_sample=True, top_p=0.95, temperature=1.0, max_new_tokens=20)
    return tokenizer.decode(made[0], skip_special_tokens=True) if (made[0, 1:] == 1).any() else None


def test_back_translation_goes_through_both_models(folders, tmp_path):
    other, text = tiny_models.translation(tmp_path, seed=1), "a lovely film"
    method = loaded(BackTranslation(folders["translation"], other, temperature=1))
    compared = 0
    for seed in range(8):
        pivot = translated(folders["translation"], text, seed)
        expected = translated(other, pivot, seed) if pivot else None
        if expected:
            assert method.make([text], seed=seed) == [expected]
            compared += 1
    assert compared >= 2


def test_an_output_without_an_end_is_none(folders, monkeypatch):
    method = loaded(Paraphrase(folders["paraphrase"], temperature=1))
    several = ["a lovely film"] * 40
    made = method.make(several, seed=0)
    monkeypatch.setattr(_hub_models, "GROWTH", 0)
    monkeypatch.setattr(_hub_models, "SPARE", 3)
    shorter = method.make(several, seed=0)
    assert sum(map(bool, shorter)) < sum(map(bool, made))
    assert all(len(text.split()) <= 3 for text in shorter)


def test_a_decoder_goes_on_from_its_prompt_and_a_chat_model_is_asked(folders, tmp_path):
    method = loaded(Paraphrase(folders["decoder"], prompt="Paraphrase : {text}", temperature=1))
    assert all("Paraphrase : a lovely film" not in text for text in method.make(["a lovely film"] * 5, seed=0))
    template = "{% for m in messages %}is {{ m.content }} . {% endfor %}"
    chat = loaded(Paraphrase(tiny_models.decoder(tmp_path, chat_template=template)))
    hub, expected = chat._hub, "is Paraphrase: a lovely film . "
    assert hub.tokenizer.decode(_hub_models.tokens_of(hub, ["Paraphrase: a lovely film"])[0]) == (
        hub.tokenizer.decode(hub.tokenizer(expected, add_special_tokens=False)["input_ids"])
    )


def test_models_that_cannot_do_it_are_named(folders, tmp_path):
    minilm = str(minilm_folder())
    for method, message in (
        (MaskedReplacement(minilm), "has no trained head for masked words"),
        (MaskedReplacement(folders["translation"]), "has no trained head for masked words"),
        (BackTranslation(minilm, minilm), "is no encoder with a decoder"),
        (BackTranslation(folders["translation"], folders["decoder"]), "is no encoder with a decoder"),
        (Paraphrase(minilm), "does not generate text"),
        (Paraphrase(str(tmp_path / "nothing")), "There is no model"),
    ):
        with pytest.raises(MisconfigurationError, match=message):
            method.load(CPU)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskedReplacement("a", share=0), "`share` must be above 0 and at most 1, got 0"),
        (lambda: MaskedReplacement("a", top_k=0), "`top_k` must be at least 1, got 0"),
        (lambda: BackTranslation("a", "b", temperature=3), "`temperature` must be from 0 to 2, got 3"),
        (lambda: Paraphrase("a", top_p=0), "`top_p` must be above 0 and at most 1, got 0"),
        (lambda: Paraphrase("a", prompt="Say it again"), r"`prompt` must hold `\{text\}`"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(MisconfigurationError, match=message):
        make()
