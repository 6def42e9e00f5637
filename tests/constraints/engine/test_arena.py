"""The buffers that matchers share."""

from __future__ import annotations

from everytoken.constraints.engine.matcher import GrammarMatcher

from ..common import compile_


def test_buffers_are_renewed_not_grown_for_ever(monkeypatch):
    import everytoken.constraints.engine.arena as module

    compiled = compile_('root ::= "(" root ")" root | ""')
    monkeypatch.setattr(module, "RENEW_STATES", 50)
    first = compiled.arena()
    matcher = GrammarMatcher(compiled)
    for _ in range(200):
        assert matcher.accept_string("(")
    assert compiled.arena() is not first
    assert matcher.accept_string(")" * 200) and matcher.can_end()  # the old one serves who holds it
