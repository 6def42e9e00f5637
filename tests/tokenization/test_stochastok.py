"""StochasTok: text unchanged, exact counts, the split table, the closed-form marginal, annotations."""

from __future__ import annotations

import pickle
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, chisquare
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from everytoken.core.errors import BadInputError
from everytoken.tokenization.base import Retokenized, Retokenizer, spell, token_bytes
from everytoken.tokenization.stochastok import StochasTok, split_table
from everytoken.tokenization.trial import trial_of

TEXTS = [
    "The strawberry has three r's, and 12345 + 678 = 13023.",
    "Grüße aus Zürich, ça va? 你好，世界! 🦜🦜",
    "def f(x):\n\treturn x ** 2  # squares\r\n",
]


@lru_cache
def byte_bpe():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<end>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def sentencepiece_like():
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    for piece in ("▁", "h", "e", "l", "o", "he", "ll", "hell", "▁hell", "▁hello", "lo", "llo"):
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(
        models.BPE(vocab, [("h", "e"), ("l", "l"), ("he", "ll")], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.add_special_tokens(["<unk>"])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def test_contract(embedded_tokenizer):
    """StochasTok keeps the contract, so the contract's trial runs it; what keeps none is refused."""
    method = StochasTok(embedded_tokenizer, expand_prop=1.0)
    assert isinstance(method, Retokenizer)
    assert trial_of(StochasTok) == "everytoken.tokenization.trials.retokenizer"
    ids = embedded_tokenizer("strawberries")["input_ids"]
    new = method.expand(ids, seed=0)
    assert isinstance(new, Retokenized) and new.ids.dtype == np.int64 and len(new.ids) == len(new.source) > len(ids)
    assert spell(embedded_tokenizer, new.ids) == b"strawberries"
    with pytest.raises(BadInputError, match="keeps no contract"):
        trial_of(dict)


# -- bytes -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", TEXTS)
def test_token_bytes_spell_the_text(text, embedded_tokenizer):
    for tokenizer in (embedded_tokenizer, byte_bpe()):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert spell(tokenizer, getattr(ids, "ids", ids)) == text.encode()


@lru_cache
def loaded_once():
    from everytoken.core.loading import load_tokenizer

    return load_tokenizer()


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=60, deadline=None)
@pytest.mark.slow
def test_any_text_is_spelt_by_its_tokens(text):
    tokenizer = loaded_once()
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    # this vocabulary lacks a few bytes (those that open planes of unassigned characters), and the tokenizer drops them
    assume(
        set(text.encode()) <= {piece[0] for piece in token_bytes(tokenizer) if piece is not None and len(piece) == 1}
    )
    assert spell(tokenizer, ids) == text.encode("utf-8", "surrogatepass")


def test_sentencepiece_bytes():
    tokenizer = sentencepiece_like()
    table = token_bytes(tokenizer)
    vocab = tokenizer.get_vocab()
    assert table[vocab["▁hello"]] == b" hello"
    assert table[vocab["<0x20>"]] == b" "
    assert table[vocab["<unk>"]] is None
    pairs = StochasTok(tokenizer).table.pairs(vocab["▁hell"])
    assert (vocab["▁"], vocab["hell"]) in pairs
    # the byte token of a space spells a space, but texts never have it: a model has not learned it
    assert (vocab["<0x20>"], vocab["hell"]) not in pairs


def test_unknown_decoder_is_refused():
    with pytest.raises(BadInputError, match="spells"):
        token_bytes(Tokenizer(models.WordLevel({"a": 0}, "a")))
    with pytest.raises(BadInputError, match="fast"):
        token_bytes(object())


# -- the table ---------------------------------------------------------------------------------------------------------
@given(st.lists(st.one_of(st.none(), st.binary(max_size=4)), max_size=25))
@settings(deadline=None)
def test_table_equals_brute_force(vocabulary):
    table = split_table(vocabulary)
    for token, piece in enumerate(vocabulary):
        expected = [
            (a, c)
            for a, left in enumerate(vocabulary)
            for c, right in enumerate(vocabulary)
            if piece and left and right and left + right == piece
        ]
        assert sorted(table.pairs(token)) == sorted(expected)


def test_single_bytes_and_specials_never_split(embedded_tokenizer):
    stochastok = StochasTok(embedded_tokenizer)
    table = token_bytes(embedded_tokenizer)
    for token, piece in enumerate(table):
        if piece is None or len(piece) == 1:
            assert stochastok.table.pairs(token) == []
    for special in embedded_tokenizer.all_special_ids:
        assert table[special] is None
        assert special not in stochastok.table.left
        assert special not in stochastok.table.right


# -- the algorithm -----------------------------------------------------------------------------------------------------
@given(st.text(max_size=80), st.floats(0, 3), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_text_unchanged_and_length_grows_by_the_splits(text, prop, seed):
    tokenizer = byte_bpe()
    ids = tokenizer.encode(text).ids
    stochastok = StochasTok(tokenizer, expand_prop=prop)
    new = stochastok.expand(ids, seed)
    assert spell(tokenizer, new.ids) == text.encode("utf-8", "surrogatepass")
    assert tokenizer.decode(new.ids.tolist()) == tokenizer.decode(ids)
    assert 0 <= len(new.ids) - len(ids) <= int(prop * len(ids))
    assert (np.diff(new.source) >= 0).all()
    for index, token in enumerate(ids):  # each old token is spelt by the new ones that came from it
        assert spell(tokenizer, new.ids[new.source == index]) == spell(tokenizer, [token])
    assert new.ids.tolist() == stochastok.expand(ids, seed).ids.tolist()


def test_growth_is_exactly_the_number_of_expansions():
    """As long as every token is splittable every attempt is an expansion; a fully split token ends the growth."""
    tokenizer = byte_bpe()
    table = token_bytes(tokenizer)
    stochastok = StochasTok(tokenizer, expand_prop=0.37)
    splits = [len(stochastok.table.pairs(token)) for token in range(len(table))]
    deep = max(range(len(table)), key=lambda token: (splits[token] > 0) * len(table[token] or b""))
    assert len(stochastok.expand([deep] * 10, 0).ids) == 10 + 3
    spelt = StochasTok(tokenizer, expand_prop=500.0).expand([deep], 0)
    assert len(spelt.ids) == len(table[deep])  # single bytes, and no further


def test_zero_is_the_identity_and_empty_input_is_fine(embedded_tokenizer):
    ids = embedded_tokenizer(TEXTS[0])["input_ids"]
    assert StochasTok(embedded_tokenizer, expand_prop=0.0)(ids) == ids
    assert StochasTok(embedded_tokenizer)([]) == []
    assert StochasTok(embedded_tokenizer, expand_prop=5.0, max_expansions=3).expand(ids, 1).ids.size == len(ids) + 3


def test_same_seed_same_output(embedded_tokenizer):
    ids = embedded_tokenizer(TEXTS[0] * 5)["input_ids"]
    runs = [StochasTok(embedded_tokenizer, seed=7) for _ in range(2)]
    assert [runs[0](ids) for _ in range(3)] == [runs[1](ids) for _ in range(3)]
    assert runs[0](ids) != runs[0](ids)  # the stream goes on: fresh splits each time


@pytest.mark.parametrize(("n", "prop"), [(5, 0.8), (12, 0.5), (30, 0.1)])
def test_marginal_probability_of_a_split_matches_the_closed_form(n, prop):
    """One splittable token (into single bytes) among n - 1 unsplittable ones.

    Every attempt hits it with chance 1/n until it splits, so P(split) = 1 - (1 - 1/n)^floor(p n).
    """
    vocabulary = [b"a", b"b", b"ab"]
    stochastok = StochasTok.__new__(StochasTok)
    stochastok.expand_prop, stochastok.max_expansions, stochastok.table = prop, None, split_table(vocabulary)
    stochastok._rng = np.random.default_rng(0)
    ids = [0] * (n - 1)
    ids.insert(n // 2, 2)
    trials = 20_000
    split = sum(len(stochastok.expand(ids).ids) > n for _ in range(trials))
    expected = 1 - (1 - 1 / n) ** int(prop * n)
    assert binomtest(split, trials, expected).pvalue > 1e-4


def test_distribution_equals_a_literal_implementation():
    """Chi-square of whole outcomes against the algorithm written with list insertions, enumerated exactly."""
    vocabulary = [b"a", b"b", b"ab", b"abab", b"aba", b"ba"]
    table = split_table(vocabulary)

    def outcomes(sequence, attempts):
        if not attempts:
            return {tuple(sequence): 1.0}
        total: dict[tuple, float] = {}
        for position, token in enumerate(sequence):
            pairs = table.pairs(token)
            branches = [sequence[:position] + list(p) + sequence[position + 1 :] for p in pairs] or [sequence]
            for branch in branches:
                for result, chance in outcomes(branch, attempts - 1).items():
                    total[result] = total.get(result, 0) + chance / len(sequence) / len(branches)
        return total

    ids = [3, 0, 2]
    exact = outcomes(ids, 3)
    stochastok = StochasTok.__new__(StochasTok)
    stochastok.expand_prop, stochastok.max_expansions, stochastok.table = 1.0, None, table
    stochastok._rng = np.random.default_rng(1)
    draws, counts = 30_000, dict.fromkeys(exact, 0)
    for _ in range(draws):
        counts[tuple(stochastok.expand(ids).ids.tolist())] += 1
    keys = list(exact)
    assert chisquare([counts[k] for k in keys], [exact[k] * draws for k in keys]).pvalue > 1e-4


# -- annotations -------------------------------------------------------------------------------------------------------
def test_annotations_follow_both_parts(embedded_tokenizer):
    encoded = embedded_tokenizer(TEXTS[0], return_offsets_mapping=True)
    ids = encoded["input_ids"]
    example = {
        "input_ids": ids,
        "attention_mask": encoded["attention_mask"],
        "labels": [-100] * 4 + ids[4:],
        "offset_mapping": encoded["offset_mapping"],
        "title": "kept as it is",
    }
    stochastok = StochasTok(embedded_tokenizer, expand_prop=0.6, seed=3)
    out = stochastok.annotated(example)
    assert len({len(out[name]) for name in ("input_ids", "attention_mask", "labels", "offset_mapping")}) == 1
    assert len(out["input_ids"]) > len(ids)
    assert out["title"] == "kept as it is"
    for token, label, offset in zip(out["input_ids"], out["labels"], out["offset_mapping"], strict=True):
        assert label in (-100, token)
        assert offset in example["offset_mapping"]
    assert spell(embedded_tokenizer, [x for x in out["labels"] if x != -100]) == spell(embedded_tokenizer, ids[4:])


def test_batches_and_datasets(embedded_tokenizer):
    stochastok = StochasTok(embedded_tokenizer, expand_prop=0.5)
    encoded = dict(embedded_tokenizer(TEXTS))
    out = stochastok.batch(encoded)
    assert [embedded_tokenizer.decode(row) for row in out["input_ids"]] == TEXTS
    assert [len(row) for row in out["input_ids"]] == [len(row) for row in out["attention_mask"]]
    assert len(stochastok(encoded["input_ids"])) == 3


def test_collator_splits_anew_and_is_picklable(embedded_tokenizer):
    from transformers import DataCollatorForLanguageModeling

    collate = StochasTok(embedded_tokenizer, expand_prop=0.5).collator(
        DataCollatorForLanguageModeling(embedded_tokenizer, mlm=False)
    )
    examples = [{"input_ids": embedded_tokenizer(text)["input_ids"]} for text in TEXTS]
    first, second = collate(examples), collate(examples)
    assert first["input_ids"].shape == first["labels"].shape
    assert first["input_ids"].tolist() != second["input_ids"].tolist()
    pickle.loads(pickle.dumps(collate))


def test_bad_input(embedded_tokenizer):
    for bad in (-0.1, float("nan"), float("inf")):
        with pytest.raises(BadInputError, match="expand_prop"):
            StochasTok(embedded_tokenizer, expand_prop=bad)
    with pytest.raises(BadInputError, match="another tokenizer"):
        StochasTok(embedded_tokenizer).expand([10**6])
    with pytest.raises(BadInputError, match="one sequence"):
        StochasTok(embedded_tokenizer).expand([[1, 2]])
    with pytest.raises(BadInputError, match="max_expansions"):
        StochasTok(embedded_tokenizer, max_expansions=-1)
