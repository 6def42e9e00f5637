"""Rewards for spending few tokens, as the position paper on token reduction collects them (arXiv 2505.18227).

For an answer y of ``n`` tokens to a question with the right answer y*, and a wanted length ``n*``::

    exact       1[y = y*] - alpha |n* - n|                                          as long as wanted
    at most     1[y = y*] clip(alpha (n* - n) + delta, 0, 1)                        right, and not longer
    efficient   n_ref / n - 1 + lambda (acc - acc_ref)                              against a reference policy

The first two are reward functions as TRL's trainers take them: ``reward_funcs=length_reward("at most", wanted=200)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..core.errors import BadInputError

KINDS = ("exact", "at most")
Answered = Callable[[str, Any], bool]
"""``(text of the completion, solution) -> whether it is right``."""


def exact_length(right: bool, length: float, wanted: float, alpha: float) -> float:
    """1 for a right answer of the wanted length, less ``alpha`` for every token of difference."""
    return float(right) - alpha * abs(wanted - length)


def at_most_length(right: bool, length: float, wanted: float, alpha: float, delta: float = 0.5) -> float:
    """From 0 to 1 for a right answer, the more the shorter; ``delta`` at the wanted length, 0 for a wrong answer."""
    return float(right) * min(1.0, max(0.0, alpha * (wanted - length) + delta))


def efficiency(
    length: float, reference_length: float, accuracy: float, reference_accuracy: float, weight: float = 1.0
) -> float:
    """How much shorter, and how much better, than a reference; 0 where both are equal.

    Args:
        length, reference_length: mean tokens of answers, positive.
        accuracy, reference_accuracy: shares of right answers.
        weight: lambda, of the accuracy.

    Raises:
        BadInputError: a length that is not positive.
    """
    if length <= 0 or reference_length <= 0:
        raise BadInputError(f"Lengths are positive; got {length} and {reference_length}.")
    return reference_length / length - 1 + weight * (accuracy - reference_accuracy)


def contains_solution(text: str, solution: Any) -> bool:
    """Whether the solution's text stands at the end of the answer, but for white space and a full stop."""
    return text.strip().removesuffix(".").rstrip().endswith(str(solution).strip())


def length_reward(
    kind: str = "at most",
    wanted: float = 200,
    alpha: float | None = None,
    delta: float = 0.5,
    right: Answered = contains_solution,
) -> Callable[..., list[float]]:
    """A reward function for TRL: ``(completions, completion_ids, solution, ...) -> [B]``.

    Args:
        kind: ``"exact"`` or ``"at most"``.
        wanted: n*, in tokens.
        alpha: what a token of difference costs; None takes ``1 / wanted``.
        delta: of ``"at most"``.
        right: decides whether a completion answers with the column ``solution`` of the data.

    Raises:
        BadInputError: an unknown kind, or a number out of range; in a call, data without the column ``solution``.
    """
    if kind not in KINDS:
        raise BadInputError(f"There is no length reward {kind!r}.", f"Known: {', '.join(KINDS)}.")
    step = 1 / wanted if alpha is None and wanted > 0 else alpha
    if wanted <= 0 or step is None or step < 0 or not 0 <= delta <= 1:
        raise BadInputError(
            f"wanted is positive, alpha not negative and delta from 0 to 1; got {wanted}, {alpha} and {delta}."
        )

    def reward(
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        solution: Sequence[Any] | None = None,
        **_: Any,
    ) -> list[float]:
        if solution is None:
            raise BadInputError("A length reward needs the column 'solution' in the data.")
        found = []
        for completion, ids, wants in zip(completions, completion_ids, solution, strict=True):
            text = completion if isinstance(completion, str) else completion[-1]["content"]
            is_right = right(text, wants)
            if kind == "exact":
                found.append(exact_length(is_right, len(ids), wanted, step))
            else:
                found.append(at_most_length(is_right, len(ids), wanted, step, delta))
        return found

    reward.__name__ = f"{kind.replace(' ', '_')}_length_reward"  # TRL logs it by this name
    return reward
