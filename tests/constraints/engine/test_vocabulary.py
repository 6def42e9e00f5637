"""TokenizerInfo: exact bytes for tokenizers of several families, and the trie against the plain list of tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from everytoken.constraints.engine.vocabulary import TokenizerInfo
from everytoken.core.errors import BadInputError


def byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(alphabet)} | {"Ġthe": 256, "Ã©": 257, "<eos>": 258}
    tokenizer = Tokenizer(models.BPE(vocab, [("Ã", "©")]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


def sentencepiece():
    vocab = (
        {"<unk>": 0, "</s>": 1}
        | {f"<0x{byte:02X}>": byte + 2 for byte in range(256)}
        | {"▁the": 258, "é": 259, "▁": 260}
    )
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return tokenizer


def wordpiece():
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "##re": 2, "é": 3, "[SEP]": 4}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]", "[SEP]"])
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "stop", "expected"),
    [
        (byte_level(), 258, {256: b" the", 257: "é".encode(), 258: None}),
        (sentencepiece(), 1, {258: b" the", 259: "é".encode(), 260: b" ", 2 + 0xC3: b"\xc3", 0: None, 1: None}),
        (wordpiece(), 4, {1: b" the", 2: b"re", 3: " é".encode(), 4: None}),
    ],
)
def test_families(tokenizer, stop, expected):
    info = TokenizerInfo.from_huggingface(tokenizer, stop_token_ids=[stop])
    for index, token in expected.items():
        assert info.vocabulary[index] == token
    assert info.stop_token_ids == [stop]


def test_the_embedded_tokenizer_and_padding(embedded_tokenizer):
    info = TokenizerInfo.from_huggingface(embedded_tokenizer, 49_280)
    assert info.vocab_size == 49_280 and len(info.vocabulary) == 49_152 and info.words == 1540
    ids = embedded_tokenizer("naïve 😀 \t\n x")["input_ids"]
    assert b"".join(info.vocabulary[i] for i in ids).decode() == "naïve 😀 \t\n x"


def test_tiktoken_ranks():
    info = TokenizerInfo.from_tiktoken({b"a": 0, b"\xc3": 1, b"ab": 2}, [3])
    assert info.vocabulary == [b"a", b"\xc3", b"ab", None] and info.stop_token_ids == [3]


@given(st.lists(st.binary(max_size=5), min_size=1, max_size=40), st.data())
def test_the_trie_holds_every_token_once(tokens, data):
    if not any(tokens):
        return
    info = TokenizerInfo(tokens)

    def spelled(trie):
        byte_of, depth, skip, pointer, ids = trie.byte, trie.depth, trie.skip, trie.token_ptr, trie.token_ids
        path, found = [], {}
        for node in range(len(byte_of)):
            del path[depth[node] - 1 :]
            path.append(int(byte_of[node]))
            for token in ids[pointer[node] : pointer[node + 1]].tolist():
                assert token not in found
                found[token] = bytes(path)
            inside = [other for other in range(node + 1, len(byte_of)) if other < skip[node]]
            assert all(depth[other] > depth[node] for other in inside)
            assert skip[node] == len(byte_of) or depth[skip[node]] <= depth[node]
        return found

    whole = spelled(info.trie)
    assert whole == {index: token for index, token in enumerate(tokens) if token}
    ends = [node for node in range(len(info.trie.byte)) if info.trie.token_ptr[node] < info.trie.token_ptr[node + 1]]
    chosen = sorted(data.draw(st.sets(st.sampled_from(ends), min_size=1)))
    smaller = info.part(np.array(chosen, np.int32))
    part = spelled(smaller)
    wanted = {
        token
        for node in chosen
        for token in info.trie.token_ids[info.trie.token_ptr[node] : info.trie.token_ptr[node + 1]].tolist()
    }
    assert part == {token: whole[token] for token in wanted}
    ends = [node for node in range(len(smaller.byte)) if smaller.token_ptr[node] < smaller.token_ptr[node + 1]]
    last = ends[-1:]  # a part of a part
    wanted = smaller.token_ids[smaller.token_ptr[last[0]] : smaller.token_ptr[last[0] + 1]].tolist()
    assert spelled(info.part(np.array(last, np.int32), smaller)) == {token: whole[token] for token in wanted}


def test_fingerprints_differ():
    assert TokenizerInfo([b"a", b"b"]).fingerprint != TokenizerInfo([b"ab", b""]).fingerprint
    assert TokenizerInfo([b"a", b"b"], [1]).fingerprint != TokenizerInfo([b"a", b"b"]).fingerprint
    assert TokenizerInfo([b"a"]).fingerprint == TokenizerInfo([b"a"]).fingerprint


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenizerInfo([]), "empty"),
        (lambda: TokenizerInfo([None, b""]), "empty"),
        (lambda: TokenizerInfo([b"a"], [7]), "outside the vocabulary"),
        (lambda: TokenizerInfo([b"a", b"b", b"c"], vocab_size=2), "belongs to the model"),
        (lambda: TokenizerInfo.from_tiktoken({}), "empty"),
        (lambda: TokenizerInfo.from_huggingface(byte_level()), "no EOS"),
        (
            lambda: TokenizerInfo.from_huggingface(Tokenizer(models.WordLevel({"a": 0}, "a")), stop_token_ids=[0]),
            "how this tokenizer",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(BadInputError, match=message):
        make()
