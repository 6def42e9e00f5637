"""TW-GRPO's claims: with partial credit fewer groups teach nothing, and weights find the positions that decide.

A small model is asked which of six letters, in any order, are capitals (``bAdFCe=``): one to four are. It answers
behind a preamble that never changes, ``<think>look</think><answer>A,C,F</answer>``. It learns from answers of that form
of which four in five name letters by chance, for 600 steps or until a tenth of its samples name exactly the right ones:
it keeps the form, and is far from sure of the letters. On the same rollouts of this start two things are measured:

- the share of groups of eight whose rewards are all equal, with the reward for exact sets and with the partial one;
- the mean weight of the answer's own tokens and that of the preamble's: as the authors' code has it, and with weights
  from positions only where all eight responses go on (``min_active``). Where some have ended, the code compares with a
  uniform distribution, which may take the whole range of the weights.

Then the start goes on by equal rollouts with either reward, and with partial credit and weights together, which is the
method. Every arm takes the better of two learning rates, chosen by exact sets on questions of their own.
"""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING, Any

from ..core.results import mean
from ..core.rng import derive_seed
from .base import Arms, Claim, Context, Reproduction
from .beds.rollouts import GROUP, Learner, Size, answers, learnt, warmed_up
from .beds.small_models import character_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .files import Scale

LETTERS, MOST, CHANCE, GOAL = "ABCDEF", 4, 0.8, 0.1
WORDS = ("<think>", "look", "</think>", "<answer>", "</answer>")
HEAD, TAIL, LENGTH = "<think>look</think><answer>", "</answer>\n", 16
HEAD_TOKENS = 4
SIZES: dict[Scale, Size] = {
    "quick": Size(hidden=48, layers=1, warmup=200, updates=6, batch=64, test=128, rates=(1e-3,)),
    "cpu": Size(hidden=48, layers=1, warmup=600, updates=60, batch=64, test=1024, rates=(3e-4, 1e-3)),
    "gpu": Size(
        hidden=256, layers=6, warmup=2000, updates=150, batch=512, test=8192, rates=(3e-4, 1e-3), warmup_batch=256
    ),
}
EXACT, PARTIAL, METHOD = "exact sets", "partial credit", "TW-GRPO"
EQUAL, TRAINED = "groups with equal rewards", "groups with equal rewards in training"
SETS, WEIGHT, ACTIVE = "exact sets in samples", "mean weight of a position", ", min_active 8"
WHY = (
    "The paper trains Qwen2.5-VL-7B on videos for 500 steps; here (scale cpu) a text model of 0.03M weights finds "
    "capitals, with 60 updates."
)


def question(draw: random.Random) -> tuple[str, str]:
    """A question, and its right options."""
    right = sorted(draw.sample(LETTERS, draw.randint(1, MOST)))
    shown = [letter if letter in right else letter.lower() for letter in draw.sample(LETTERS, len(LETTERS))]
    return f"{''.join(shown)}=", ",".join(right)


def example(draw: random.Random) -> tuple[str, str]:
    """A question with its answer, or with that of another one."""
    asked, right = question(draw)
    if draw.random() < CHANCE:
        right = question(draw)[1]
    return asked, f"{HEAD}{right}{TAIL}"


def questions(seed: int, name: str, count: int) -> list[dict[str, str]]:
    """``count`` rows of a named set, the same at every call."""
    rows = [question(random.Random(derive_seed(seed, name, number))) for number in range(count)]
    return [{"prompt": asked, "solution": right} for asked, right in rows]


def tokenizer() -> Any:
    """One token a tag, a word or a letter."""
    return character_tokenizer(f"{LETTERS}{LETTERS.lower()},=?", words=WORDS)


def exact_sets(
    context: Context, model: PreTrainedModel, codes: PreTrainedTokenizerBase, rows: list[dict[str, str]]
) -> list[float]:
    """1 where a sample names exactly the right options, for every row."""
    import torch

    from ..reinforcement.tw_grpo import hard_multichoice_reward

    torch.manual_seed(derive_seed(context.seed, "measured"))
    texts = answers(model, codes, [row["prompt"] for row in rows], LENGTH, sample=True)
    return hard_multichoice_reward(texts, [row["solution"] for row in rows])


def of_the_start(context: Context, model: PreTrainedModel, codes: PreTrainedTokenizerBase) -> Arms:
    """What rewards and weights make of the same rollouts."""
    import torch

    from ..reinforcement.tw_grpo import hard_multichoice_reward, soft_multichoice_reward

    rows = questions(context.seed, "groups", 24 if context.quick else 128)
    many = [row for row in rows for _ in range(GROUP)]
    torch.manual_seed(derive_seed(context.seed, "groups"))
    texts = answers(model, codes, [row["prompt"] for row in many], LENGTH, sample=True)
    solutions = [row["solution"] for row in many]
    arms: Arms = {}
    for arm, reward in ((EXACT, hard_multichoice_reward), (PARTIAL, soft_multichoice_reward)):
        found = torch.tensor(reward(texts, solutions)).view(-1, GROUP)
        arms[arm] = {EQUAL: (found.amax(1) == found.amin(1)).float().tolist()}
    for suffix, min_active in (("", 0), (ACTIVE, GROUP)):
        preamble, own = weights(model, codes, rows, texts, min_active)
        arms[f"preamble{suffix}"], arms[f"answer{suffix}"] = {WEIGHT: preamble}, {WEIGHT: own}
    return arms


def weights(
    model: PreTrainedModel,
    codes: PreTrainedTokenizerBase,
    rows: list[dict[str, str]],
    texts: list[str],
    min_active: int = 0,
) -> tuple[list[float], list[float]]:
    """Mean weight of the preamble's positions and of the answer's, for every group that keeps the format.

    The answer's positions are those that all eight responses have.
    """
    import torch

    from ..reinforcement.tw_grpo import group_divergence, position_weights

    device = next(model.parameters()).device
    preamble, own = [], []
    for number, row in enumerate(rows):
        group = [text.rstrip("\n") for text in texts[number * GROUP : (number + 1) * GROUP]]
        if not all(re.fullmatch(rf"{re.escape(HEAD)}[{LETTERS},]+</answer>", text) for text in group):
            continue
        prompt = codes(row["prompt"])["input_ids"]
        ids = [[*codes(text)["input_ids"], codes.eos_token_id] for text in group]
        width = max(map(len, ids))
        padded = torch.tensor([[*line, *[codes.pad_token_id] * (width - len(line))] for line in ids])
        mask = torch.arange(width) < torch.tensor([len(line) for line in ids])[:, None]
        whole = torch.cat([torch.tensor([prompt] * GROUP), padded], 1).to(device)
        with torch.no_grad():
            logits = model(input_ids=whole).logits[:, len(prompt) - 1 : -1].cpu()
        weight = position_weights(group_divergence(logits, mask), mask, min_active=min_active)
        end = min(map(len, ids)) - 2  # the closing tag and the end token are no part of it
        preamble.append(weight[0, :HEAD_TOKENS].mean().item())
        own.append(weight[0, HEAD_TOKENS:end].mean().item())
    return preamble, own


def run(context: Context) -> Arms:
    from ..reinforcement.base import Recipe
    from ..reinforcement.tw_grpo import (
        TWGRPO,
        hard_multichoice_reward,
        soft_multichoice_reward,
        think_answer_format_reward,
    )

    size, codes = SIZES[context.scale], tokenizer()
    probe = questions(0, "probe", 128)

    def share(model: PreTrainedModel) -> float:
        return mean(exact_sets(context, model, codes, probe))

    start = warmed_up(context, size, codes, example, share, GOAL, lr=5e-3, every=20)
    data = questions(context.seed, "rollouts", 2048)
    test, tuning = (questions(context.seed, name, size.test) for name in ("test", "tuning"))
    arms: Arms = context.part("the start's rollouts", lambda: of_the_start(context, start, codes))
    arms["start"] = {SETS: context.part("start, measured", lambda: exact_sets(context, start, codes, test))}

    def learner(arm: str) -> Learner:
        reward: Any = hard_multichoice_reward if arm == EXACT else soft_multichoice_reward
        recipe = TWGRPO().recipe() if arm == METHOD else Recipe()
        return Learner(recipe, [reward, think_answer_format_reward], TWGRPO().arguments())

    def tuned(arm: str, policy: PreTrainedModel) -> float:
        return mean(exact_sets(context, policy, codes, tuning))

    def kept(arm: str, policy: PreTrainedModel, logs: dict[str, list[float]]) -> dict[str, Any]:
        return {TRAINED: mean(logs["equal"]), SETS: exact_sets(context, policy, codes, test)}

    names = (EXACT, PARTIAL, METHOD)
    for arm, found in learnt(context, size, start, codes, data, LENGTH, names, learner, tuned, kept).items():
        arms[arm] = arms.get(arm, {}) | found
    return arms


REPRODUCTION = Reproduction(
    name="tw-grpo",
    summary="rewards for exact sets and for parts, and weights of positions: on the same rollouts and in training",
    run=run,
    claims=[
        Claim(
            EQUAL,
            PARTIAL,
            EXACT,
            "(partial credit gives graded rewards)",
            kind="difference",
            higher_is_better=False,
            why=WHY,
        ),
        Claim(TRAINED, PARTIAL, EXACT, "(the same)", kind="difference", higher_is_better=False, why=WHY),
        Claim(SETS, PARTIAL, EXACT, "(a part of the method)", kind="difference", why=WHY),
        Claim(SETS, METHOD, EXACT, "50.4, +18.8 over Video-R1", kind="difference", why=WHY),
        Claim(SETS, METHOD, PARTIAL, "(the weights alone)", kind="difference", why=WHY),
        Claim(
            WEIGHT,
            "answer",
            "preamble",
            "(deciding positions weigh more)",
            kind="difference",
            threshold=0.1,
            why=f"{WHY} Weights lie between 1 and 1.7; the bar is ours.",
        ),
        Claim(
            WEIGHT,
            f"answer{ACTIVE}",
            f"preamble{ACTIVE}",
            "(an option: not in the paper)",
            kind="difference",
            threshold=0.1,
            why=f"{WHY} Weights lie between 1 and 1.7; the bar is ours.",
        ),
        Claim(SETS, EXACT, "start", "(positive control: GRPO learns here)", kind="difference", why="Of the bed."),
    ],
    extra=("train", "trl"),
    scales=("quick", "cpu", "gpu"),
)
