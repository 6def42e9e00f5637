"""Supertokens: lossless, across spaces, shorter than BPE of the same size."""

from __future__ import annotations

from functools import lru_cache
from pydoc_data import topics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everytoken.core.errors import BadInputError
from everytoken.reproduce.stochastok import bpe
from everytoken.tokenization.base import token_bytes
from everytoken.tokenization.supertokens import SupertokenTrainer, trace, words_in

from .common import CORPUS


@lru_cache
def corpus():  # what prose() begins with: the rest takes seconds to find
    text = "\n\n".join(text for _, text in sorted(topics.topics.items()))
    return text[:150_000], text[-30_000:]


@lru_cache
def trained(sizes=(0.4, 0.3, 0.2, 0.1)):
    return SupertokenTrainer(2000, sizes).train(corpus()[0].split("\n\n"))


@settings(max_examples=25)
@given(st.text(max_size=60))
def test_any_text_comes_back(text):
    tokenizer = trained()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@given(st.text(alphabet="ab  é漢1.,'\n\t\r\u00a0", max_size=40), st.integers(0, 5))
def test_chunks_are_the_text(text, seed):
    trainer = SupertokenTrainer(seed=seed)
    chunks = list(trainer.chunks([text]))
    assert "".join(chunks) == text and all(chunks)
    for chunk in chunks:
        assert len(chunk.split()) <= 4
        if any(c in chunk for c in "1.,\n"):
            assert len(chunk.strip().split(" ")) == 1  # hard boundaries


def test_tokens_span_spaces_and_texts_get_shorter():
    training, held_out = corpus()
    supers = trained()
    plain = bpe(training, len(supers))
    table = token_bytes(supers)
    spanning = [token for token in table if words_in(token) > 1]
    assert spanning and max(words_in(token) for token in table) <= 4
    assert not any(c in token.decode("utf-8", "replace") for token in spanning for c in "0123456789\n.,")
    assert len(supers(held_out)["input_ids"]) < len(plain.encode(held_out).ids)
    assert len(supers) == plain.get_vocab_size() == 2000


def test_single_words_are_plain_bpe():
    one = trained((1.0,))
    assert max(words_in(token) for token in token_bytes(one)) <= 1
    again = SupertokenTrainer(2000, (1.0,), seed=5).train(corpus()[0].split("\n\n"))
    assert again.get_vocab() == one.get_vocab()  # nothing was drawn that matters


def test_saved_and_loaded(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = SupertokenTrainer(400, special_tokens=("<end>", "<pad>")).train(CORPUS)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "hello to the other worlds , 12\n\n  naïve 😀"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.decode(again(text)["input_ids"]) == text
    assert again.eos_token == "<end>" and again.eos_token_id == 0


def test_seeds_and_traces():
    first, second = (SupertokenTrainer(400, seed=3).train(CORPUS) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    shown = trace(first, "says hello to the other worlds")
    assert max(shown.columns["words"]) > 1 and "".join(shown.texts) == "says hello to the other worlds"


def test_bad_input():
    for make, message in (
        (lambda: SupertokenTrainer(100), "vocab_size"),
        (lambda: SupertokenTrainer(chunk_sizes=()), "chunk_sizes"),
        (lambda: SupertokenTrainer(chunk_sizes=(0, 0)), "chunk_sizes"),
        (lambda: SupertokenTrainer(chunk_sizes=(1, -1)), "chunk_sizes"),
        (lambda: SupertokenTrainer(min_frequency=0), "min_frequency"),
        (lambda: SupertokenTrainer().train("one text"), "several texts"),
        (lambda: SupertokenTrainer().train([]), "no text"),
        (lambda: SupertokenTrainer().train([""]), "no text"),
    ):
        with pytest.raises(BadInputError, match=message):
            make()
