"""Curriculum GRPO's claim: a budget that shrinks keeps accuracy that a tight budget from the start loses.

A question shows twelve letters in any order, and the answer is the seventh of them in the alphabet's order. A response
thinks first: it writes the first seven in order, or leaves out all but every second, third or sixth, or writes the last
alone. The fewer it writes, the more it has to count at once, which a model of one layer does badly. It learns all ways
until a quarter of its samples is right, and goes on by rollouts for their correctness, format and length. All arms are
asked with the final budget in the end. They make equal rollouts, and each takes the better of two learning rates,
chosen by its whole reward at the final budget on questions of their own.

Budgets are so small that a linear curriculum would have the same ones (12, 10, 8, 7), so there is no arm of it.
"""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING, Any

from ..core.charts import lines_svg
from ..core.results import Values, mean
from ..core.rng import derive_seed
from .base import Arms, Claim, Context, Reproduction
from .beds.rollouts import Learner, Size, answers, learnt, warmed_up
from .beds.small_models import character_tokenizer
from .files import Result

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..reinforcement.curriculum_grpo import CurriculumGRPO
    from .files import Scale

LETTERS, SHOWN, RANK, STRIDES, GOAL = "abcdefghijklmnopqrstuvwxyz", 12, 7, (1, 2, 3, 6, 7), 0.25
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
LONG, SHORT, PROMPT = RANK + 5, 2 + 5, "{prompt}{budget}="
"""Tokens of a response that writes all seven, and of one that writes the first and the last of them."""
SIZES: dict[Scale, Size] = {
    "quick": Size(hidden=32, layers=1, warmup=300, updates=8, batch=64, test=128, rates=(2e-3,)),
    "cpu": Size(hidden=32, layers=1, warmup=600, updates=120, batch=64, test=1024, rates=(5e-4, 2e-3)),
    "gpu": Size(
        hidden=64, layers=1, warmup=2000, updates=300, batch=1024, test=8192, rates=(5e-4, 2e-3), warmup_batch=256
    ),
}
CURRICULUM, FIXED, FREE = "curriculum", "final budget from the start", "no length reward"
ACCURACY, SAMPLED, LENGTH = "accuracy", "accuracy of samples", "tokens of a response"
WHY = (
    "The paper trains Qwen2.5-7B for 600 steps from budgets of 256 to 87 tokens; here (scale cpu) a model of 0.01M "
    f"weights, 120 updates, from {LONG} to {SHORT}."
)


def method_of(arm: str, updates: int) -> CurriculumGRPO:
    """The settings of an arm."""
    from ..reinforcement.curriculum_grpo import CurriculumGRPO

    start = SHORT if arm in (FIXED, FREE) else LONG
    return CurriculumGRPO(
        budget_start=start,
        budget_end=SHORT,
        budget_gamma=(SHORT / LONG) ** (1 / 3),
        budget_interval=max(1, updates // 4),
        weight_length=0.0 if arm == FREE else 0.3,
        budget_prompt=PROMPT,
    )


def question(draw: random.Random) -> str:
    return "".join(draw.sample(LETTERS, SHOWN)) + ":"


def example(draw: random.Random) -> tuple[str, str]:
    """A question with any budget in it, and one of its worked answers."""
    asked, stride = question(draw), draw.choice(STRIDES)
    first = sorted(asked[:SHOWN])[:RANK]
    thought = "".join(first[(RANK - 1) % stride :: stride])
    prompt = PROMPT.format(prompt=asked, budget=draw.randint(SHORT, LONG))
    return prompt, f"<think>{thought}</think><answer>{thought[-1]}</answer>\n"


def correct(prompt: str, text: str) -> bool:
    """Whether a response has one answer, the right one."""
    return re.findall(r"<answer>(.*?)</answer>", text) == [sorted(prompt[:SHOWN])[RANK - 1]]


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """1 for a right answer, else 0."""
    return [float(correct(prompt, text)) for prompt, text in zip(prompts, completions, strict=True)]


def questions(seed: int, name: str, count: int, budget: int | None = SHORT) -> list[str]:
    """``count`` questions of a named set, the same at every call; with a budget in them, or as data for rollouts."""
    asked = [question(random.Random(derive_seed(seed, name, number))) for number in range(count)]
    return asked if budget is None else [PROMPT.format(prompt=text, budget=budget) for text in asked]


def measured(
    context: Context, model: PreTrainedModel, codes: PreTrainedTokenizerBase, prompts: list[str], sample: bool
) -> dict[str, list[float]]:
    """Of one answer a question: whether it is right, and its tokens."""
    import torch

    torch.manual_seed(derive_seed(context.seed, "measured"))
    texts = answers(model, codes, prompts, 2 * LONG, sample)
    return {ACCURACY: reward(prompts, texts), LENGTH: [float(len(ids)) for ids in codes(texts)["input_ids"]]}


def run(context: Context) -> Arms:
    from ..reinforcement.budgets import length_reward

    size = SIZES[context.scale]
    codes = character_tokenizer(f"0123456789:={LETTERS}", words=TAGS)
    probe = questions(0, "probe", 128)

    def share(model: PreTrainedModel) -> float:
        return mean(measured(context, model, codes, probe, sample=True)[ACCURACY])

    start = warmed_up(context, size, codes, example, share, GOAL, lr=8e-3)
    data = [{"prompt": text} for text in questions(context.seed, "rollouts", 2048, None)]
    test, tuning = (questions(context.seed, name, size.test) for name in ("test", "tuning"))

    def both(model: PreTrainedModel) -> dict[str, Values]:
        sampled, greedy = (measured(context, model, codes, test, sample=flag) for flag in (True, False))
        return {ACCURACY: greedy[ACCURACY], SAMPLED: sampled[ACCURACY], LENGTH: sampled[LENGTH]}

    arms: Arms = {"start": context.part("start, measured", lambda: both(start))}

    def learner(arm: str) -> Learner:
        method = method_of(arm, size.updates)
        return Learner(method.recipe(), reward, method.arguments())

    def tuned(arm: str, policy: PreTrainedModel) -> float:
        """The whole reward at the final budget."""
        method, found = method_of(arm, size.updates), measured(context, policy, codes, tuning, sample=True)
        lengths = [length_reward(int(length), SHORT) for length in found[LENGTH]]
        return method.weight_correct * mean(found[ACCURACY]) + method.weight_length * mean(lengths)

    def kept(arm: str, policy: PreTrainedModel, logs: dict[str, list[float]]) -> dict[str, Any]:
        return {"curve": [round(count / size.batch, 2) for count in logs["tokens"]]} | both(policy)

    names = (FREE, FIXED, CURRICULUM)
    found = learnt(context, size, start, codes, data, 2 * LONG, names, learner, tuned, kept)
    for arm, figures in found.items():
        context.artifacts[f"{arm}: tokens of a rollout by update"] = figures.pop("curve")
    return arms | found


REPRODUCTION = Reproduction(
    name="curriculum-grpo",
    summary="letters in order, by responses whose length has a budget: fixed, shrinking or none",
    run=run,
    claims=[
        Claim(ACCURACY, CURRICULUM, FIXED, "86.20 against 82.71", kind="difference", why=WHY),
        Claim(
            LENGTH,
            CURRICULUM,
            FIXED,
            "88.8 against 87.0",
            higher_is_better=False,
            threshold=1.1,
            why=f"{WHY} The bar is a tenth more than the fixed budget's.",
        ),
        Claim(LENGTH, CURRICULUM, FREE, "88.8 against 258.4 before", higher_is_better=False, why=WHY),
        Claim(SAMPLED, FREE, "start", "(positive control: GRPO learns here)", kind="difference", why="Of the bed."),
        Claim(
            ACCURACY,
            FIXED,
            FREE,
            "(bed: a tight budget costs accuracy)",
            kind="difference",
            higher_is_better=False,
            why="Of the bed.",
        ),
    ],
    extra=("train", "trl"),
    scales=("quick", "cpu", "gpu"),
)


def pareto_svg(result: Result) -> str:
    """Accuracy against length: a point a seed."""
    points = {
        arm: [[(mean(run[arm][LENGTH]), mean(run[arm][ACCURACY]))] for run in result["runs"]]
        for arm in ("start", FREE, FIXED, CURRICULUM)
    }
    return lines_svg(points, "tokens of a response", "share of questions right")
