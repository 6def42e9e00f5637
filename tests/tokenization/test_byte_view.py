"""A tokenizer by its bytes: what is settled stays, every beginning is found, unfinished characters."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from everytoken.core.errors import BadInputError
from everytoken.tokenization.byte_view import ByteView, split_character

from .families import LOSSLESS, family


@pytest.mark.parametrize("name", LOSSLESS)
@given(st.text(alphabet="hel wo'ts12.\né😀", max_size=14), st.text(alphabet="hel wo'ts12.\né😀", max_size=8))
def test_what_is_settled_stays(name, text, more):
    view = ByteView.of(family(name))
    data = view.spelled(text)
    assume(data + more.encode() != view.lead)  # no text
    cut = view.settled(data)
    assume(view.encode(data + more.encode()) is not None)
    before = view.encode(data[:cut]) if cut else []
    longer = view.encode(data + more.encode())
    assert longer[: len(before)] == before
    assert longer[len(before) :] == view.encode((data + more.encode())[cut:]) or cut == 0


@pytest.mark.parametrize("name", LOSSLESS)
@given(st.text(alphabet="hel wo'ts12.\né😀𝟘\u3000", min_size=1, max_size=12), st.data())
def test_every_beginning_of_an_encoding_is_found(name, text, data):
    view = ByteView.of(family(name))
    spelled = view.spelled(text)
    tokens = view.encode(spelled)
    size = data.draw(st.integers(0, len(tokens)))
    head = b"".join(view.bytes[t] for t in tokens[:size])
    assert tuple(tokens[:size]) in view.beginnings(head) and view.begins(tokens[:size])
    assert b"".join(view.bytes[t] for t in tokens) == spelled


def test_tokens_by_their_bytes(embedded_tokenizer):
    view = ByteView(embedded_tokenizer)
    for data in (b"", b" wor", b"\xf0", b"no such token in any vocabulary"):
        ids, after = view.starting_with(data)
        wanted = {
            i: (t[len(data)] if len(t) > len(data) else -1)
            for i, t in enumerate(view.bytes)
            if t and t.startswith(data)
        }
        assert dict(zip(ids.tolist(), after.tolist(), strict=True)) == wanted


@given(st.binary(max_size=6))
def test_unfinished_characters(data):
    parts = split_character(data)
    completions = [b"", *(bytes([a, *rest]) for a in range(0x80, 0xC0) for rest in ((), (0x80,), (0x80, 0x80)))]
    possible = False
    for more in completions:
        try:
            (data + more).decode()
            possible = True
        except UnicodeDecodeError:
            continue
    assert (parts is not None) == possible
    if parts is not None:
        assert parts[0] + parts[1] == data and parts[0].decode() is not None


def test_a_tokenizer_that_changes_texts_is_refused():
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    lossy = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    lossy.normalizer, lossy.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    lossy.decoder = decoders.WordPiece()
    with pytest.raises(BadInputError, match="does not keep the text"):
        ByteView(lossy)
