"""A test bed for reasoning on a CPU: a small model writes worked sums, one token a character, and is right about half
of the time.

It writes ``32+54=86;86+...#...``, numbers from their last digit, as sums are carried. Whether an answer is right can be
checked, every step of it can be wrong, and rollouts cost so little that each prefix can have dozens.

The positive control is more of what the start learnt from.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from ...core.results import Values
from ...core.rng import derive_seed
from ...training.datasets.sentiment import continuations
from ..base import Context
from .small_models import Batches, answer_batches, character_tokenizer, fit, small_model, worked_sum

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHARACTERS = "0123456789+=;#"
TERMS = 3


def example(rng: random.Random, digits: int = 2) -> tuple[str, str]:
    """A sum and its worked answer."""
    return worked_sum(rng, terms=TERMS, digits=digits)


def digits_of(context: Context) -> int:
    """How long the numbers are; a quick run adds numbers of one digit, which a smaller model learns in seconds."""
    return 1 if context.quick else 2


def questions(seed: int, name: str, count: int, digits: int = 2) -> list[str]:
    """``count`` sums of a named set, the same at every call."""
    return [example(random.Random(derive_seed(seed, name, index)), digits)[0] for index in range(count)]


def correct(prompt: str, response: str) -> bool:
    """Whether a worked sum ends in the right total (numbers are written from their last digit)."""
    total = sum(int(number[::-1]) for number in prompt.strip("=").split("+"))
    _, mark, final = response.strip().rpartition("#")
    return bool(mark) and final == str(total)[::-1]


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], sample: bool
) -> list[str]:
    """One answer a prompt."""
    return continuations(model, tokenizer, list(prompts), 56, 512, sample)


def graded(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], sample: bool
) -> list[float]:
    """1.0 for a right answer, else 0.0, for every prompt."""
    texts = answers(model, tokenizer, prompts, sample)
    return [float(correct(prompt, text)) for prompt, text in zip(prompts, texts, strict=True)]


class SumsBed:
    """Worked sums by a small model that is right about half of the time."""

    name: ClassVar[str] = "sums"
    summary: ClassVar[str] = "a model of under a million weights adds three numbers of two digits"
    metric: ClassVar[str] = "accuracy"
    bounds: ClassVar[tuple[float, float]] = (0.05, 0.95)

    def __init__(self) -> None:
        self._starts: dict[tuple[int, str], PreTrainedModel] = {}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """One token a character."""
        return character_tokenizer(CHARACTERS)

    def batches(self, context: Context, name: str, size: int = 48) -> Batches:
        """Endless worked sums of a named stream of the seed."""
        digits = digits_of(context)
        return answer_batches(
            random.Random(derive_seed(context.seed, name)), lambda rng: example(rng, digits), self.tokenizer(), size
        )

    def start(self, context: Context) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Trained until it is right in 45% of its samples: rollouts must be able to fail and to succeed.

        A quick start is a smaller model and stops at 30%: its steps are few and large, and greedy answers are right
        long before samples are.
        """
        tokenizer = self.tokenizer()
        key = context.seed, context.scale
        if key not in self._starts:
            torch.manual_seed(derive_seed(context.seed, "start"))
            hidden, layers, lr = (64, 2, 3e-3) if context.quick else (128, 3, 1e-3)
            model = small_model(len(tokenizer), hidden, layers, end=tokenizer.eos_token_id)
            model.generation_config.pad_token_id = tokenizer.pad_token_id
            probe = questions(0, "probe", 64, digits_of(context))

            share, steps, every = (0.3, 600, 10) if context.quick else (0.45, 3000, 20)

            def enough() -> bool:
                return sum(graded(model, tokenizer, probe, sample=True)) / len(probe) >= share

            fit(model, self.batches(context, "base"), steps, lr, context.report, "base model", enough, every)
            self._starts[key] = model
        return copy.deepcopy(self._starts[key]), tokenizer

    def rows(self, context: Context) -> list[tuple[str, str]]:
        rng = random.Random(derive_seed(context.seed, "rows"))
        return [example(rng, digits_of(context)) for _ in range(24 if context.quick else 256)]

    def measure(self, context: Context, model: PreTrainedModel) -> dict[str, Values]:
        test = questions(context.seed, "test", 128 if context.quick else 512, digits_of(context))
        tokenizer = self.tokenizer()
        greedy = graded(model, tokenizer, test, sample=False)
        torch.manual_seed(derive_seed(context.seed, "measure"))
        return {"accuracy": greedy, "accuracy of samples": graded(model, tokenizer, test, sample=True)}

    def positive_control(self, context: Context) -> PreTrainedModel:
        model, _ = self.start(context)
        steps = 120 if context.quick else 600
        fit(model, self.batches(context, "control"), steps, 1e-3, context.report, "positive control")
        return model
