"""TW-GRPO: positions weigh by how much a group's predictions disagree there (arXiv 2505.24718).

Over the G responses of a prompt, with full log-probabilities L at each position (those of a uniform distribution where
a response has ended)::

    d = clamp(mean_i L_i - L, -11, 11),   k_t = mean_i sum_v (exp d - d - 1)
    w_t = 1 + (alpha - 1) (k_t - min k) / (max k - min k + 1e-8)

Every token's loss is multiplied by its position's weight and divided by the number of tokens. Answers with several
right options get partial credit (``soft_multichoice_reward``), and questions with one are turned into such
(``invert_question``). Nothing here is specific to video. Weights are those of the policy that wrote the rollouts; the
authors' run makes one update a batch, where it is the policy itself.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..core.errors import BadInputError
from ..training.datasets.messages import completion_text
from .base import Recipe, RolloutBatch

BOUND = 11.0
CHUNK = 32 * 2**20
"""Numbers of one chunk of positions."""


def group_divergence(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``k_t``, ``[T]``, of one group, in chunks of positions.

    Args:
        logits: ``[G, T, V]`` (or log-probabilities).
        mask: ``[G, T]``.
    """
    rows, length, vocab = logits.shape
    step = max(1, CHUNK // (rows * vocab))
    found = []
    for first in range(0, length, step):
        part = slice(first, first + step)
        logps = torch.log_softmax(logits[:, part].float(), -1)
        logps = torch.where(mask[:, part, None].bool(), logps, -math.log(vocab))
        gaps = (logps.mean(0) - logps).clamp(-BOUND, BOUND)
        found.append((gaps.exp() - gaps - 1).sum(-1).mean(0))
    return torch.cat(found) if found else logits.new_zeros(0)


def position_weights(
    divergence: torch.Tensor, mask: torch.Tensor, alpha: float = 1.7, min_active: int = 0
) -> torch.Tensor:
    """``w``, ``[G, T]``, 0 outside ``mask``.

    Args:
        divergence: ``[T]``.
        min_active: positions with fewer responses that have not ended weigh 1 and set no scale.
    """
    counted = mask.sum(0) >= min_active
    scale = torch.zeros_like(divergence)
    if counted.any():
        low, high = divergence[counted].min(), divergence[counted].max()
        scale = torch.where(counted, (divergence - low) / (high - low + 1e-8), 0.0)
    return (1 + (alpha - 1) * scale) * mask


@dataclass
class DivergenceWeights:
    """``position_weights`` as a piece."""

    kind: ClassVar[str] = "token_weight"
    needs: ClassVar[frozenset[str]] = frozenset({"distributions"})
    weighs_kl: ClassVar[bool] = True
    alpha: float = 1.7
    min_active: int = 0
    metrics: dict[str, float] = field(default_factory=dict, init=False)

    def __call__(self, batch: RolloutBatch, advantages: torch.Tensor) -> torch.Tensor:
        assert batch.distributions is not None
        weight = torch.ones_like(advantages)
        for rows in batch.group_rows():
            mask = batch.mask[rows]
            divergence = group_divergence(batch.distributions(rows)[1], mask)
            weight[rows] = position_weights(divergence, mask, self.alpha, self.min_active).to(weight.dtype)
        self.metrics = {"mean_weight": weight[batch.mask].mean().item()}
        return weight


@dataclass
class TWGRPO:
    """TW-GRPO's settings.

    Args:
        alpha: the largest weight, at least 1 (1.7 in the authors' run; 1 is GRPO).
        min_active: weights only from positions where at least so many responses go on; 0 is the authors'.

    Raises:
        BadInputError: a value out of range.
    """

    alpha: float = 1.7
    min_active: int = 0

    def __post_init__(self) -> None:
        if self.alpha < 1:
            raise BadInputError(f"alpha must be at least 1; got {self.alpha}.")
        if self.min_active < 0:
            raise BadInputError(f"min_active must not be negative; got {self.min_active}.")

    def recipe(self) -> Recipe:
        """The weight."""
        return Recipe(DivergenceWeights(self.alpha, self.min_active))

    def arguments(self) -> dict[str, Any]:
        """Settings of GRPOConfig: the mean over tokens, no KL."""
        return {"epsilon": 0.2, "epsilon_high": 0.28, "loss_type": "bnpo", "beta": 0.0}


# -- rewards and data
# ----------------------------------------------------------------------------------------------------
def options(text: str) -> frozenset[str]:
    """``"A, C"`` as a set; empty for no text."""
    return frozenset(part for part in re.sub(r"\s", "", text).split(",") if part)


def soft_multichoice_reward(completions: Sequence[Any], solution: Sequence[str], **_: Any) -> list[float]:
    """Partial credit: ``|P| / |S|`` where the options P inside ``<answer>`` are some of the right ones S, else 0.

    Args:
        completions: texts or conversations.
        solution: options separated by commas; ``<answer>`` tags around them may be there.
    """
    rewards = []
    for completion, truth in zip(completions, solution, strict=True):
        found, right = re.search(r"<answer>(.*?)</answer>", completion_text(completion), re.S), options(_inside(truth))
        chosen = options(found[1]) if found else frozenset()
        rewards.append(len(chosen) / len(right) if chosen and chosen <= right else 0.0)
    return rewards


def hard_multichoice_reward(completions: Sequence[Any], solution: Sequence[str], **_: Any) -> list[float]:
    """1 for exactly the right options, else 0."""
    return [float(reward == 1.0) for reward in soft_multichoice_reward(completions, solution)]


def _inside(text: str) -> str:
    found = re.search(r"<answer>(.*?)</answer>", text, re.S)
    return found[1] if found else text


def think_answer_format_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    """1 for one ``<think>...</think>`` followed by one ``<answer>...</answer>`` at the end, else 0."""
    rewards = []
    for text in map(completion_text, completions):
        once = all(text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
        shape = re.fullmatch(r"\s*<think>.*</think>\s*<answer>.*</answer>[\s!]*", text, re.S)
        rewards.append(float(bool(once and shape)))
    return rewards


NEGATED = {word: f"{word}n't" for word in ("did", "does", "do", "is", "are", "was", "were")}


def invert_question(
    question: str, choices: Sequence[str], correct: int, rng: random.Random
) -> tuple[str, list[str], str] | None:
    """A question with one right option as one with several: negated, its right option the only wrong one.

    Args:
        question: its second word is the auxiliary that is negated, as in "What did he take?".
        choices: two at least.
        correct: the number of the right one.
        rng: draws how many of the others stay, and shuffles.

    Returns:
        Question, choices, and the letters of the right ones (``"A,C"``); None where the second word is no auxiliary.

    Raises:
        BadInputError: fewer than two choices, or no such option.
    """
    if len(choices) < 2 or not 0 <= correct < len(choices):
        raise BadInputError(f"A question needs two choices and one of them right; got {len(choices)} and {correct}.")
    words = question.split(" ")
    if len(words) < 2 or words[1].lower() not in NEGATED:
        return None
    words[1] = NEGATED[words[1].lower()]
    others = [index for index in range(len(choices)) if index != correct]
    kept = [correct, *rng.sample(others, rng.randint(1, len(others)))]
    rng.shuffle(kept)
    right = [chr(ord("A") + place) for place, index in enumerate(kept) if index != correct]
    return " ".join(words), [choices[index] for index in kept], ",".join(right)
