"""Dynamic tokenization: texts never change, merges equal counting anew, vectors stand where their tokens are."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everytoken.core.errors import BadInputError
from everytoken.core.vocabulary import backend_of
from everytoken.tokenization.base import spell, token_bytes
from everytoken.tokenization.dynamic_tokenization import DynamicTokenizer
from everytoken.tokenization.hyper import MeanEmbedding

from .common import TEXTS, byte_level, hyper_for, model_for, new_tokens, sentencepiece

ANY = st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=3)


# -- merges ------------------------------------------------------------------------------------------------------------
def anew(dynamic, rows, merges):
    """The paper's algorithm on tokens' bytes, counted anew for every merge; special tokens are single objects."""
    table = token_bytes(dynamic.tokenizer)
    rows, done = [[table[item] if table[item] else item for item in row] for row in rows], 0
    while merges is None or done < merges:
        counts = Counter()
        for row in rows:
            for left, right in itertools.pairwise(row):
                if isinstance(left, bytes) and isinstance(right, bytes) and dynamic.valid(left, right):
                    counts[left, right] += 1
        if not counts:
            break
        left, right = max(counts, key=counts.get)
        done += 1
        for number, row in enumerate(rows):
            new, place = [], 0
            while place < len(row):
                if row[place : place + 2] == [left, right]:
                    new.append(left + right)
                    place += 2
                else:
                    new.append(row[place])
                    place += 1
            rows[number] = new
    return rows


@pytest.mark.parametrize("boundary", ["pretoken", "word", "sentence"])
@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@given(texts=ANY | st.just(TEXTS), merges=st.none() | st.integers(0, 30))
def test_merges_equal_counting_anew(make, boundary, texts, merges):
    tokenizer = make()
    dynamic = DynamicTokenizer(tokenizer, merges=10_000 if merges is None else merges, boundary=boundary)
    batch = dynamic(texts)
    wanted = anew(dynamic, batch.base_ids, merges)
    for number, row in enumerate(wanted):
        assert dynamic.spell(batch, number) == [item if isinstance(item, bytes) else b"" for item in row]


@given(texts=ANY, reduction=st.floats(0, 1))
def test_texts_never_change(texts, reduction):
    for make in (byte_level, sentencepiece):
        tokenizer = make()
        dynamic = DynamicTokenizer(tokenizer, reduction=reduction)
        batch = dynamic(texts)
        table = token_bytes(tokenizer)
        for number, base in enumerate(batch.base_ids):
            assert base == tokenizer(texts[number])["input_ids"]
            assert b"".join(dynamic.spell(batch, number)) == spell(tokenizer, base)
            assert [place for place, _ in batch.spans[number]] == [0, *[end for _, end in batch.spans[number]][:-1]]
            for token, (first, end) in zip(batch.tokens[number], batch.spans[number], strict=True):
                data = b"".join(table[item] or b"" for item in base[first:end])
                if token >= 0:
                    assert token == base[first] or table[token] == data
                else:
                    assert b"".join(table[item] or b"" for item in batch.pieces[-1 - token]) == data


def test_no_merges_is_the_identity():
    tokenizer = byte_level()
    model = model_for(tokenizer)
    dynamic = DynamicTokenizer(tokenizer, merges=0, embedder=MeanEmbedding(model))
    batch = dynamic(TEXTS)
    assert batch.tokens == batch.base_ids and not batch.pieces and batch.reduction == 0
    embeds = model.get_input_embeddings()(torch.tensor(batch.base_ids[0]))
    assert torch.equal(batch.inputs_embeds[0][batch.attention_mask[0].bool()], embeds)


def test_full_merging_gives_whole_pretokens():
    tokenizer = byte_level()
    cut = backend_of(tokenizer).pre_tokenizer
    text = "there were 12 helpers, they'd say: how unbelievably helpful the 漢字 café was"
    dynamic = DynamicTokenizer(tokenizer, reduction=1.0)
    batch = dynamic([text])
    pre = [text.encode()[len(text[:a].encode()) : len(text[:b].encode())] for _, (a, b) in cut.pre_tokenize_str(text)]
    assert dynamic.spell(batch, 0) == pre


def test_boundaries():
    tokenizer = byte_level()

    def parts(text, boundary):
        dynamic = DynamicTokenizer(tokenizer, reduction=1.0, boundary=boundary)
        return dynamic.spell(dynamic([text]), 0)

    assert parts("(helpful)", "pretoken") == [b"(", b"helpful", b")"]
    assert parts("(helpful) or", "word") == [b"(helpful)", b" or"]
    assert parts("well\n\nwell", "pretoken") == [b"well", b"\n", b"\n", b"well"]
    assert parts("a    b", "pretoken") == [b"a", b"   ", b" b"] or b"".join(parts("a    b", "pretoken")) == b"a    b"
    one = DynamicTokenizer(tokenizer)
    assert not one.valid(b"\n", b"\n") and one.valid(b" ", b" ") and not one.valid(b"a", b" b")
    assert one.valid(b" \xe6", b"\xbc")  # half a character: nothing to test yet


def test_special_tokens_stay():
    tokenizer = byte_level()
    dynamic = DynamicTokenizer(tokenizer, reduction=1.0, boundary="sentence")
    batch = dynamic([[0, *tokenizer("hello")["input_ids"], 1, 1]])
    assert batch.tokens[0][0] == 0 and batch.tokens[0][-2:] == [1, 1]


# -- targets -----------------------------------------------------------------------------------------------------------
def test_reductions_reach_their_share():
    tokenizer = byte_level()
    base = sum(len(row) for row in DynamicTokenizer(tokenizer, merges=0)(TEXTS).tokens)
    least = sum(len(row) for row in DynamicTokenizer(tokenizer, reduction=1.0)(TEXTS).tokens)
    before = base
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        dynamic = DynamicTokenizer(tokenizer, reduction=share)
        batch = dynamic(TEXTS)
        count = sum(map(len, batch.tokens))
        assert base - count >= share * (base - least) - 1e-6 and count <= before
        if batch.merges:
            fewer = DynamicTokenizer(tokenizer, merges=batch.merges - 1)(TEXTS)
            assert base - sum(map(len, fewer.tokens)) < share * (base - least)
        before = count


def test_a_fitted_table_gives_one_number_of_merges():
    tokenizer = byte_level()
    dynamic = DynamicTokenizer(tokenizer, reduction=0.5).fit(TEXTS, batch_size=2)
    assert dynamic.table[0] == pytest.approx(np.mean([len(tokenizer(text)["input_ids"]) for text in TEXTS]))
    assert (np.diff(dynamic.table) <= 0).all()
    merges = dynamic.merges_for(0.5)
    assert dynamic(TEXTS).merges == merges == DynamicTokenizer(tokenizer, merges=merges)(TEXTS).merges
    assert dynamic.merges_for(0.0) == 0


def test_labels_are_carried():
    tokenizer = byte_level()
    encoded = tokenizer(["unbelievable helpers say"])
    dynamic = DynamicTokenizer(tokenizer, reduction=1.0)
    batch = dynamic(["unbelievable helpers say"])
    assert batch.carry(encoded.word_ids(0), 0) == [0, 1, 2]
    with pytest.raises(BadInputError, match="values"):
        batch.carry([1], 0)


# -- embeddings --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_padded_and_embedded(side):
    tokenizer = byte_level()
    model = model_for(tokenizer)
    hyper = hyper_for(model)
    dynamic = DynamicTokenizer(tokenizer, reduction=1.0, embedder=hyper, padding_side=side)
    for _ in range(2):  # from the cache the second time
        batch = dynamic(TEXTS)
        for number, row in enumerate(batch.tokens):
            mask = batch.attention_mask[number].bool()
            places = mask.nonzero()[:, 0]
            assert int(mask.sum()) == len(row) and int(places[0]) == (0 if side == "right" else len(mask) - len(row))
            for vector, token in zip(batch.inputs_embeds[number][mask], row, strict=True):
                wanted = (
                    hyper.base(torch.tensor([token]))[0]
                    if token >= 0
                    else hyper.embed([batch.pieces[-1 - token]])[0][0]
                )
                assert torch.allclose(vector, wanted, atol=1e-5)
            assert not batch.inputs_embeds[number][~mask].any()
    assert dynamic.cache.hits == dynamic.cache.misses == len(batch.pieces)
    model(inputs_embeds=batch.inputs_embeds, attention_mask=batch.attention_mask)


def test_vocabularies_go_on_merging():
    tokenizer = byte_level()
    table = token_bytes(tokenizer)
    tokens = new_tokens(tokenizer)
    spelled = [b"".join(table[item] for item in pieces) for pieces in tokens]
    assert len(set(spelled)) == len(spelled) > 30 and not set(spelled) & {data for data in table if data}
    assert DynamicTokenizer(tokenizer).vocabulary(TEXTS, 7) == tokens[:7]


# -- bad input and traces ----------------------------------------------------------------------------------------------
def test_traces_show_the_tokens():
    tokenizer = byte_level()
    batch = DynamicTokenizer(tokenizer, reduction=1.0)(TEXTS)
    trace = batch.trace(1, tokenizer)
    assert "".join(trace.texts) == TEXTS[1] and max(trace.columns["pieces in the token"]) > 2
    assert trace.columns["token"][-1] == len(batch.tokens[1]) - 1


def test_bad_input():
    tokenizer = byte_level()
    for make, message in (
        (lambda: DynamicTokenizer(tokenizer, boundary="line"), "boundary"),
        (lambda: DynamicTokenizer(tokenizer, merges=-1), "merges"),
        (lambda: DynamicTokenizer(tokenizer, reduction=30), "share"),
        (lambda: DynamicTokenizer(tokenizer, cache_size=0), "at least one"),
        (lambda: DynamicTokenizer(tokenizer)("one text"), "list of texts"),
        (lambda: DynamicTokenizer(tokenizer)([]), "list of texts"),
        (lambda: DynamicTokenizer(tokenizer)(["a", ""]), "Text 1 has no tokens"),
        (lambda: DynamicTokenizer(tokenizer)([[10**6]]), "outside"),
        (lambda: DynamicTokenizer(tokenizer).merges_for(0.5), "fit"),
    ):
        with pytest.raises(BadInputError, match=message):
            make()
