"""Small real tokenizers, trained on the spot."""

from __future__ import annotations

from functools import lru_cache

from ..conftest import tiny_llama

CORPUS = [
    "hello hello world, the world says hello to the other worlds and it's a wonderful whole world",
    "there were 12 helpers who helped 345 others, they'd say: well well well, how helpful\n\nwhere?  here",
    "the café sold naïve déjà-vu cakes 😀 😀 to the élite; über-helpful waiters 漢字 漢字",
] * 4

TEXTS = [
    "strawberries wonderful wonderful helpers",
    "unbelievable strawberries, isn't it?\n\n  well",
    "naïve 漢字漢字 12345",
]
"""For merging: repeated words, contractions, characters of several bytes."""


@lru_cache
def byte_level(size=330, regex=True):
    """A byte-level BPE tokenizer, as GPT-2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@lru_cache
def sentencepiece(size=120):
    """A SentencePiece-like BPE tokenizer with byte fallback, as Llama 2's."""
    import json

    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    space = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend = Tokenizer(models.BPE())
    backend.normalizer = space
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>"], limit_alphabet=60, show_progress=False)
    backend.train_from_iterator([word for line in CORPUS for word in line.split()], trainer)
    model = json.loads(backend.to_str())["model"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for token in sorted(model["vocab"], key=model["vocab"].get):
        vocab.setdefault(token, len(vocab))
    merges = [tuple(pair) for pair in model["merges"]]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = space
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


KINDS = {"byte-level": byte_level, "sentencepiece": sentencepiece}


def build_lm(kind, seed=1, **options):
    """A tiny model of bytes with a tokenizer of this kind."""
    from everytoken.tokenization.byte_lm import ByteLM

    tokenizer = KINDS[kind]()
    return ByteLM(tiny_llama(len(tokenizer), seed=seed, eos=tokenizer.eos_token_id, scale=0.3), tokenizer, **options)


def model_for(tokenizer):
    """A tiny model for a tokenizer."""
    return tiny_llama(len(tokenizer), seed=4)


def hyper_for(model, seed=0, trained=True):
    """A tiny hypernetwork attached to a model; untrained it is the mean of the pieces."""
    import torch

    from everytoken.tokenization.hyper import HyperConfig, HyperEmbedding

    torch.manual_seed(seed)
    weight = model.get_input_embeddings().weight
    hyper = HyperEmbedding(HyperConfig(weight.shape[1], 16, 1, 2, 4, len(weight), float(weight.detach().std()))).eval()
    if trained:
        for layer in (hyper.score, hyper.write):
            torch.nn.init.normal_(layer.weight, std=0.3)
    return hyper.attach(model)


def prompts(tokenizer, texts):
    """A left-padded batch."""
    tokenizer.pad_token = "</s>"
    return tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")


def new_tokens(tokenizer):
    """Forty tokens that a tokenizer lacks, as their pieces."""
    from everytoken.tokenization.dynamic_tokenization import DynamicTokenizer

    return DynamicTokenizer(tokenizer).vocabulary(TEXTS, 40)


def check_steps(lm, text):
    """Byte after byte, the next byte's distribution is that of the masses of the texts one byte longer.

    ``P(b | text) / P(c | text) = P(text b) / P(text c)``, for the text's next byte and the likeliest two others. What
    is settled on the way must lose nothing, so this fails where a token crosses a settled place.
    """
    import numpy as np
    import pytest

    for size in range(len(text)):
        found = lm.next_byte_logprobs(text[:size])
        assert np.exp(found).sum() == pytest.approx(1)
        mine, mass = text[size], lm.logprob(text[: size + 1])
        assert np.isfinite(found[mine]), (text, size)
        for other in [byte for byte in np.argsort(-found[:256])[:3].tolist() if byte != mine][:2]:
            apart = mass - lm.logprob(text[:size] + bytes([other]))
            assert found[mine] - found[other] == pytest.approx(apart, abs=1e-3), (text, size, bytes([other]))
