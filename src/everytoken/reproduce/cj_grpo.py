"""EOSER's, ASS's and CJ-GRPO's claims: fewer forwards at like accuracy, and a loss that scores the steps taken.

Two beds. In the first a model writes a sum of digits that adds to a number, behind which it fills up with end tokens:
``23=9+8+6``. How long the sum will be is open, so end tokens are what a full canvas is surest of at first. Nothing is
trained but the start. In the second, sudokus are filled in three growing steps, and the same rollouts are learnt from
with the likelihood of those steps, and with that of one step for the whole text.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from ..core.rng import derive_seed
from .base import Arms, Claim, Context, Reproduction
from .beds.canvas_rollouts import trained
from .beds.sudoku import SudokuBed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

MARKS = "0123456789+="
END, MASK, LENGTH = len(MARKS), len(MARKS) + 1, 16
LOW, HIGH, MOST = 12, 45, 8
RIGHT, TOKENS, FORWARDS = "right sums", "tokens of an answer", "forwards of an answer"
BLOCKS, FULL, EOSER, ASS, BOTH = "four blocks", "full", "full + EOSER", "ASS", "ASS + EOSER"
SOLVED, CONSISTENT, ONE = "sudokus solved in three growing steps", "CJ-GRPO", "one step, same rollouts"
WHY = "a network of 0.1M weights and answers of 16 tokens; the paper's has 8B and 256"
BED = SudokuBed()


def example(rng: random.Random) -> tuple[str, str]:
    """A number with its equals sign, and a sum of digits that adds to it."""
    total = rng.randint(LOW, HIGH)
    count = rng.randint(-(-total // 9), MOST)
    left, digits = total, []
    for behind in range(count - 1, -1, -1):
        digit = rng.randint(max(1, left - 9 * behind), min(9, left - behind))
        digits.append(digit)
        left -= digit
    rng.shuffle(digits)
    return f"{total}=", "+".join(map(str, digits))


def right(prompt: str, answer: str) -> float:
    """1.0 where an answer is digits with plus signs between them that add to the number."""
    parts = answer.split("+")
    good = all(len(part) == 1 and part in "123456789" for part in parts)
    return float(good and sum(map(int, parts)) == int(prompt[:-1]))


def encoded(text: str) -> list[int]:
    return [MARKS.index(mark) for mark in text]


def rows_of(rng: random.Random, count: int) -> torch.Tensor:
    """``[count, 3 + LENGTH]`` ids, filled up with end tokens."""
    import torch

    found = [(encoded(prompt), encoded(answer)) for prompt, answer in (example(rng) for _ in range(count))]
    return torch.tensor([first + second + [END] * (LENGTH - len(second)) for first, second in found])


def start(context: Context) -> PreTrainedModel:
    import torch

    from ..architectures.any_order.configuration_any_order import AnyOrderConfig
    from ..architectures.any_order.losses import mdlm_loss
    from ..architectures.any_order.modeling_any_order import AnyOrderLM
    from ..training.stepwise import Stage, fit

    seed = derive_seed(context.seed, "sums")
    torch.manual_seed(seed)
    shape = AnyOrderConfig(
        vocab_size=MASK + 1, hidden_size=64, intermediate_size=128, num_hidden_layers=3, mask_token_id=MASK,
        eos_token_id=END,
    )  # fmt: skip
    model = AnyOrderLM(shape)

    def loss(step: int) -> torch.Tensor:
        ids = rows_of(random.Random(derive_seed(seed, "batch", step)), 64)
        response = torch.arange(ids.shape[1]).expand(len(ids), -1) >= 3
        return mdlm_loss(
            model, ids, response, generator=torch.Generator().manual_seed(derive_seed(seed, "masks", step))
        )

    fit(model, loss, Stage("sums", 60 if context.quick else 3000, 3e-3, warmup=0.03, hold=0.5), None, context.report)
    return model.eval()


def decoded(context: Context) -> Arms:
    """Every way of decoding on the same questions by one start."""
    import torch

    from ..decoding.canvas.denoising import DenoisingSampler
    from ..reinforcement.cj_grpo import AscendingSteps, EosEarlyRejection

    model, count = start(context), 48 if context.quick else 512
    asked = [example(random.Random(derive_seed(context.seed, "test", index)))[0] for index in range(count)]
    ids = torch.tensor([encoded(prompt) for prompt in asked])
    ways: dict[str, dict[str, Any]] = {
        BLOCKS: dict(steps=LENGTH, block_length=4),
        FULL: dict(steps=LENGTH),
        EOSER: dict(steps=LENGTH, transform=EosEarlyRejection(END, 0.01)),
        ASS: dict(schedule=AscendingSteps()),
        BOTH: dict(schedule=AscendingSteps(), transform=EosEarlyRejection(END, 0.01, ascending=True)),
    }
    arms: Arms = {}
    for name, settings in ways.items():
        context.report(name, 0, 0)
        sampler = DenoisingSampler(gen_length=LENGTH, temperature=0.5, **settings)
        found = sampler(model, ids, seeds=range(count))
        texts = [row[: row.index(END)] if END in row else row for row in found.final_ids[:, 3:].tolist()]
        answers = ["".join(MARKS[item] for item in row) for row in texts]
        arms[name] = {
            RIGHT: [right(prompt, answer) for prompt, answer in zip(asked, answers, strict=True)],
            TOKENS: [float(len(row)) for row in texts],
            FORWARDS: [float(found.forwards)] * count,
        }
    return arms


def run(context: Context) -> Arms:
    from ..decoding.canvas.denoising import DenoisingSampler
    from ..reinforcement.cj_grpo import CJGRPO, AscendingSteps

    arms = context.part("decoding", lambda: decoded(context))
    methods = {ONE: CJGRPO(consistent=False), CONSISTENT: CJGRPO()}
    return arms | trained(context, BED, methods, lambda: DenoisingSampler(schedule=AscendingSteps()), SOLVED)


REPRODUCTION = Reproduction(
    name="cj-grpo",
    summary="end tokens held back, steps that grow, and a loss of the steps that were taken",
    run=run,
    claims=[
        Claim(FORWARDS, BOTH, BLOCKS, "8 forwards in place of 128", higher_is_better=False, why=WHY),
        Claim(RIGHT, BOTH, BLOCKS, "competitive with blocks", "difference", threshold=-0.05, why=WHY),
        Claim(RIGHT, EOSER, FULL, "better than a plain full canvas", "difference", why=WHY),
        Claim(RIGHT, BOTH, ASS, "better with both", "difference", why=WHY),
        Claim(TOKENS, EOSER, FULL, "longer answers", "difference", why=WHY),
        Claim(SOLVED, CONSISTENT, ONE, "above one-step likelihoods", "difference", why=WHY),
        Claim(SOLVED, CONSISTENT, "start", "(positive control: it learns here)", "difference", why="Of the bed."),
    ],
    extra=("train", "trl"),
    bed="sudoku",
)
