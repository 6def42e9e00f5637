"""Tokenizers of other families: rank files against their tokenizer, packaged ones against their own library."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everytoken.core.errors import BadInputError
from everytoken.tokenization.base import spell, token_bytes
from everytoken.tokenization.byte_view import ByteView
from everytoken.tokenization.foreign_tokenizers import (
    CL100K_PATTERN,
    FAMILIES,
    PACKAGED,
    from_ranks,
    load_any_tokenizer,
    read_ranks,
    read_tekken,
)

from .common import byte_level

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TEXTS = [
    "Hello wörld, it's 2024!  Two  spaces\n\n\tand tabs",
    "漢字かな交じり文 😀👩‍👩‍👧 e\u0301",
    "def f(x):\n    return x ** 2  # 12345",
    "",
    " ",
    "\n",
    "ǅ ſ ﬁ \u00a0\u3000",
    "I'LL they've WE'D",
]


def ranks_of(tokenizer):
    return {data: index for index, data in enumerate(token_bytes(tokenizer)) if data}


@given(st.text(max_size=30))
def test_ranks_give_the_tokenizer_back(text):
    original = byte_level(420)
    again = from_ranks(ranks_of(original), GPT2, {"<s>": 0, "</s>": 1}, eos_token="</s>")
    assert again(text, add_special_tokens=False)["input_ids"] == original(text, add_special_tokens=False)["input_ids"]
    assert again.eos_token_id == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", "tekken"])
def test_packaged_tokenizers_encode_as_their_own_library(name):
    import mistral_common

    folder = Path(mistral_common.__file__).parent
    if name == "mistral":
        from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer as Theirs

        theirs = Theirs(folder / PACKAGED[name][1])
    else:
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer as Theirs

        theirs = Theirs.from_file(folder / PACKAGED[name][1])
    ours = load_any_tokenizer(name)
    view = ByteView(ours)
    for text in TEXTS:
        ids = ours(text, add_special_tokens=False)["input_ids"]
        if name == "mistral" and "  " in " " + text:
            # transformers' conversion cuts runs of spaces in its own way, and takes a first space for the one it adds
            continue
        assert ids == theirs.encode(text, bos=False, eos=False), text
        assert spell(ours, ids) == (view.lead + text.encode() if text else b"")


def test_files(tmp_path):
    ranks = {data: index - 2 for data, index in ranks_of(byte_level()).items()}
    path = tmp_path / "small.tiktoken"
    path.write_text("\n".join(f"{base64.b64encode(data).decode()} {rank}" for data, rank in ranks.items()))
    assert read_ranks(path) == ranks
    with pytest.raises(BadInputError, match="does not say how text is cut"):
        load_any_tokenizer(str(path))
    tokenizer = load_any_tokenizer(str(path), GPT2)
    assert (
        tokenizer.eos_token == "<|endoftext|>"
        and spell(tokenizer, tokenizer("hello é")["input_ids"]) == "hello é".encode()
    )
    in_order = sorted((rank, data) for data, rank in ranks.items())
    tekken = {
        "config": {"pattern": GPT2, "default_vocab_size": len(ranks) + 5, "default_num_special_tokens": 5},
        "vocab": [{"rank": rank, "token_bytes": base64.b64encode(data).decode()} for rank, data in in_order],
    }
    path = tmp_path / "tekken.json"
    path.write_text(json.dumps(tekken))
    loaded = load_any_tokenizer(str(path))
    assert len(loaded) == len(ranks) + 5 and loaded.eos_token_id == 2
    assert spell(loaded, loaded("hello 😀", add_special_tokens=False)["input_ids"]) == "hello 😀".encode()
    byte_level().save_pretrained(tmp_path / "folder")
    for place in (tmp_path / "folder", tmp_path / "folder" / "tokenizer.json"):
        assert load_any_tokenizer(str(place))("hello")["input_ids"] == byte_level()("hello")["input_ids"]


def test_bad_input(tmp_path):
    broken = tmp_path / "broken.tiktoken"
    broken.write_text("not base64 at all")
    other = tmp_path / "words.txt"
    other.write_text("a b c")
    tekken = tmp_path / "bad.json"
    tekken.write_text('{"vocab": [{"token_bytes": "AA=="}]}')
    for call, message in (
        (lambda: load_any_tokenizer(str(broken)), "no file of tiktoken ranks"),
        (lambda: load_any_tokenizer(str(other)), "no tokenizer file"),
        (lambda: read_tekken(tekken), "no tekken.json"),
        (lambda: from_ranks({b"a": 0}, GPT2), "lacks 255 single bytes"),
        (lambda: from_ranks({bytes([b]): b for b in range(256)}, GPT2, special_tokens={"<s>": 3}), "same id"),
    ):
        with pytest.raises(BadInputError, match=message):
            call()


def small_ranks(path):
    """Bytes, and digits in pairs and threes."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [str(number).encode() for number in range(10, 1000)] + [b" a", b"in"]
    path.write_text("\n".join(f"{base64.b64encode(data).decode()} {rank}" for rank, data in enumerate(tokens)))
    return path


def cut(tokenizer, text):
    table = token_bytes(tokenizer)
    return [table[item].decode() for item in tokenizer(text, add_special_tokens=False)["input_ids"]]


def test_the_pattern_is_recognised_or_required(tmp_path, monkeypatch):
    """A family by name, a pattern, or the hash of a published file; never a guess."""
    import hashlib
    from dataclasses import replace

    path = small_ranks(tmp_path / "some.tiktoken")
    text = "in 1984 and 12345"
    with pytest.raises(BadInputError, match="does not say how text is cut") as caught:
        load_any_tokenizer(str(path))
    assert "some.tiktoken@NAME" in caught.value.hint and "cl100k" in caught.value.hint
    threes = cut(load_any_tokenizer(f"{path}@cl100k"), text)
    assert "198" in threes and "345" not in threes[-1:] and threes[-2:] == ["123", "45"]
    ones = cut(load_any_tokenizer(f"{path}@qwen"), text)
    assert ones[-5:] == list("12345")
    assert cut(load_any_tokenizer(str(path), CL100K_PATTERN), text) == threes
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(FAMILIES, "cl100k", replace(FAMILIES["cl100k"], sha256=(digest,)))
    assert cut(load_any_tokenizer(str(path)), text) == threes
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))  # line ends of another system
    assert cut(load_any_tokenizer(str(path)), text) == threes
    model = path.rename(tmp_path / "tokenizer.model")  # as Llama 3 names it
    llama = load_any_tokenizer(f"{model}@llama3")
    assert cut(llama, text) == threes and (llama.bos_token_id, llama.eos_token_id) == (128000, 128001)


def test_patterns_equal_tiktokens(tmp_path):
    """The whole tokenizer, against the library's own regular expressions."""
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken_ext import openai_public

    ranks = read_ranks(small_ranks(tmp_path / "some.tiktoken"))
    monkey = pytest.MonkeyPatch()
    monkey.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks)
    try:
        for name, build in (
            ("cl100k", openai_public.cl100k_base),
            ("o200k", openai_public.o200k_base),
            ("gpt2", openai_public.r50k_base),
        ):
            theirs = tiktoken.Encoding(name, pat_str=build()["pat_str"], mergeable_ranks=ranks, special_tokens={})
            ours = load_any_tokenizer(f"{tmp_path}/some.tiktoken@{name}")
            for text in [*TEXTS, "in 1984 and 12345", "HelloWorld's camelCase ABCdef", "a\r\n\r\n  b /x\n"]:
                assert ours(text, add_special_tokens=False)["input_ids"] == theirs.encode(text), (name, text)
    finally:
        monkey.undo()
