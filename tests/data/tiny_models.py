"""Tiny models of real architectures with random weights, in folders as Hugging Face libraries write them."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

WORDS = [
    "a",
    "the",
    "is",
    "was",
    "very",
    "not",
    "quite",
    "film",
    "plot",
    "story",
    "actor",
    "scene",
    "good",
    "bad",
    "dull",
    "lovely",
    "slow",
    "long",
    "great",
    "paraphrase",
]
SPECIAL = ["<pad>", "</s>", "<unk>", "[MASK]"]
VOCABULARY = {word: index for index, word in enumerate([*SPECIAL, *WORDS, ":", ".", "##ly"])}
LONGEST = 24


def tokenizer(folder, longest=LONGEST, **options):
    """Whole words, with an end token."""
    found = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    found.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=found,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="[MASK]",
        model_max_length=longest,
        **options,
    ).save_pretrained(folder)


def saved(folder, model, **options):
    """The folder, with a model and a tokenizer in it."""
    model.save_pretrained(folder)
    tokenizer(folder, **options)
    return str(folder)


def masked(folder, seed=0):
    """A BERT with a head for masked words."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(VOCABULARY), max_position_embeddings=LONGEST, pad_token_id=0, **sizes)
    return saved(folder, BertForMaskedLM(config))


def translation(folder, seed=0):
    """A Marian model."""
    torch.manual_seed(seed)
    sizes = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config = MarianConfig(
        vocab_size=len(VOCABULARY),
        d_model=16,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=LONGEST,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        **sizes,
    )
    return saved(folder, MarianMTModel(config))


def paraphrase(folder, seed=0):
    """A T5."""
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=len(VOCABULARY), pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, **sizes)
    return saved(folder, T5ForConditionalGeneration(config))


def decoder(folder, seed=0, **options):
    """A GPT-2."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=len(VOCABULARY), n_embd=16, n_layer=1, n_head=2, n_positions=99, eos_token_id=1)
    config.bos_token_id = 1
    return saved(folder, GPT2LMHeadModel(config), longest=99, **options)
