"""Token budgets that stand in the prompt and are rewarded by a triangle; methods bring their own schedules."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

THINKING = re.compile(r"\s*<think>(.*?)</think>(.*)", re.S)


def length_reward(length: int, budget: int, shape: str = "triangle") -> float:
    """From 0 to 1, 1 at the budget; ``"band"`` gives 1 to everything up to it."""
    if length <= budget:
        return 1.0 if shape == "band" else length / budget
    return max(0.0, 1 - (length - budget) / budget)


def thinking_and_rest(text: str) -> tuple[str, str] | None:
    """What stands inside ``<think>`` and behind it; None unless a text begins with one such pair and has no other."""
    found = THINKING.fullmatch(text)
    if found is None or len(re.findall(r"</?think>", text)) != 2:
        return None
    return found[1], found[2]


@dataclass
class BudgetPrompt:
    """Writes the budget of the step into the prompt: into the last message of a conversation.

    Args:
        budget: ``(step, steps) -> tokens``.
        template: ``{prompt}`` and ``{budget}`` are filled in.
        extra: tokens of an answer that the budget does not count.
        inside: write in front of the spaces and line ends that a text prompt ends with, which have their meaning at the
            end; else behind them, where they belong to the text.
    """

    kind: ClassVar[str] = "prompt"
    budget: Any
    template: str = "{prompt} (Use exactly {budget} tokens.)"
    extra: int = 0
    inside: bool = True

    def __call__(self, row: dict[str, Any], step: int, steps: int) -> dict[str, Any]:
        budget, prompt = self.budget(step, steps), row["prompt"]
        if isinstance(prompt, str):
            body = prompt.rstrip() if self.inside else prompt
            return row | {"prompt": self.template.format(prompt=body, budget=budget) + prompt[len(body) :]}
        last = prompt[-1] | {"content": self.template.format(prompt=prompt[-1]["content"], budget=budget)}
        return row | {"prompt": [*prompt[:-1], last]}

    def max_new_tokens(self, step: int, steps: int) -> int:
        """Longer responses earn nothing for their length and are not written."""
        return 2 * int(self.budget(step, steps)) + self.extra
