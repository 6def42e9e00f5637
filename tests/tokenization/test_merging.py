"""Pair merges kept up to date equal pair merges counted anew."""

from __future__ import annotations

import itertools
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from everytoken.tokenization.merging import PairMerger

ROWS = st.lists(st.lists(st.integers(0, 2), max_size=30), min_size=1, max_size=4)


class Names:
    """Numbers of tokens by what they spell, so that two ways to spell one token meet."""

    def __init__(self):
        self.spelled = {i: chr(97 + i) for i in range(3)}
        self.numbers = {text: i for i, text in self.spelled.items()}

    def join(self, pair):
        text = self.spelled[pair[0]] + self.spelled[pair[1]]
        number = self.numbers.setdefault(text, len(self.numbers))
        self.spelled[number] = text
        return number


def counted_anew(rows, merges, names, allowed=lambda text: True):
    """The definition: count all, take the most frequent (the first of equals), replace left to right."""
    rows, done = [list(row) for row in rows], []
    while len(done) < merges:
        counts = Counter()
        for row in rows:
            pairs = itertools.pairwise(row)
            counts.update(pair for pair in pairs if allowed(names.spelled[pair[0]] + names.spelled[pair[1]]))
        if not counts:
            break
        best = max(counts, key=counts.get)
        done.append((best, counts[best]))
        token = names.join(best)
        for number, row in enumerate(rows):
            new, place = [], 0
            while place < len(row):
                if tuple(row[place : place + 2]) == best:
                    new.append(token)
                    place += 2
                else:
                    new.append(row[place])
                    place += 1
            rows[number] = new
    return rows, done


def kept_up(rows, merges, names, allowed=lambda text: True):
    merger, done = PairMerger(rows), []
    while len(done) < merges:
        pair = merger.best()
        if pair is None:
            break
        if not allowed(names.spelled[pair[0]] + names.spelled[pair[1]]):
            merger.discard()
            continue
        done.append((pair, merger.count))
        merger.merge(names.join(pair))
    return merger, done


@given(ROWS, st.integers(0, 40))
def test_merges_equal_counting_anew(rows, merges):
    wanted, order = counted_anew(rows, merges, Names())
    merger, done = kept_up(rows, merges, Names())
    assert done == order  # the same pairs in the same order, with the same counts
    assert [tokens for tokens, _ in merger.rows()] == wanted
    assert merger.length == sum(map(len, wanted))


@given(ROWS, st.integers(0, 40))
def test_pairs_that_are_not_allowed(rows, merges):
    def allowed(text):
        return "ab" not in text or len(text) > 3

    wanted, order = counted_anew(rows, merges, Names(), allowed)
    merger, done = kept_up(rows, merges, Names(), allowed)
    assert done == order and [tokens for tokens, _ in merger.rows()] == wanted


@given(ROWS)
def test_spans_hold_the_old_tokens(rows):
    names = Names()
    merger, _ = kept_up(rows, 10, names)
    for old, (tokens, starts) in zip(rows, merger.rows(), strict=True):
        ends = [*starts[1:], len(old)] if old else []
        for token, first, end in zip(tokens, starts, ends, strict=True):
            assert names.spelled[token] == "".join(names.spelled[item] for item in old[first:end])


def test_overlapping_pairs_and_ties():
    merger = PairMerger([[7, 7, 7, 7, 7]])
    assert merger.best() == (7, 7) and merger.count == 4
    merger.merge(8)
    assert merger.rows() == [([8, 8, 7], [0, 2, 4])]
    merger = PairMerger([[1, 2], [3, 4], [3, 4], [1, 2]])
    assert merger.best() == (1, 2)  # as frequent as (3, 4), and first


def test_nothing_to_merge():
    for rows in ([], [[]], [[1], [2]]):
        merger = PairMerger(rows)
        assert merger.best() is None and [tokens for tokens, _ in merger.rows()] == rows
