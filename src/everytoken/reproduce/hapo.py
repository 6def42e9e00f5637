"""HAPO's claims: more entropy than DAPO at equal or better accuracy, with each of its parts alone beside it.

A question gives eight digits, and any four of them in order are a right answer: one policy may be always right and
still write seventy different answers. A small model learns that until three tenths of its samples are right. DAPO then
makes it right, and lets its answers become alike, which HAPO is to prevent. Rollouts are equal for all arms; each batch
is used for two updates, so that ratios move and bounds can act. Every arm takes the better of two learning rates,
chosen by accuracy on questions of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..core.results import Values, mean
from .base import Arms, Claim, Context, Reproduction
from .beds.rollouts import GROUP, Learner, Size
from .beds.sorting import Sorting, tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .files import Scale

TASK, GOAL = Sorting(given=8, written=4), 0.3
SIZES: dict[Scale, Size] = {
    "quick": Size(hidden=48, layers=2, warmup=300, updates=8, batch=64, test=48, rates=(1e-3,)),
    "cpu": Size(hidden=48, layers=2, warmup=600, updates=80, batch=64, test=128, rates=(4e-4, 1e-3)),
    "gpu": Size(
        hidden=256, layers=6, warmup=1500, updates=160, batch=1024, test=2048, rates=(3e-4, 1e-3), warmup_batch=256
    ),
}
OFF: dict[str, Any] = dict(temperature_tau=0.0, token_average=False, adv_beta=0.0, clip_alpha=0.0)
ARMS: dict[str, dict[str, Any]] = {
    "DAPO": OFF,
    "HAPO": {},
    "A alone: temperature": OFF | dict(temperature_tau=0.05),
    "B alone: token average": OFF | dict(token_average=True),
    "C alone: redistribution": OFF | dict(adv_beta=1.0),
    "D alone: clip": OFF | dict(clip_alpha=1.0),
}
ACCURACY, ENTROPY, KINDS = "accuracy of samples", "entropy of a response, nats", "different right answers of eight"
ALIKE, SMOOTH = "entropy of a token at equal reward, nats", 8
WHY = (
    "The paper trains models of 3B to 14B weights on mathematics for long; here (scale cpu) a model of 0.06M "
    "weights picks digits, with 80 updates."
)


def measured(
    context: Context, model: PreTrainedModel, codes: PreTrainedTokenizerBase, questions: list[str]
) -> dict[str, Values]:
    """Of eight samples a question: the share that is right, their entropy, and how many different ones are right.

    The entropy is estimated by the mean of ``-log p`` of the samples' own tokens, summed over a response.
    """
    import torch

    from ..core.rng import derive_seed

    torch.manual_seed(derive_seed(context.seed, "measured"))
    asked = TASK.sampled(model, codes, questions, GROUP)
    return {
        ACCURACY: [mean([sample.right for sample in samples]) for samples in asked],
        ENTROPY: [mean([sample.surprise for sample in samples]) for samples in asked],
        KINDS: [float(len({sample.text for sample in samples if sample.right})) for samples in asked],
    }


def smoothed(rewards: list[float], entropies: list[float]) -> list[list[float]]:
    """Reward and entropy in training, means of ``SMOOTH`` batches of rollouts one behind the other."""
    size = min(SMOOTH, len(rewards))
    spans = [slice(first, first + size) for first in range(len(rewards) - size + 1)]
    return [[round(mean(rewards[span]), 4), round(mean(entropies[span]), 4)] for span in spans]


def entropy_at(curve: list[list[float]], reward: float) -> float:
    """The entropy where a curve first reaches a reward."""
    return next((entropy for value, entropy in curve if value >= reward), curve[-1][1])


def run(context: Context) -> Arms:
    from ..reinforcement.hapo import HAPO

    size, codes = SIZES[context.scale], tokenizer()
    start = TASK.start(context, size, codes, GOAL)
    test = TASK.questions(context.seed, "test", size.test)
    arms: Arms = {"start": context.part("start, measured", lambda: measured(context, start, codes, test))}

    def learner(arm: str) -> Learner:
        method = HAPO(**ARMS[arm])
        return Learner(method.recipe(), TASK.reward, method.arguments() | {"num_iterations": 2})

    def kept(arm: str, policy: PreTrainedModel, logs: dict[str, list[float]]) -> dict[str, Any]:
        curve = smoothed(logs["reward"], logs["entropy"][::2])  # the first of two updates with a batch
        return {"curve": curve} | measured(context, policy, codes, test)

    found = TASK.learnt(context, size, start, codes, ARMS, learner, kept)
    curves = {arm: figures.pop("curve") for arm, figures in found.items()}
    arms |= found
    for arm, curve in curves.items():
        context.artifacts[f"{arm}: reward and entropy of a token in training"] = curve
    shared = min(max(reward for reward, _ in curve) for curve in curves.values())
    context.artifacts["reward that all arms reach"] = shared
    for arm, curve in curves.items():
        arms[arm][ALIKE] = entropy_at(curve, shared)
    return arms


PARTS = [arm for arm in ARMS if "alone" in arm]
REPRODUCTION = Reproduction(
    name="hapo",
    summary="DAPO, HAPO and its parts on questions with many right answers: accuracy, entropy and variety of answers",
    run=run,
    claims=[
        Claim(ENTROPY, "HAPO", "DAPO", "higher through training", kind="difference", why=WHY),
        Claim(ALIKE, "HAPO", "DAPO", "(not printed)", kind="difference", why=WHY),
        Claim(ACCURACY, "HAPO", "DAPO", "50.04 against 46.97", kind="difference", why=WHY),
        Claim(KINDS, "HAPO", "DAPO", "(not measured in the paper)", kind="difference", why=WHY),
        *[
            Claim(metric, arm, "DAPO", paper, kind="difference", why=WHY)
            for arm, paper in zip(PARTS, ("48.85", "48.56", "48.28", "48.02"), strict=True)
            for metric, paper in ((ENTROPY, "(not printed)"), (ACCURACY, f"{paper} against 46.97"))
        ],
        Claim(ACCURACY, "DAPO", "start", "(positive control: DAPO learns here)", kind="difference", why="Of the bed."),
        Claim(
            ENTROPY,
            "DAPO",
            "start",
            "(bed: DAPO loses entropy here)",
            kind="difference",
            higher_is_better=False,
            why="Of the bed.",
        ),
    ],
    extra=("train", "trl"),
    scales=("quick", "cpu", "gpu"),
)
