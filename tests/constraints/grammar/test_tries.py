"""Automata of words and tries of names against plain Python, on short words over few letters."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from everytoken.constraints.grammar.automata import trie
from everytoken.constraints.grammar.automaton import run_starts
from everytoken.constraints.grammar.tries import name_tries

WORDS = st.binary(max_size=5).map(lambda word: bytes(97 + byte % 3 for byte in word))


def residuals(words: set[bytes]) -> set[frozenset[bytes]]:
    """What may follow each beginning of a word: the minimal automaton has a state for each."""
    beginnings = {word[:size] for word in words for size in range(len(word) + 1)} | {b""}
    return {frozenset(word[len(b) :] for word in words if word.startswith(b)) for b in beginnings}


@given(st.sets(WORDS, max_size=12))
@settings(max_examples=60, deadline=None)
def test_words_are_accepted_by_as_few_states_as_there_are_ways_on(words):
    automaton = trie(words)
    assert len(automaton) == len(residuals(words))
    for size in range(4):
        for letters in itertools.product(b"abc", repeat=size):
            assert automaton.matches(bytes(letters)) == (bytes(letters) in words)
    assert all(automaton.matches(word) for word in words)
    assert all(list(edges) == sorted(edges) for edges in automaton.edges)


@given(st.lists(st.tuples(WORDS, st.booleans()), min_size=1, max_size=7, unique_by=lambda pair: pair[0]))
@settings(max_examples=60, deadline=None)
def test_at_each_place_the_names_up_to_the_next_required_one_may_follow(pairs):
    names = [word + b'"' for word, _ in pairs]
    required = [needed for _, needed in pairs]
    data, ptr = np.frombuffer(b"".join(names), np.uint8), run_starts([len(name) for name in names])
    roots, source, byte, target, size = name_tries(data, ptr, np.array(required))
    edges = dict(zip(zip(source.tolist(), byte.tolist(), strict=True), target.tolist(), strict=True))
    assert len(edges) == len(source)
    assert roots[-1] == -1
    assert max(source) < size
    for place in range(len(names)):
        stop = next((n for n in range(place, len(names)) if required[n]), len(names) - 1)
        for n, name in enumerate(names):
            here = int(roots[place])
            for symbol in name:
                here = edges.get((here, symbol), -100) if here >= 0 else -100
            assert (here == -1 - n) == (place <= n <= stop)
