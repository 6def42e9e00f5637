"""D3S's claims: the accuracy of GRPO from equal rollouts, with a fifth of the tokens back-propagated and less time.

A small model learns to sort digits until a third of its samples is right, and goes on by rollouts. All of them are
written and scored; D3S trains on a part. Every arm takes the better of two learning rates, chosen on questions of their
own. The time is that of the updates, without that of writing rollouts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..core.results import Values, mean
from .base import Arms, Claim, Context, Reproduction
from .beds.rollouts import Learner, Size
from .beds.sorting import Sorting, tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..reinforcement.base import Recipe
    from .files import Scale

TASK, GOAL = Sorting(), 0.33
SIZES: dict[Scale, Size] = {
    "quick": Size(hidden=48, layers=2, warmup=300, updates=6, batch=64, test=256, rates=(5e-4,)),
    "cpu": Size(hidden=48, layers=2, warmup=600, updates=60, batch=128, test=1024, rates=(2e-4, 5e-4)),
    "gpu": Size(
        hidden=256, layers=6, warmup=1500, updates=300, batch=1024, test=8192, rates=(3e-4, 1e-3), warmup_batch=256
    ),
}
ACCURACY, SAMPLED = "accuracy", "accuracy of samples"
TOKENS, SECONDS = "tokens back-propagated", "seconds of an update"
USEFUL, GRADIENT = "trained rollouts with an advantage", "gradient's norm in the first quarter"
WHY = (
    "The paper trains models of 7B and 8B weights on mathematics; here (scale cpu) a model of 0.06M weights sorts "
    "digits, with 60 updates of 128 rollouts."
)


def recipe_of(arm: str) -> Recipe:
    from ..reinforcement.base import Recipe
    from ..reinforcement.d3s import D3S

    return Recipe() if arm == "GRPO" else D3S().recipe()


def run(context: Context) -> Arms:
    size, codes = SIZES[context.scale], tokenizer()
    start = TASK.start(context, size, codes, GOAL)
    test = TASK.questions(context.seed, "test", size.test)

    def graded(model: PreTrainedModel) -> dict[str, Values]:
        return {
            ACCURACY: TASK.answered(model, codes, test, sample=False),
            SAMPLED: TASK.answered(model, codes, test, sample=True),
        }

    arms: Arms = {"start": context.part("start, measured", lambda: graded(start))}

    def learner(arm: str) -> Learner:
        return Learner(recipe_of(arm), TASK.reward, {"loss_type": "dapo"})

    def measured(arm: str, policy: PreTrainedModel, logs: dict[str, list[float]]) -> dict[str, Any]:
        return {
            TOKENS: sum(logs["trained"]),
            SECONDS: mean(logs["seconds"]),
            USEFUL: mean(logs["useful"]),
            GRADIENT: mean(logs["gradient"][: max(1, size.updates // 4)]),
        } | graded(policy)

    return arms | TASK.learnt(context, size, start, codes, ("GRPO", "D3S"), learner, measured, samples=1)


REPRODUCTION = Reproduction(
    name="d3s",
    summary="GRPO and D3S on sorting by equal rollouts: accuracy, tokens back-propagated, time of an update",
    run=run,
    claims=[
        Claim(
            TOKENS,
            "D3S",
            "GRPO",
            "under 20% of tokens",
            higher_is_better=False,
            threshold=0.2,
            why="The shares are our defaults, since the paper prints none.",
        ),
        Claim(
            ACCURACY,
            "D3S",
            "GRPO",
            "above GRPO (34.3 against 29.8)",
            kind="difference",
            threshold=-0.05,
            why=f"{WHY} The bar is five points below GRPO: as good, for fewer tokens.",
        ),
        Claim(
            SECONDS,
            "D3S",
            "GRPO",
            "2.04x faster to the same score",
            higher_is_better=False,
            why=f"{WHY} The time of an update is compared, without that of writing rollouts.",
        ),
        Claim(USEFUL, "D3S", "GRPO", "from about 70% to nearly 100%", kind="difference", why=WHY),
        Claim(GRADIENT, "D3S", "GRPO", "(a larger bound)", why=WHY),
        Claim(SAMPLED, "GRPO", "start", "(positive control: GRPO learns here)", kind="difference", why="Of the bed."),
        Claim(
            SAMPLED,
            "start",
            "",
            "(bed: below the ceiling)",
            "value",
            higher_is_better=False,
            threshold=0.8,
            why="Of the bed.",
        ),
    ],
    extra=("train", "trl"),
    scales=("quick", "cpu", "gpu"),
)
