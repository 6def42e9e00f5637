"""TW-GRPO's claims: with partial credit fewer groups teach nothing, and weights find the positions that decide.

A small model reads a table of four things (``A red big``) and is asked which of them are, say, red: one to three are.
It answers behind a fixed preamble, ``<think>look</think><answer>A,C</answer>``. After a short supervised warm-up it
names exactly the right things now and then, as a bed needs. Two things are measured on the same rollouts:

- the share of groups of eight whose rewards are all equal, with the exact-set reward and with the partial one;
- the mean weight of the answer's own characters and that of the preamble's.

So the first concerns the reward and the second the weight. Nothing is trained with them: what they gain in accuracy is
not measured.
"""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING

from ..core.rng import derive_seed
from .base import Arms, Claim, Context, Reproduction

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COLOURS, SIZES, LETTERS, GROUP = ("red", "blue"), ("big", "small"), "ABCD", 8
HEAD, TAIL = "<think>look</think><answer>", "</answer>\n"
EQUAL = "groups with equal rewards"
WEIGHT = "mean weight of a position"
WHY = (
    "The paper trains Qwen2.5-VL-7B on videos for 500 steps and reports accuracy; here a text model of 0.1M weights "
    "reads tables of four things."
)


def question(draw: random.Random) -> tuple[str, str]:
    """A table with a question, and its right options."""
    while True:
        things = [(draw.choice(COLOURS), draw.choice(SIZES)) for _ in LETTERS]
        asked = draw.choice(COLOURS + SIZES)
        right = [letter for letter, thing in zip(LETTERS, things, strict=True) if asked in thing]
        if 1 <= len(right) <= 3:
            table = ";".join(f"{letter} {' '.join(thing)}" for letter, thing in zip(LETTERS, things, strict=True))
            return f"{table};{asked}?", ",".join(right)


def example(draw: random.Random) -> tuple[str, str]:
    """A question with its answer."""
    asked, right = question(draw)
    return asked, f"{HEAD}{right}{TAIL}"


def questions(seed: int, name: str, count: int) -> list[dict[str, str]]:
    """``count`` rows of a named set, the same at every call."""
    rows = [question(random.Random(derive_seed(seed, name, number))) for number in range(count)]
    return [{"prompt": asked, "solution": right} for asked, right in rows]


def start(context: Context) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model that writes the format and knows a part of the task."""
    import torch

    from .beds.small_models import answer_batches, character_tokenizer, fit, small_model

    tokenizer = character_tokenizer("".join(sorted(set("".join([*COLOURS, *SIZES, LETTERS, HEAD, TAIL[:-1], " ;?,"])))))
    torch.manual_seed(derive_seed(context.seed, "start"))
    model = small_model(len(tokenizer), hidden=64, layers=2, end=tokenizer.eos_token_id, context=128)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    probe = questions(0, "probe", 64)
    draw = random.Random(derive_seed(context.seed, "warm-up"))

    def enough() -> bool:
        return sum(graded(model, tokenizer, probe, sample=True)) / len(probe) >= 0.2

    fit(model, answer_batches(draw, example, tokenizer, 32), 1500, 2e-3, context.report, "warm-up", enough, 20)
    return model, tokenizer


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]], sample: bool
) -> list[str]:
    from ..training.datasets.sentiment import continuations

    return continuations(model, tokenizer, [row["prompt"] for row in rows], 48, 256, sample)


def graded(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]], sample: bool
) -> list[float]:
    """1 for exactly the right options, for every row."""
    from ..reinforcement.tw_grpo import hard_multichoice_reward

    return hard_multichoice_reward(answers(model, tokenizer, rows, sample), [row["solution"] for row in rows])


def run(context: Context) -> Arms:
    import torch

    from ..reinforcement.tw_grpo import hard_multichoice_reward, soft_multichoice_reward

    model, tokenizer = start(context)
    rows = questions(context.seed, "groups", 24 if context.quick else 128)
    many = [row for row in rows for _ in range(GROUP)]
    torch.manual_seed(derive_seed(context.seed, "rollouts"))
    texts = answers(model, tokenizer, many, sample=True)
    solutions = [row["solution"] for row in many]
    arms: Arms = {}
    rewards = {"exact sets": hard_multichoice_reward, "partial credit": soft_multichoice_reward}
    for arm, reward in rewards.items():
        found = torch.tensor(reward(texts, solutions)).view(-1, GROUP)
        arms[arm] = {EQUAL: (found.amax(1) == found.amin(1)).float().tolist()}
    context.artifacts["right in a sample"] = sum(rewards["exact sets"](texts, solutions)) / len(texts)
    preamble, own = weights(model, tokenizer, rows, texts)
    arms["preamble"], arms["answer"] = {WEIGHT: preamble}, {WEIGHT: own}
    return arms


def weights(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]], texts: list[str]
) -> tuple[list[float], list[float]]:
    """Mean weight of the preamble's positions and of the answer's, for every group that keeps the format."""
    import torch

    from ..reinforcement.tw_grpo import group_divergence, position_weights

    preamble, own = [], []
    for number, row in enumerate(rows):
        group = texts[number * GROUP : (number + 1) * GROUP]
        if not all(re.fullmatch(rf"{re.escape(HEAD)}[A-D,]+</answer>\n?", text) for text in group):
            continue
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = [tokenizer(text.rstrip("\n"))["input_ids"] + [tokenizer.eos_token_id] for text in group]
        width = max(map(len, ids))
        padded = torch.tensor([[*line, *[tokenizer.pad_token_id] * (width - len(line))] for line in ids])
        mask = torch.arange(width) < torch.tensor([len(line) for line in ids])[:, None]
        whole = torch.cat([torch.tensor([prompt] * GROUP), padded], 1)
        with torch.no_grad():
            logits = model(input_ids=whole).logits[:, len(prompt) - 1 : -1]
        weight = position_weights(group_divergence(logits, mask), mask)
        head = len(HEAD)
        ends = min(len(text.rstrip("\n")) for text in group) - len("</answer>")
        preamble.append(weight[0, :head].mean().item())
        own.append(weight[0, head:ends].mean().item())
    return preamble, own


REPRODUCTION = Reproduction(
    name="tw-grpo",
    summary="exact-set and partial rewards on the same rollouts of a small model, and the weights of their positions",
    run=run,
    claims=[
        Claim(
            EQUAL,
            "partial credit",
            "exact sets",
            "(partial credit gives graded rewards)",
            kind="difference",
            higher_is_better=False,
            why=WHY,
        ),
        Claim(WEIGHT, "answer", "preamble", "(deciding positions weigh more)", kind="difference", why=WHY),
    ],
    extra=("train", "trl"),
)
