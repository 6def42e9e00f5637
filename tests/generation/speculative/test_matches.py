"""Continuations found in the text: against brute force over all places, and how far they are believed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everytoken.core.errors import BadInputError
from everytoken.generation.speculative.matches import Corpus, TextMatches, corpus_tokens

tokens = st.integers(0, 3)


def by_hand(texts, suffix, longest):
    """The estimate for every continuation, place by place."""
    places = []  # (agreeing tokens, what follows)
    for text in texts:
        for place in range(1, len(text)):
            agreeing = 0
            while agreeing < min(longest, place, len(suffix)) and text[place - 1 - agreeing] == suffix[-1 - agreeing]:
                agreeing += 1
            if agreeing:
                places.append((agreeing, text[place]))
    chances = {token: 0.0 for _, token in places}
    for length in range(1, max((agreeing for agreeing, _ in places), default=0) + 1):
        following = [token for agreeing, token in places if agreeing >= length]
        different = len(set(following))
        chances = {
            token: (following.count(token) + different * chance) / (len(following) + different)
            for token, chance in chances.items()
        }
    return chances


@given(
    text=st.lists(tokens, min_size=1, max_size=20),
    corpus=st.lists(st.lists(tokens, max_size=8), max_size=3),
    path=st.lists(tokens, max_size=4),
    longest=st.integers(1, 5),
)
@settings(max_examples=150, deadline=None)
def test_estimates_are_those_of_all_places(text, corpus, path, longest):
    matches = TextMatches(vocab=4, corpus=Corpus(corpus), longest=longest)
    matches.commit(text)
    found, chances, _ = matches._continuations(matches._suffix(path))
    expected = by_hand([text, *corpus], [*text, *path], longest)
    assert dict(zip(found.tolist(), chances.tolist(), strict=True)) == pytest.approx(expected)
    assert sum(expected.values()) <= 1 + 1e-9


def test_candidates_fall_and_follow_the_path():
    matches = TextMatches(vocab=10)
    matches.commit([1, 2, 3, 1, 2, 3, 1, 2, 4, 9, 1, 2])
    tokens, chances = matches.candidates([], 8)
    assert tokens[:2] == [3, 4]
    assert chances == sorted(chances, reverse=True)
    assert sum(chances) <= 1
    assert matches.candidates([4], 8)[0] == [9]
    assert matches.candidates([], 1)[0] == [3]
    assert matches.candidates([7], 8) == ([], [])


def test_the_text_grows_in_place():
    matches = TextMatches(vocab=1000)
    matches.commit(list(range(200)))
    for token in range(200, 700):
        matches.commit([token])
    assert matches.text.tokens[: matches.text.size].tolist() == list(range(700))


def test_belief_follows_what_came():
    """A text that repeats itself is believed more and more, one that contradicts itself less and less."""

    def chance(text):
        matches = TextMatches(vocab=50, longest=1)
        matches.commit(text[:2])
        matches.commit(text[2:])
        return matches.candidates([], 1)[1][0]

    faithful = [1, 2] * 20 + [1]
    fickle = [item for pair in zip([1] * 20, range(2, 22), strict=True) for item in pair] + [1]
    assert chance(faithful) > 0.6
    assert chance(fickle) < 0.05


def test_a_corpus_ends_each_text():
    """No continuation reaches from one text of a corpus into the next, and tokens that the model lacks are left out."""
    matches = TextMatches(vocab=8, corpus=Corpus([[5, 6], [7, 1], [6, 9]]))
    matches.commit([6])
    assert matches.candidates([], 4) == ([], [])
    assert matches.candidates([7], 4)[0] == [1]


def test_corpora(tmp_path):
    class Tokenizer:
        def __call__(self, text, add_special_tokens):
            assert not add_special_tokens
            return {"input_ids": [len(word) for word in text.split()]}

    path = tmp_path / "corpus.txt"
    path.write_text("a bb\nccc")
    assert corpus_tokens(path, Tokenizer()) == [[1, 2, 3]]
    assert corpus_tokens(["a bb", "ccc"], Tokenizer()) == [[1, 2], [3]]
    assert corpus_tokens([np.array([4, 5]), [6]]) == [[4, 5], [6]]
    with pytest.raises(BadInputError, match="prepare"):
        corpus_tokens(["a bb"])
    with pytest.raises(BadInputError, match="tokens of texts"):
        corpus_tokens([{"text": "a"}])
    with pytest.raises(BadInputError, match="no file"):
        corpus_tokens(tmp_path / "absent.txt", Tokenizer())


def test_one_agreeing_token_is_not_searched_where_it_cannot_pay(monkeypatch):
    matches = TextMatches(vocab=10)
    matches.commit([1, 2, 3, 4, 2])
    assert matches.candidates([], 4)[0] == [3]
    matches.begin(0.3)
    with monkeypatch.context() as patched:
        patched.setattr(matches, "_continuations", None)  # not even looked at
        assert matches.candidates([], 4) == ([], [])
        matches.commit([5])
    matches.begin(0.3)
    assert matches.candidates([1, 2], 4)[0] == [3]
    matches.commit([1, 2])
    matches.begin(0.3)
    assert matches.candidates([], 4)[0][0] == 3


def test_a_search_of_the_round_is_remembered_when_its_token_comes(monkeypatch):
    matches = TextMatches(vocab=10)
    matches.commit([1, 2, 3, 1, 2])
    matches.begin()
    assert matches.candidates([], 4)[0] == [3]
    before = matches.right[2]
    with monkeypatch.context() as patched:
        patched.setattr(matches, "_continuations", None)
        matches.commit([3])
    assert matches.right[2] == before + 1
