"""A test bed of a second's training: a small model reads digits and writes some of them in order, one token a digit.

All of them is sorting, with one right answer; some of them leaves the choice open, with many right answers. Whether an
answer is right can be checked, and some of its tokens are harder than others.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...core.rng import derive_seed
from .rollouts import answers
from .small_models import character_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sorting:
    """The task.

    Args:
        given: digits of a question; all different where some are left out.
        written: digits of an answer.
    """

    given: int = 6
    written: int = 6

    def example(self, draw: random.Random) -> tuple[str, str]:
        """A question, and one of its right answers, each as likely as the others."""
        if self.written == self.given:
            digits = [str(draw.randrange(10)) for _ in range(self.given)]
        else:
            digits = list(map(str, draw.sample(range(10), self.given)))
        return "".join(digits) + "=", "".join(sorted(draw.sample(digits, self.written))) + "\n"

    def questions(self, seed: int, name: str, count: int) -> list[str]:
        """``count`` questions of a named set, the same at every call."""
        return [self.example(random.Random(derive_seed(seed, name, number)))[0] for number in range(count)]

    def correct(self, prompt: str, answer: str) -> bool:
        """Whether an answer has the right number of the question's digits, in order."""
        found = answer.strip()
        missing = Counter(found) - Counter(prompt.strip("="))
        return len(found) == self.written and not missing and list(found) == sorted(found)

    def graded(self, prompts: Sequence[str], texts: Sequence[str]) -> list[float]:
        """1 for a right answer, else 0."""
        return [float(self.correct(prompt, text)) for prompt, text in zip(prompts, texts, strict=True)]

    def reward(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        """``graded`` in TRL's form."""
        return self.graded(prompts, completions)

    @property
    def length(self) -> int:
        """Tokens of an answer with its end, and some more, so that longer ones can be wrong."""
        return self.written + 2

    def answered(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], sample: bool
    ) -> list[float]:
        """A model's answers, graded."""
        return self.graded(prompts, answers(model, tokenizer, prompts, self.length, sample))


def tokenizer() -> PreTrainedTokenizerBase:
    """One token a character."""
    return character_tokenizer("0123456789=")
