"""What the kernels find out about nodes beforehand."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from everytoken.constraints.grammar import Grammar

from ..common import compile_


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from(["[a-y]", "[a-z]", "[^\\x22]", "[^]", "é", "x"]), st.integers(0, 4), st.booleans()),
        min_size=1,
        max_size=4,
    )
)
def test_steady_runs_never_promise_too_much(parts):
    """Every text of plain (and, where wide, non-ASCII) characters as long as a node's run can be read from it."""
    pattern = "".join(f"{item}{{{low},}}" if endless else f"{item}{{{low},{low + 1}}}" for item, low, endless in parts)
    tables = compile_(Grammar.from_regex(pattern)).pushdown.tables
    edge_ptr, lows, highs, targets = tables.edge_ptr, tables.edge_lo, tables.edge_hi, tables.edge_to
    plain, wide, run = tables.plain, tables.wide, tables.run

    def read(nodes, data):
        for byte in data:
            nodes = {
                int(targets[e])
                for n in nodes
                for e in range(edge_ptr[n], edge_ptr[n + 1])
                if lows[e] <= byte <= highs[e]
            }
        return nodes

    rng = random.Random(0)
    for node in range(len(run)):
        characters = [bytes([b]) for b in range(256) if int(plain[node, b >> 6]) >> (b & 63) & 1]
        if wide[node]:
            characters = [c for c in characters if c < b"\x80"] + ["é".encode(), "漢".encode(), "😀".encode()]
        assert (run[node] > 0) == (edge_ptr[node] < edge_ptr[node + 1])
        for _ in range(8 if run[node] > 0 else 0):
            assert read({node}, b"".join(rng.choices(characters, k=min(int(run[node]), 12))))
