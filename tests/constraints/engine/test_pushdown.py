"""A grammar's tables: damaged ones are refused, and where rules return to."""

from __future__ import annotations

import json

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from everytoken.constraints.engine.compiled import CompiledGrammar
from everytoken.constraints.engine.matcher import GrammarMatcher
from everytoken.constraints.grammar import Grammar, GrammarError
from everytoken.core.errors import BadInputError

from ..common import ABC, BYTES, compile_
from ..oracle import ebnf, grammars, productive


@given(st.binary(min_size=4, max_size=60))
def test_damaged_tables_never_reach_the_kernels(noise):
    import base64

    content = json.loads(compile_(Grammar.from_choices(["ab", "ac"])).serialise())
    tables = json.loads(content["pushdown"])
    raw = bytearray(base64.b64decode(tables["edge_to"]))
    raw[: len(noise)] = noise[: len(raw)]
    tables["edge_to"] = base64.b64encode(bytes(raw)).decode()
    content["pushdown"] = json.dumps(tables)
    try:
        compiled = CompiledGrammar.deserialise(json.dumps(content), BYTES)
    except BadInputError:
        return
    GrammarMatcher(compiled).allowed_tokens()  # harmless numbers


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(grammars(), st.randoms(use_true_random=False))
def test_returns_are_where_texts_go_on(trees, rng):
    """Every frame met on random texts returns to a place that was foretold for the rule above it."""
    assume(productive(trees))
    try:
        compiled = compile_(ebnf(trees), ABC)
    except GrammarError:
        return
    matcher = GrammarMatcher(compiled)
    for _ in range(6):
        stacks, arena = matcher._step.state.stacks, matcher._arena
        for node, frame in zip(stacks[::2], stacks[1::2], strict=True):
            while True:
                to = int(arena.frame_node[frame]) if frame >= 0 else -1
                assert to in compiled.pushdown.returns(node)
                if frame < 0:
                    break
                node, frame = to, int(arena.frame_parent[frame])
        allowed = sorted(set(matcher.allowed_tokens().tolist()) - {0})
        if not allowed:
            break
        assert matcher.accept_token(rng.choice(allowed))
