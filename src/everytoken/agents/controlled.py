"""A planner's model of a known quality: noisy copies of the perfect plan, and choices that are right so often.

It stands for a language model where a comparison must not depend on one: every planner gets the same quality, and the
only difference is how often it is asked and with what.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from ..core.errors import BadInputError
from .action_tree import END, World
from .worlds import shortest

Perfect = Callable[[], "list[str] | None"]
"""The commands that win from the world's present state."""


class ControlledModel:
    """Knows the world, and is wrong as often as it is told to be.

    Args:
        world: in which it plans.
        vocabulary: every action that there is.
        accuracy: the chance that an action is the right one.
        generator: random numbers.
        perfect: the commands that win from here; default a search.

    Raises:
        BadInputError: an accuracy outside [0, 1], or no actions.
    """

    def __init__(
        self,
        world: World,
        vocabulary: Sequence[str],
        accuracy: float,
        generator: np.random.Generator,
        perfect: Perfect | None = None,
    ):
        if not 0 <= accuracy <= 1 or not vocabulary:
            raise BadInputError(f"An accuracy is in [0, 1], and there is an action at least; got {accuracy}.")
        self.world, self.vocabulary, self.accuracy, self.generator = world, list(vocabulary), accuracy, generator
        self.perfect = perfect if perfect is not None else lambda: shortest(world)

    def _any(self) -> str:
        return self.vocabulary[int(self.generator.integers(len(self.vocabulary)))]

    def plans(self, prompt: str, count: int) -> list[str]:
        """Copies of the perfect plan in which actions are left out, replaced or added."""
        best, texts = self.perfect() or [], []
        for _ in range(count):
            plan: list[str] = []
            for action in best:
                if self.generator.random() < self.accuracy:
                    plan.append(action)
                else:
                    plan += [[], [self._any()], [self._any(), action]][int(self.generator.integers(3))]
            texts.append("\n".join(plan or [self._any()]))
        return texts

    def letters(self, prompt: str, letters: Sequence[str]) -> list[float]:
        """The right option first, with the model's accuracy; read from the options that the prompt shows."""
        shown = dict(re.findall(r'^([A-Z])\. "(.*)"$', prompt, re.M))
        best = self.perfect()
        wanted = "the task is done" if best == [] else (best or [""])[0]
        right = [letter for letter in letters if shown.get(letter) == wanted]
        chosen = letters[int(self.generator.integers(len(letters)))]
        if right and self.generator.random() < self.accuracy:
            chosen = right[0]
        return [0.0 if letter == chosen else -10.0 for letter in letters]

    def answer(self, prompt: str) -> str:
        """The next action, right with the model's accuracy."""
        best = self.perfect()
        if self.generator.random() < self.accuracy and best is not None:
            return best[0] if best else END
        return self._any()

    def count(self, text: str) -> int:
        """Words and marks: about the tokens of a small vocabulary."""
        return len(re.findall(r"\w+|[^\w\s]", text))
