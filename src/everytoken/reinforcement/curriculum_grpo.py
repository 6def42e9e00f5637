"""Curriculum GRPO: train long, think short (arXiv 2508.08940).

A generous token budget first, a tight one later: the model finds solutions, then learns to say them shortly. At step t
the budget ``L = int(max(1, B_0 gamma^floor(t / T)))`` stands in the prompt, and a triangle rewards a length l::

    R = l / L for l <= L,   1 - (l - L) / L for L < l <= 2 L,   0 beyond

The reward is ``lambda_c correct + lambda_l R + lambda_f format``, and
``A = (r - mean) / sqrt(mean (r - mean)^2 + eps)``. Weights and the size of the parts are not printed in the paper for
its main run; the defaults here are its correctness-heavy ablation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..core.errors import BadInputError, check_choices
from ..training.datasets.messages import completion_text
from .base import Recipe, RolloutBatch
from .budgets import BudgetPrompt as BudgetPrompt
from .budgets import length_reward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ExponentialBudget:
    """``int(start gamma^floor(step / interval))``, at least ``floor``.

    Raises:
        BadInputError: a value out of range.
    """

    start: int = 256
    gamma: float = 0.7
    interval: int = 150
    floor: int = 1

    def __post_init__(self) -> None:
        if not (self.start >= 1 and 0 < self.gamma <= 1 and self.interval >= 1 and 1 <= self.floor <= self.start):
            raise BadInputError(
                "A budget starts at 1 token or more, falls (0 < gamma <= 1), and stays above its floor."
            )

    def __call__(self, step: int, steps: int) -> int:
        return max(self.floor, int(self.start * self.gamma ** (step // self.interval)))

    @classmethod
    def between(cls, start: int, end: int, drops: int, steps: int) -> ExponentialBudget:
        """From ``start`` to ``end`` in equal ratios, ``drops`` of them over the steps of a training."""
        return cls(start, (end / start) ** (1 / drops), max(1, steps // (drops + 1)))


@dataclass(frozen=True)
class LinearBudget:
    """From ``start`` to ``end`` in ``drops`` equal steps, spread over the training."""

    start: int = 256
    end: int = 87
    drops: int = 3

    def __call__(self, step: int, steps: int) -> int:
        done = min(self.drops, step * (self.drops + 1) // max(1, steps))
        return int(self.start - done * (self.start - self.end) / self.drops)


def format_parts(text: str) -> tuple[bool, bool]:
    """Whether a text has one well-formed ``<think>`` and one well-formed ``<answer>``, the answer behind."""
    tags = re.findall(r"</?(?:think|answer)>", text)
    thinks = tags.count("<think>") == tags.count("</think>") == 1
    answers = tags.count("<answer>") == tags.count("</answer>") == 1
    if thinks and answers:
        well = tags == ["<think>", "</think>", "<answer>", "</answer>"]
        return well, well
    return thinks and tags == ["<think>", "</think>"], answers and tags == ["<answer>", "</answer>"]


@dataclass
class CurriculumLengthReward:
    """The length reward at the budget of the step; wrong answers earn it too.

    Args:
        count: ``"completion"`` counts its tokens without the end token, ``"thinking"`` those inside ``<think>``.
    """

    kind: ClassVar[str] = "reward"
    __name__: ClassVar[str] = "length"
    budget: Any
    weight: float = 0.3
    shape: str = "triangle"
    count: str = "completion"
    tokenizer: Any = field(default=None, init=False, repr=False)

    def use_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(
        self, completions: Sequence[Any], completion_ids: Sequence[list[int]], trainer_state: Any, **_: Any
    ) -> list[float]:
        budget = self.budget(trainer_state.global_step, max(1, trainer_state.max_steps))
        rows = zip(map(completion_text, completions), completion_ids, strict=True)
        return [length_reward(self._length(text, ids), budget, self.shape) for text, ids in rows]

    def _length(self, text: str, ids: list[int]) -> int:
        if self.count == "completion":
            return len(ids) - bool(ids and ids[-1] == self.tokenizer.eos_token_id)
        found = re.search(r"<think>(.*?)(?:</think>|$)", text, re.S)
        return len(self.tokenizer(found[1], add_special_tokens=False)["input_ids"]) if found else 0


@dataclass
class FormatReward:
    """Half for a well-formed ``<think>``, half for a well-formed ``<answer>``."""

    kind: ClassVar[str] = "reward"
    __name__: ClassVar[str] = "format"
    weight: float = 0.1

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float]:
        return [0.5 * sum(format_parts(completion_text(completion))) for completion in completions]


@dataclass
class StableAdvantage:
    """``(r - mean) / sqrt(mean (r - mean)^2 + eps)`` within every group."""

    kind: ClassVar[str] = "group_advantage"
    eps: float = 1e-4

    def __call__(self, batch: RolloutBatch) -> torch.Tensor:
        found = torch.zeros_like(batch.rewards)
        for rows in batch.group_rows():
            rewards = batch.rewards[rows].double()
            gaps = rewards - rewards.nanmean()
            found[rows] = (gaps / (gaps.square().nanmean() + self.eps).sqrt()).nan_to_num(0.0).to(found.dtype)
        return found


@dataclass
class CurriculumGRPO:
    """The curriculum's settings.

    Args:
        budget_start, budget_end: tokens at the start, and below which the budget never falls.
        budget_gamma, budget_interval: the factor, and after how many steps it is applied.
        budget_shape: ``"exponential"``; ``"linear"`` goes to the end in ``budget_drops`` equal steps over the training.
        budget_drops: of the linear budget.
        length_shape: ``"triangle"``, or ``"band"``, which rewards everything up to the budget.
        length_count: ``"completion"`` or ``"thinking"``.
        answer_tokens: of a response beside its thinking, where ``length_count`` is ``"thinking"``: that budget does not
            count them, and without them no response of twice the budget could end in an answer.
        weight_correct, weight_length, weight_format: of the three rewards; length and format 0 are left out.
        budget_prompt: what becomes of a prompt; ``{prompt}`` and ``{budget}`` are filled in.

    Raises:
        BadInputError: a value out of range.
    """

    budget_start: int = 256
    budget_end: int = 87
    budget_gamma: float = 0.7
    budget_interval: int = 150
    budget_shape: str = "exponential"
    budget_drops: int = 3
    length_shape: str = "triangle"
    length_count: str = "completion"
    answer_tokens: int = 64
    weight_correct: float = 0.6
    weight_length: float = 0.3
    weight_format: float = 0.1
    budget_prompt: str = "{prompt} (Use exactly {budget} tokens.)"

    def __post_init__(self) -> None:
        check_choices(
            self,
            budget_shape=("exponential", "linear"),
            length_shape=("triangle", "band"),
            length_count=("completion", "thinking"),
        )
        if min(self.weight_correct, self.weight_length, self.weight_format) < 0 or not math.isfinite(
            self.weight_correct + self.weight_length + self.weight_format
        ):
            raise BadInputError("weight_correct, weight_length and weight_format must not be negative.")
        if self.answer_tokens < 1:
            raise BadInputError(f"answer_tokens must be at least 1; got {self.answer_tokens}.")
        if self.budget_drops < 1 or not 1 <= self.budget_end <= self.budget_start:
            raise BadInputError("A budget falls: budget_drops at least 1, budget_end from 1 to budget_start.")
        if "{prompt}" not in self.budget_prompt or "{budget}" not in self.budget_prompt:
            raise BadInputError("budget_prompt needs {prompt} and {budget}.")
        self.budget()

    def budget(self) -> Any:
        """``(step, steps) -> tokens``."""
        if self.budget_shape == "linear":
            return LinearBudget(self.budget_start, self.budget_end, self.budget_drops)
        return ExponentialBudget(self.budget_start, self.budget_gamma, self.budget_interval, self.budget_end)

    def recipe(self) -> Recipe:
        """Prompt, rewards, advantage."""
        budget = self.budget()
        extra = self.answer_tokens if self.length_count == "thinking" else 0
        pieces: list[Any] = [BudgetPrompt(budget, self.budget_prompt, extra), StableAdvantage()]
        if self.weight_length:
            pieces.append(CurriculumLengthReward(budget, self.weight_length, self.length_shape, self.length_count))
        if self.weight_format:
            pieces.append(FormatReward(self.weight_format))
        return Recipe(*pieces)

    def arguments(self) -> dict[str, Any]:
        """Settings of GRPOConfig, for one reward function that says what is correct."""
        return {"epsilon": 0.2, "beta": 0.0, "reward_weights": [self.weight_correct]}
