"""A test bed of a second's training: a small model reads digits and writes some of them in order, one token a digit.

All of them is sorting, with one right answer; some of them leaves the choice open, with many right answers. Whether an
answer is right can be checked, and some of its tokens are harder than others.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ...core.results import mean
from ...core.rng import derive_seed
from .rollouts import Learner, Size, answers, learnt, warmed_up
from .small_models import character_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..base import Context


class Sample(NamedTuple):
    """An answer, 1 where it is right and else 0, and ``-log p`` of it."""

    text: str
    right: float
    surprise: float


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

    def texts(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], sample: bool
    ) -> list[str]:
        """A model's answers."""
        return answers(model, tokenizer, prompts, self.length, sample)

    def answered(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], sample: bool
    ) -> list[float]:
        """A model's answers, graded."""
        return self.graded(prompts, self.texts(model, tokenizer, prompts, sample))

    def start(
        self, context: Context, size: Size, tokenizer: PreTrainedTokenizerBase, goal: float, **settings: Any
    ) -> PreTrainedModel:
        """A model that is trained on answers until a share ``goal`` of its samples is right; see ``warmed_up``."""
        probe = self.questions(0, "probe", 128)

        def share(model: PreTrainedModel) -> float:
            return mean(self.answered(model, tokenizer, probe, sample=True))

        return warmed_up(context, size, tokenizer, self.example, share, goal, **settings)

    def rows(self, seed: int) -> list[dict[str, Any]]:
        """Data for rollouts."""
        return [{"prompt": text} for text in self.questions(seed, "rollouts", 2048)]

    def learnt(
        self,
        context: Context,
        size: Size,
        start: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        arms: Iterable[str],
        learner: Callable[[str], Learner],
        measured: Callable[[str, PreTrainedModel, dict[str, list[float]]], dict[str, Any]],
        samples: int = 4,
    ) -> dict[str, dict[str, Any]]:
        """``rollouts.learnt`` on the task's data, tuned by the share of right samples on questions of their own.

        Args:
            samples: of every tuning question.
        """
        tuning = [text for text in self.questions(context.seed, "tuning", size.test) for _ in range(samples)]

        def tuned(arm: str, policy: PreTrainedModel) -> float:
            return mean(self.answered(policy, tokenizer, tuning, sample=True))

        rows = self.rows(context.seed)
        return learnt(context, size, start, tokenizer, rows, self.length, arms, learner, tuned, measured)

    def sampled(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], samples: int
    ) -> list[list[Sample]]:
        """Samples of every question."""
        many = [text for text in questions for _ in range(samples)]
        texts = self.texts(model, tokenizer, many, sample=True)
        surprises = self.surprises(model, tokenizer, many, texts)
        found = [Sample(*each) for each in zip(texts, self.graded(many, texts), surprises, strict=True)]
        return [found[first : first + samples] for first in range(0, len(many), samples)]

    def surprises(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        texts: Sequence[str],
    ) -> list[float]:
        """``-log p`` of whole responses, the end token of those that ended included: of samples, their entropy is the
        mean.
        """
        import torch

        from ...core.logprobs import logps_from_logits

        found: list[float] = []
        for first in range(0, len(prompts), 1024):
            part = slice(first, first + 1024)
            before = torch.tensor(tokenizer(list(prompts[part]))["input_ids"])
            rows = [tokenizer(text.rstrip("\n"))["input_ids"] for text in texts[part]]
            rows = [[*row, tokenizer.eos_token_id] if len(row) < self.length else row for row in rows]
            width = max(map(len, rows))
            behind = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
            mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
            ids = torch.cat([before, behind], 1).to(model.device)
            with torch.no_grad():
                logits = model(input_ids=ids).logits[:, before.shape[1] - 1 : -1].float()
            logps = logps_from_logits(logits, behind.to(model.device)) * mask.to(model.device)
            found += (-logps.sum(1)).tolist()
        return found


def tokenizer() -> PreTrainedTokenizerBase:
    """One token a character."""
    return character_tokenizer("0123456789=")
