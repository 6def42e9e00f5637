"""The laws of a ``Matcher``, and a toy matcher that keeps them.

Inherit the battery and give matchers in their initial state::

    class TestMyMatcher(MatcherConformance):
        def matchers(self):
            return {"numbers": (MyMatcher("[0-9]+"), 64)}      # name -> (matcher, vocabulary size)
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

from ..decoding.matcher import Matcher, allocate_token_bitmask, bitmask_to_bool


def allowed_tokens(matcher: Matcher, vocab_size: int) -> list[int]:
    """The tokens that a matcher's bitmask allows next."""
    bitmask = allocate_token_bitmask(1, vocab_size)
    matcher.fill_next_token_bitmask(bitmask, 0)
    return bitmask_to_bool(bitmask, vocab_size)[0].nonzero()[:, 0].tolist()


def random_walks(
    matcher: Matcher, vocab_size: int, walks: int = 8, steps: int = 12, seed: int = 0
) -> Iterator[list[int]]:
    """Texts that a matcher allows, drawn token by token; a text ends where the matcher does."""
    rng = random.Random(seed)
    for _ in range(walks):
        follower = matcher.fork()
        text: list[int] = []
        while len(text) < steps and not follower.is_terminated():
            choices = allowed_tokens(follower, vocab_size)
            if not choices:
                break
            text.append(rng.choice(choices))
            assert follower.accept_token(text[-1]), f"{text[-1]} is in the mask, but not accepted after {text[:-1]}."
        yield text


class MatcherConformance:
    """What every ``Matcher`` promises; every test walks at random through what each matcher allows."""

    def matchers(self) -> dict[str, tuple[Matcher, int]]:
        """Matchers in their initial state with the sizes of their vocabularies, by name."""
        raise NotImplementedError("Say which matchers to test.")

    def states(self) -> Iterator[tuple[Matcher, int, list[int]]]:
        """``(matcher, vocabulary size, text)`` at every place of the walks; changing the matcher changes nothing
        else."""
        for matcher, size in self.matchers().values():
            for text in random_walks(matcher, size):
                follower = matcher.fork()
                yield follower.fork(), size, []
                for place, token in enumerate(text, 1):
                    follower.accept_token(token)
                    yield follower.fork(), size, text[:place]

    def test_the_mask_is_what_is_accepted(self) -> None:
        for matcher, size, text in self.states():
            if matcher.is_terminated():
                continue
            bitmask = allocate_token_bitmask(1, size)
            some_are_forbidden = matcher.fill_next_token_bitmask(bitmask, 0)
            keep = bitmask_to_bool(bitmask, size)[0]
            accepted = torch.tensor([matcher.accepts(token) for token in range(size)])
            assert torch.equal(keep, accepted), f"after {text}"
            assert some_are_forbidden or bool(keep.all()), f"after {text}"

    def test_a_mask_is_written_into_its_own_row_only(self) -> None:
        for matcher, size in self.matchers().values():
            bitmask = allocate_token_bitmask(3, size)
            matcher.fork().fill_next_token_bitmask(bitmask, 1)
            assert bool(bitmask_to_bool(bitmask, size)[[0, 2]].all())
            assert bitmask_to_bool(bitmask, size)[1].nonzero()[:, 0].tolist() == allowed_tokens(matcher.fork(), size)

    def test_accepts_is_accept_token_without_a_change(self) -> None:
        for matcher, size, text in self.states():
            for token in range(size):
                before, expected = matcher.fork(), matcher.accepts(token)
                assert before.accept_token(token) == expected, f"{token} after {text}"
                if not expected and not matcher.is_terminated():  # a refused token changes nothing
                    assert allowed_tokens(before, size) == allowed_tokens(matcher, size), f"{token} after {text}"

    def test_rollback_takes_tokens_back(self) -> None:
        for matcher, size in self.matchers().values():
            for text in random_walks(matcher, size):
                for back in range(1, len(text) + 1):
                    follower, other = matcher.fork(), matcher.fork()
                    for token in text:
                        follower.accept_token(token)
                    for token in text[:-back]:
                        other.accept_token(token)
                    follower.rollback(back)
                    assert follower.is_terminated() == other.is_terminated()
                    assert [follower.accepts(token) for token in range(size)] == [
                        other.accepts(token) for token in range(size)
                    ]
                    for token in text[len(text) - back :]:  # and the same way can be gone again
                        assert follower.accept_token(token)

    def test_forks_are_independent(self) -> None:
        for matcher, size, text in self.states():
            before = [matcher.accepts(token) for token in range(size)]
            choices = [token for token, accepted in enumerate(before) if accepted]
            for token in choices[:3]:
                matcher.fork().accept_token(token)
            assert [matcher.accepts(token) for token in range(size)] == before, f"after {text}"

    def test_a_finished_matcher_accepts_nothing(self) -> None:
        for matcher, size, text in self.states():
            if matcher.is_terminated():
                assert not any(matcher.accepts(token) for token in range(size)), f"after {text}"
                assert not any(matcher.fork().accept_token(token) for token in range(size)), f"after {text}"

    def test_what_must_follow_is_text_and_changes_nothing(self) -> None:
        for matcher, size, text in self.states():
            before = [matcher.accepts(token) for token in range(size)]
            assert isinstance(matcher.find_jump_forward_string(), str)
            assert [matcher.accepts(token) for token in range(size)] == before, f"after {text}"


class ToyMatcher:
    """Tokens alternate between even and odd, starting with even; after ``length`` tokens only ``end`` may follow, if
    there is one.

    Args:
        vocab: tokens.
        length: tokens before the end.
        end: the token that ends the text.
    """

    def __init__(self, vocab: int = 13, length: int | None = None, end: int | None = None):
        self.vocab, self.length, self.end = vocab, length, end
        self.text: list[int] = []

    def allowed(self) -> set[int]:
        """The tokens that may come next."""
        if self.end is not None and self.length is not None and len(self.text) >= self.length:
            return {self.end}
        return {token for token in range(self.vocab) if token % 2 == len(self.text) % 2 and token != self.end}

    def fill_next_token_bitmask(self, bitmask: torch.Tensor, index: int = 0) -> bool:
        bitmask[index] = 0
        for token in self.allowed():
            word = int(bitmask[index, token // 32]) & 0xFFFFFFFF | 1 << token % 32
            bitmask[index, token // 32] = word - (1 << 32) if word >> 31 else word
        return True

    def accepts(self, token_id: int) -> bool:
        return not self.is_terminated() and token_id in self.allowed()

    def accept_token(self, token_id: int) -> bool:
        if not self.accepts(token_id):
            return False
        self.text.append(token_id)
        return True

    def rollback(self, num_tokens: int = 1) -> None:
        del self.text[len(self.text) - num_tokens :]

    def is_terminated(self) -> bool:
        return self.end is not None and self.end in self.text

    def find_jump_forward_string(self) -> str:
        return ""

    def fork(self) -> ToyMatcher:
        other = ToyMatcher(self.vocab, self.length, self.end)
        other.text = list(self.text)
        return other
