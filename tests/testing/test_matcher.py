"""The matcher battery over the toy matcher and over compiled grammars."""

from __future__ import annotations

import pytest

from everytoken.constraints.engine.matcher import GrammarMatcher
from everytoken.constraints.logits_processor import letters
from everytoken.testing.matcher import MatcherConformance, ToyMatcher


class TestMatchers(MatcherConformance):
    def matchers(self):
        grammars = {"any": "[^]*", "letters": "(bc|d)*e", "counted": "[b-f]{2,5}"}
        found = {name: (GrammarMatcher(letters(26, regex)), 26) for name, regex in grammars.items()}
        return found | {"toy": (ToyMatcher(13), 13), "toy that ends": (ToyMatcher(40, length=3, end=39), 40)}


class TestABrokenMatcherFails:
    """The battery has teeth: each law is broken once."""

    @pytest.mark.parametrize(
        ("law", "broken"),
        [
            ("test_the_mask_is_what_is_accepted", {"accepts": lambda self, token: True}),
            ("test_rollback_takes_tokens_back", {"rollback": lambda self, count=1: None}),
            ("test_forks_are_independent", {"fork": lambda self: self}),
            ("test_accepts_is_accept_token_without_a_change", {"accepts": ToyMatcher.accept_token}),
        ],
    )
    def test_it(self, law, broken):
        kind = type("Broken", (ToyMatcher,), broken)
        if "fork" not in broken:

            def fork(self):
                other = kind(self.vocab, self.length, self.end)
                other.text = list(self.text)
                return other

            kind.fork = fork
        battery = type("Battery", (MatcherConformance,), {"matchers": lambda self: {"broken": (kind(13), 13)}})()
        with pytest.raises((AssertionError, RecursionError)):
            getattr(battery, law)()
