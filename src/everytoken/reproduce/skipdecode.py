"""SkipDecode's claim: two to five times fewer layers a token with little loss, where plain truncation loses more.

A model is trained on the spot to write sums with every running total, then tuned for a few steps for each depth: with
SkipDecode's schedule, and as a truncated model of the same average depth. One more arm is not tuned at all.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import torch

from .base import Arms, Claim, Context, Reproduction, Values, mean
from .beds.small_models import answer_batches, character_tokenizer, fit, small_model, worked_sum

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..generation.skipdecode import SkipDecode

CHARACTERS = "0123456789+=;#"
SPEEDUPS = (2, 3, 4)
WHY = (
    "The paper tunes OPT-1.3B and 6.7B on E2E, TL;DR and CNN-DM; here a model of 0.6M weights and 8 layers, trained "
    "for minutes, writes worked "
    "sums. Each layer is an eighth of it, so each one missing weighs more. (A data-to-text task in the manner of E2E "
    "was tried first: in the "
    "minutes there were, the full model learnt its sentences and not its attributes, and every arm scored alike.)"
)
WHY_SPEED = (
    "Decoding of a batch of 16 on two cores: embedding, head, sampling and Python cost the same at any depth, so the "
    "ratio stays "
    "below the nominal one."
)


def overlap(text: str, reference: str) -> float:
    """ROUGE-L of characters: F1 of the longest common subsequence."""
    table = [[0] * (len(reference) + 1) for _ in range(len(text) + 1)]
    for i, a in enumerate(text):
        for j, b in enumerate(reference):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    common = table[-1][-1]
    return 2 * common / (len(text) + len(reference)) if text and reference else 0.0


def quality(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, decoder: SkipDecode | None, work: list[tuple[str, str]]
) -> dict[str, Values]:
    """Exact match and ROUGE-L of every item of ``work``, and tokens a second, in batches of 16."""
    exact: list[float] = []
    score: list[float] = []
    tokens, spent = 0, 0.0
    for first in range(0, len(work), 16):
        part = work[first : first + 16]
        inputs = tokenizer([prompt for prompt, _ in part], return_tensors="pt", padding=True)
        began = time.perf_counter()
        output = model.generate(
            **inputs, max_new_tokens=64, do_sample=False, custom_generate=decoder, pad_token_id=tokenizer.pad_token_id
        )
        spent += time.perf_counter() - began
        new = output[:, inputs["input_ids"].shape[1] :]
        tokens += int((new != tokenizer.pad_token_id).sum())
        for row, (_, wanted) in zip(new, part, strict=True):
            text = tokenizer.decode(row).replace(tokenizer.pad_token, "").split("\n")[0]
            exact.append(float(text == wanted.strip()))
            score.append(overlap(text, wanted.strip()))
    return {"exact match": exact, "ROUGE-L": score, "tokens per second": tokens / spent}


def run(context: Context) -> Arms:
    import copy

    from ..generation.skipdecode import LinearDepth, SkipDecode, skip_layers, speedup

    tokenizer = character_tokenizer(CHARACTERS)
    torch.manual_seed(context.seed)
    rng = random.Random(context.seed)
    hidden, layers, steps, tuning = (32, 4, 40, 10) if context.quick else (80, 8, 500, 240)
    terms = 2 if context.quick else 4
    batches = answer_batches(rng, lambda r: worked_sum(r, terms), tokenizer, 64)
    base = small_model(len(tokenizer), hidden, layers, end=tokenizer.eos_token_id, context=256)
    trained = fit(base, batches, steps, 2e-3, context.report, "the full model")
    # learning is sudden and its moment differs by seed: tuning starts from a model that can do its task
    checks = [worked_sum(random.Random(seed), terms) for seed in range(64)]
    while not context.quick and trained < 1500 and mean(quality(base, tokenizer, None, checks)["exact match"]) < 0.95:
        trained += fit(base, batches, 250, 2e-3, context.report, "the full model, again")
    context.artifacts["steps of the full model"] = trained
    test = random.Random(10_000 + context.seed)
    work = [worked_sum(test, terms) for _ in range(32 if context.quick else 128)]
    length = len(work[0][1])  # tokens of an answer, give or take one
    arms: Arms = {}
    tuned = copy.deepcopy(base)
    fit(tuned, batches, tuning, 1e-3, context.report, "full depth, tuned")
    arms["full depth"] = quality(tuned, tokenizer, None, work)
    nominal = {}
    for ratio in SPEEDUPS:
        schedule = LinearDepth.for_speedup(layers, ratio, length)
        nominal[f"{ratio}x"] = speedup(schedule, layers, length)
        skipping = copy.deepcopy(base)
        with skip_layers(skipping, schedule):
            fit(skipping, batches, tuning, 1e-3, context.report, f"SkipDecode {ratio}x")
        context.report(f"SkipDecode {ratio}x writes", 0, 0)
        arms[f"SkipDecode {ratio}x"] = quality(skipping, tokenizer, SkipDecode(schedule), work)
        arms[f"not tuned {ratio}x"] = quality(base, tokenizer, SkipDecode(schedule), work)
        short = copy.deepcopy(base)
        kept = max(1, round(layers / ratio))
        short.model.layers = short.model.layers[:kept]
        short.config.num_hidden_layers = kept
        fit(short, batches, tuning, 1e-3, context.report, f"truncated {ratio}x")
        arms[f"truncated {ratio}x"] = quality(short, tokenizer, None, work)
    context.artifacts["nominal speed-up"] = nominal
    return arms


REPRODUCTION = Reproduction(
    name="skipdecode",
    summary=(
        "worked sums by an 8-layer model tuned for SkipDecode's schedules, against full depth and truncation to the "
        "same mean depth"
    ),
    run=run,
    claims=[
        *(
            Claim(
                "tokens per second",
                f"SkipDecode {ratio}x",
                "full depth",
                f"{ratio}x nominal",
                why=WHY_SPEED if ratio == 2 else "",
            )
            for ratio in SPEEDUPS
        ),
        *(
            Claim(
                "ROUGE-L",
                f"SkipDecode {ratio}x",
                "full depth",
                "negligible loss up to 4x or 5x",
                kind="difference",
                why=WHY if ratio == 2 else "",
            )
            for ratio in SPEEDUPS
        ),
        *(
            Claim("exact match", f"SkipDecode {ratio}x", "full depth", "negligible loss", kind="difference")
            for ratio in SPEEDUPS
        ),
        *(
            Claim(
                metric,
                f"SkipDecode {ratio}x",
                f"truncated {ratio}x",
                "better",
                kind="difference",
                why="The same mean depth and the same steps of tuning." if (ratio, metric) == (2, "ROUGE-L") else "",
            )
            for metric in ("ROUGE-L", "exact match")
            for ratio in SPEEDUPS
        ),
        Claim("exact match", "SkipDecode 2x", "not tuned 2x", "tuning is needed", kind="difference"),
    ],
    seeds=3,
)
