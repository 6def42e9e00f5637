"""D3S's claim: the accuracy of GRPO with a fifth of its tokens back-propagated, and updates that are done sooner.

The small model of the bed ``sums`` goes on from where it is right in about half of its samples, by equal rollouts: all
of them are written and scored, and D3S trains on a part. Every arm takes the better of two learning rates, chosen on
questions of their own. What the start reaches is measured too: GRPO must learn here, or nothing is decided.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..core.results import Values, mean
from .base import Arms, Claim, Context, Reproduction
from .beds.sums import SumsBed, correct, graded, questions

if TYPE_CHECKING:
    from ..reinforcement.base import Recipe

RATES = (3e-4, 1e-3)
TOKENS, SECONDS, ACCURACY = "tokens back-propagated", "seconds of an update", "accuracy"
WHY = (
    "The paper trains Qwen2.5-Math-7B, and its figure is time to the same score; here a model of under a million "
    "weights, 48 updates of 64 rollouts, on CPUs."
)


def recipe_of(arm: str) -> Recipe:
    from ..reinforcement.base import Recipe
    from ..reinforcement.d3s import D3S

    settings: dict[str, dict[str, Any]] = {
        "D3S": {},
        "D2S (no schedule)": dict(rollouts_start=0.5, rollouts_end=0.5, tokens_start=0.3, tokens_end=0.3),
    }
    return Recipe() if arm == "GRPO" else D3S(**settings[arm]).recipe()


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """1 for the right total, else 0."""
    return [float(correct(prompt, text)) for prompt, text in zip(prompts, completions, strict=True)]


def run(context: Context) -> Arms:
    bed = SumsBed()
    start, tokenizer = bed.start(context)
    steps = 3 if context.quick else 48
    data = [{"prompt": text} for text in questions(context.seed, "rollouts", 512)]
    test = questions(context.seed, "test", 64 if context.quick else 512)
    tuning = questions(context.seed, "tuning", 32 if context.quick else 256)
    at_start = graded(start, tokenizer, test, sample=False)
    arms: Arms = {"start": {ACCURACY: at_start}}

    def trained(arm: str, lr: float) -> dict[str, Any]:
        from .beds.rollouts import train_by_rollouts

        label = f"{arm}, learning rate {lr}"
        policy, logs = train_by_rollouts(
            context, label, start, tokenizer, recipe_of(arm), reward, data, steps, lr=lr, length=40
        )
        return {
            "tuning": mean(graded(policy, tokenizer, tuning, sample=False)),
            ACCURACY: graded(policy, tokenizer, test, sample=False),
            TOKENS: sum(logs["trained"]),
            SECONDS: sum(logs["seconds"]) / steps,
            "rewards": logs["reward"],
        }

    for arm in ("GRPO", "D3S", "D2S (no schedule)"):
        found = {lr: context.part(f"{arm} {lr}", lambda arm=arm, lr=lr: trained(arm, lr)) for lr in RATES}
        best = max(found, key=lambda lr: found[lr]["tuning"])
        context.artifacts[f"{arm}: learning rate"] = best
        context.artifacts[f"{arm}: mean reward of the first and the last quarter"] = [
            round(mean(found[best]["rewards"][part]), 4)
            for part in (slice(steps // 4 or 1), slice(-(steps // 4 or 1), None))
        ]
        values: dict[str, Values] = {name: found[best][name] for name in (ACCURACY, TOKENS, SECONDS)}
        arms[arm] = values
    return arms


REPRODUCTION = Reproduction(
    name="d3s",
    summary="GRPO and D3S on worked sums by equal rollouts: accuracy, tokens back-propagated, time of an update",
    run=run,
    claims=[
        Claim(
            ACCURACY,
            "D3S",
            "GRPO",
            "not below GRPO (34.3 against 29.8)",
            kind="difference",
            threshold=-0.02,
            why=f"{WHY} The bar is two points below GRPO.",
        ),
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
            SECONDS,
            "D3S",
            "GRPO",
            "2.04x faster to the same score",
            higher_is_better=False,
            why=f"{WHY} The time of an update is compared, without that of writing rollouts.",
        ),
        Claim(
            ACCURACY,
            "GRPO",
            "start",
            "(positive control: GRPO learns here)",
            kind="difference",
            why="Of the bed.",
        ),
        Claim(ACCURACY, "D3S", "D2S (no schedule)", "34.3 against 31.3", kind="difference", why=WHY),
    ],
    extra=("train", "trl"),
    bed="sums",
)
