"""RMT's claims: far less thinking at no loss of accuracy, and what its next-token loss keeps.

A text is nine digits and what follows from them: ``=``, the smallest, the median, the largest, and two letters that
never change. So some tokens are easy, and others need what a thought can hold: dots, and then, before a median, the
digits in order up to it, as many of them as it likes. A small model learns the texts and such thoughts until 55% of its
predictions are right. Then arms learn by equal rollouts: RMT; reinforcement alone, with the budget that RMT begins with
and all classes of tokens alike; and RMT without its next-token loss. Each takes the better of two learning rates,
chosen by its right predictions for texts of their own.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from ..core.results import mean
from ..core.rng import derive_seed
from .base import Arms, Claim, Context, Reproduction
from .beds.rollouts import Learner, Size, answers, learnt, warmed_up
from .beds.small_models import character_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..reinforcement.rmt import RMT
    from .files import Scale

DIGITS, GOAL = 9, 0.55
RANK = DIGITS // 2 + 1
LONG, SHORT, PROMPT, TAGS = 8, 2, "{prompt}[{budget}]", ("<think>", "</think>")
SIZES: dict[Scale, Size] = {
    "quick": Size(hidden=48, layers=1, warmup=300, updates=6, batch=64, test=64, rates=(1e-3,)),
    "cpu": Size(hidden=48, layers=1, warmup=600, updates=50, batch=64, test=512, rates=(3e-4, 1e-3)),
    "gpu": Size(
        hidden=256, layers=6, warmup=2000, updates=120, batch=512, test=4096, rates=(3e-4, 1e-3), warmup_batch=256
    ),
}
EVEN = "0.3333333 0.3333333 0.3333334"
ARMS: dict[str, dict[str, Any]] = {
    "RMT": {},
    "reinforcement alone": dict(budget_gamma=1.0, classes_early=EVEN, classes_late=EVEN, ntp_coef=0.0),
    "without next-token loss": dict(ntp_coef=0.0),
}
MATCH, LENGTH, DIRECT = "right predictions", "tokens of a thought", "loss of plain prediction, nats a token"
WHY = (
    "The paper trains models of 14B weights on mathematics with budgets of 800 to 160 tokens; here (scale cpu) a "
    f"model of 0.03M weights, 50 updates, from {LONG} to {SHORT}."
)


def method_of(arm: str) -> RMT:
    """The settings of an arm."""
    from ..reinforcement.rmt import RMT

    settings = dict(budget_start=LONG, budget_min=SHORT, budget_gamma=SHORT / LONG) | ARMS[arm]
    return RMT(**settings, answer_tokens=5, context=DIGITS + 8, positions=DIGITS + 8, thinking_prompt=PROMPT)


def text_of(draw: random.Random) -> str:
    """A text of the corpus."""
    digits = "".join(str(draw.randrange(10)) for _ in range(DIGITS))
    ordered = sorted(digits)
    return f"{digits}={ordered[0]}{ordered[RANK - 1]}{ordered[-1]}ab"


def thought_of(text: str, position: int, draw: random.Random) -> str:
    """A thought of 1 to ``LONG`` tokens before the token at a position."""
    ordered = ""
    if position == DIGITS + 2:
        ordered = "".join(sorted(text[:DIGITS])[draw.randrange(RANK) : RANK])
    return "." * draw.randint(0 if ordered else 1, LONG - len(ordered)) + ordered


def example(draw: random.Random) -> tuple[str, str]:
    """A text as it is, or a thought about one of its tokens with any budget in the prompt."""
    text = text_of(draw)
    if draw.random() < 0.3:
        return text[:1], text[1:] + "\n"
    position = draw.randrange(DIGITS, len(text))
    prompt = PROMPT.format(prompt=text[:position], budget=draw.randint(SHORT, LONG))
    return prompt, f"<think>{thought_of(text, position, draw)}</think>{text[position]}\n"


def texts_of(seed: int, name: str, count: int) -> list[str]:
    """``count`` texts of a named set, the same at every call."""
    return [text_of(random.Random(derive_seed(seed, name, number))) for number in range(count)]


def targets(
    method: RMT, texts: list[str], model: PreTrainedModel, codes: PreTrainedTokenizerBase, seed: int
) -> list[dict[str, Any]]:
    """Rows for the tokens behind the digits, which nothing tells, in thirds by entropy."""
    import torch

    rows = [row for row in method.rows(texts, model, codes, seed) if row["position"] >= DIGITS]
    found = torch.tensor([row["entropy"] for row in rows]).double()
    bounds = found.quantile(torch.tensor([1 / 3, 2 / 3]).double()).tolist()
    return [row | {"difficulty": sum(row["entropy"] > bound for bound in bounds)} for row in rows]


def predicted(
    context: Context, model: PreTrainedModel, codes: PreTrainedTokenizerBase, texts: list[str], budget: int
) -> dict[str, list[float]]:
    """Of one prediction a text, at each position in turn: whether it is right, and the tokens of its thought."""
    import torch

    from ..reinforcement.budgets import thinking_and_rest
    from ..reinforcement.rmt import matches

    places = [DIGITS + number % (len(text) - DIGITS) for number, text in enumerate(texts)]
    prompts = [PROMPT.format(prompt=text[:at], budget=budget) for text, at in zip(texts, places, strict=True)]
    torch.manual_seed(derive_seed(context.seed, "predicted"))
    said = answers(model, codes, prompts, 2 * LONG + 5, sample=True)
    right = [float(matches(one, text[at])) for one, text, at in zip(said, texts, places, strict=True)]
    lengths = []
    for one in said:
        parts = thinking_and_rest(one)
        lengths.append(float(len(codes(one if parts is None else parts[0])["input_ids"])))
    return {MATCH: right, LENGTH: lengths}


def plain_loss(model: PreTrainedModel, codes: PreTrainedTokenizerBase, texts: list[str]) -> list[float]:
    """Mean ``-log p`` of the tokens behind the digits, for every text."""
    import torch

    from ..core.logprobs import logps_from_logits

    ids = torch.tensor(codes(texts)["input_ids"]).to(model.device)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, DIGITS - 1 : -1].float()
    found: list[float] = (-logps_from_logits(logits, ids[:, DIGITS:]).mean(1)).tolist()
    return found


def run(context: Context) -> Arms:
    size = SIZES[context.scale]
    codes = character_tokenizer("0123456789=ab[].", words=TAGS)
    probe = texts_of(0, "probe", 128)

    def share(model: PreTrainedModel) -> float:
        return mean(predicted(context, model, codes, probe, (LONG + SHORT) // 2)[MATCH])

    start = warmed_up(context, size, codes, example, share, 0.4 if context.quick else GOAL, lr=5e-3)
    corpus = texts_of(context.seed, "corpus", 256)
    rows = targets(method_of("RMT"), corpus, start, codes, context.seed)
    test, tuning = (texts_of(context.seed, name, size.test) for name in ("test", "tuning"))

    def measured(model: PreTrainedModel, budget: int) -> dict[str, Any]:
        return predicted(context, model, codes, test, budget) | {DIRECT: plain_loss(model, codes, test)}

    arms: Arms = {"start": context.part("start, measured", lambda: measured(start, SHORT))}

    def budget(arm: str) -> int:
        return SHORT if method_of(arm).budget_gamma < 1 else LONG

    def learner(arm: str) -> Learner:
        return Learner(method_of(arm).recipe(), None, method_of(arm).arguments())

    def tuned(arm: str, policy: PreTrainedModel) -> float:
        return mean(predicted(context, policy, codes, tuning, budget(arm))[MATCH])

    def kept(arm: str, policy: PreTrainedModel, logs: dict[str, list[float]]) -> dict[str, Any]:
        curve = [round(count / size.batch, 2) for count in logs["tokens"]]
        return {"curve": curve} | measured(policy, budget(arm))

    found = learnt(context, size, start, codes, rows, 2 * LONG + 5, ARMS, learner, tuned, kept)
    for arm, figures in found.items():
        context.artifacts[f"{arm}: tokens of a rollout by update"] = figures.pop("curve")
    return arms | found


REPRODUCTION = Reproduction(
    name="rmt",
    summary="thinking before single tokens of texts, with RMT's parts and without: predictions, thoughts, loss",
    run=run,
    claims=[
        Claim(LENGTH, "RMT", "reinforcement alone", "188 against 872 tokens", higher_is_better=False, why=WHY),
        Claim(MATCH, "RMT", "reinforcement alone", "59.12 against 35.85", kind="difference", why=WHY),
        Claim(
            DIRECT,
            "RMT",
            "without next-token loss",
            "(the loss is what the part is for)",
            kind="difference",
            higher_is_better=False,
            why=WHY,
        ),
        Claim(MATCH, "RMT", "without next-token loss", "46.87 against 33.84", kind="difference", why=WHY),
        Claim(
            MATCH,
            "reinforcement alone",
            "start",
            "(positive control: it learns here)",
            kind="difference",
            why="Of the bed.",
        ),
        Claim(
            DIRECT,
            "reinforcement alone",
            "start",
            "(bed: it forgets plain prediction here)",
            kind="difference",
            why="Of the bed: a larger loss is what RMT is to prevent.",
        ),
    ],
    extra=("train", "trl"),
    scales=("quick", "cpu", "gpu"),
)
