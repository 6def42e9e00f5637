"""SkipDecode's claim: two to five times fewer layers a token with little loss, where plain truncation loses more.

A model is trained on the spot to put a restaurant's attributes into sentences (in the manner of the E2E task), then tuned for a few steps
for each depth: with SkipDecode's schedule, and as a truncated model of the same average depth. One more arm is not tuned at all.
"""

from __future__ import annotations

import random
import time
from typing import Any

import torch

from .base import Arms, Claim, Context, Reproduction
from .small import answer_batches, fit, small_model

NAMES = [
    "Alma",
    "Bosco",
    "Cedar",
    "Delta",
    "Ember",
    "Fjord",
    "Grove",
    "Haven",
    "Iris",
    "Juno",
    "Kite",
    "Lumen",
    "Maple",
    "Nova",
    "Onyx",
    "Pearl",
    "Quill",
    "River",
    "Saffron",
    "Tulip",
]
FOODS = ["Italian", "Indian", "French", "Chinese", "Japanese", "English", "Mexican", "Greek", "Thai", "Turkish"]
AREAS = ["riverside", "city", "harbour", "market", "station", "castle", "park"]
KINDS = ["restaurant", "pub", "cafe", "bistro"]
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
PRICES = {"cheap": "low", "moderate": "fair", "high": "high"}
SPEEDUPS = (2, 3, 4)
WHY = (
    "The paper tunes OPT-1.3B and 6.7B on E2E, TL;DR and CNN-DM; here a model of 2.4M weights and 12 layers, trained for minutes, turns six "
    "attributes in random order into two sentences. Its layers are few, so each one missing weighs more."
)
WHY_SPEED = (
    "Decoding of a batch of 16 on two cores: embedding, head, sampling and Python cost the same at any depth, so the ratio stays "
    "below the nominal one."
)


def example(rng: random.Random) -> tuple[str, str]:
    """Attributes in random order, and the text that says them in a fixed order with small inferences (counts, relations)."""
    name, other = rng.sample(NAMES, 2)
    food, area, kind = rng.choice(FOODS), rng.choice(AREAS), rng.choice(KINDS)
    rating, seats = rng.randint(1, 9), rng.randint(1, 9)
    price, family = rng.choice(list(PRICES)), rng.random() < 0.5
    slots = [
        f"name {name}", f"food {food}", f"area {area}", f"kind {kind}", f"rating {NUMBERS[rating]}",
        f"tables {NUMBERS[seats]}", f"price {price}", f"near {other}", f"family {'yes' if family else 'no'}",
    ]  # fmt: skip
    rng.shuffle(slots)
    relation = "more" if rating > seats else "fewer" if rating < seats else "as many"
    text = (
        f"{name} is a {kind} in the {area} area that serves {food} food at {PRICES[price]} prices . "
        f"It has {NUMBERS[seats]} tables and {relation} stars , near {other} , and families are "
        f"{'welcome' if family else 'not welcome'} . Twice its stars minus its tables is "
        f"{'below zero' if 2 * rating < seats else NUMBERS[min(2 * rating - seats, 10)]} ."
    )
    return " | ".join(slots) + " =", text + " <end>"


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(0)
    words = dict.fromkeys(["<end>", "<pad>"])
    for _ in range(3000):
        words.update(dict.fromkeys(" ".join(example(rng)).split()))
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<pad>", padding_side="left")


def overlap(text: list[str], reference: list[str]) -> float:
    """ROUGE-L: F1 of the longest common subsequence."""
    table = [[0] * (len(reference) + 1) for _ in range(len(text) + 1)]
    for i, a in enumerate(text):
        for j, b in enumerate(reference):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    common = table[-1][-1]
    return 2 * common / (len(text) + len(reference)) if text and reference else 0.0


def quality(model: Any, tokenizer: Any, decoder: Any, work: list[tuple[str, str]]) -> dict[str, float]:
    """Exact matches, ROUGE-L and tokens a second over ``work``, in batches of 16."""
    exact, score, tokens, spent = 0, 0.0, 0, 0.0
    for first in range(0, len(work), 16):
        part = work[first : first + 16]
        inputs = tokenizer([prompt for prompt, _ in part], return_tensors="pt", padding=True)
        inputs.pop("token_type_ids", None)
        began = time.perf_counter()
        output = model.generate(
            **inputs, max_new_tokens=64, do_sample=False, custom_generate=decoder, pad_token_id=tokenizer.pad_token_id
        )
        spent += time.perf_counter() - began
        new = output[:, inputs["input_ids"].shape[1] :]
        tokens += int((new != tokenizer.pad_token_id).sum())
        for row, (_, wanted) in zip(new, part, strict=True):
            words = [word for word in tokenizer.decode(row).split() if word not in ("<pad>", "<end>")]
            reference = wanted.split()[:-1]
            exact += words == reference
            score += overlap(words, reference)
    return {"exact match": exact / len(work), "ROUGE-L": score / len(work), "tokens per second": tokens / spent}


def run(context: Context) -> Arms:
    import copy

    from ..generation.skipdecode import LinearDepth, SkipDecode, skip_layers, speedup

    tokenizer = word_tokenizer()
    torch.manual_seed(context.seed)
    rng = random.Random(context.seed)
    hidden, layers, steps, tuning = (64, 6, 60, 15) if context.quick else (128, 12, 550, 110)
    batches = answer_batches(rng, example, tokenizer, 16)
    base = small_model(len(tokenizer), hidden, layers, end=tokenizer.convert_tokens_to_ids("<end>"), context=256)
    fit(base, batches, steps, 2e-3, context.progress, "the full model")
    test = random.Random(10_000 + context.seed)
    work = [example(test) for _ in range(32 if context.quick else 128)]
    length = 46  # tokens of an answer
    arms: Arms = {}
    tuned = copy.deepcopy(base)
    fit(tuned, batches, tuning, 5e-4, context.progress, "full depth, tuned")
    arms["full depth"] = quality(tuned, tokenizer, None, work)
    nominal = {}
    for ratio in SPEEDUPS:
        schedule = LinearDepth.for_speedup(layers, ratio, length)
        nominal[f"{ratio}x"] = speedup(schedule, layers, length)
        skipping = copy.deepcopy(base)
        with skip_layers(skipping, schedule):
            fit(skipping, batches, tuning, 5e-4, context.progress, f"SkipDecode {ratio}x")
        context.progress(f"SkipDecode {ratio}x writes")
        arms[f"SkipDecode {ratio}x"] = quality(skipping, tokenizer, SkipDecode(schedule), work)
        arms[f"not tuned {ratio}x"] = quality(base, tokenizer, SkipDecode(schedule), work)
        short = copy.deepcopy(base)
        kept = max(1, round(layers / ratio))
        short.model.layers = short.model.layers[:kept]
        short.config.num_hidden_layers = kept
        fit(short, batches, tuning, 5e-4, context.progress, f"truncated {ratio}x")
        arms[f"truncated {ratio}x"] = quality(short, tokenizer, None, work)
    context.artifacts["nominal speed-up"] = nominal
    return arms


REPRODUCTION = Reproduction(
    name="skipdecode",
    summary="data to text by a 12-layer model tuned for SkipDecode's schedules, against full depth and truncation to the same mean depth",
    run=run,
    claims=[
        *(
            Claim(
                "tokens per second", f"SkipDecode {ratio}x", "full depth", f"{ratio}x nominal", why=WHY_SPEED if ratio == 2 else ""
            )
            for ratio in SPEEDUPS
        ),
        *(
            Claim(
                "ROUGE-L", f"SkipDecode {ratio}x", "full depth", "negligible loss up to 4x or 5x", kind="difference", why=WHY if ratio == 2 else ""
            )
            for ratio in SPEEDUPS
        ),
        *(
            Claim(
                "exact match", f"SkipDecode {ratio}x", f"truncated {ratio}x", "better", kind="difference",
                why="The same mean depth and the same steps of tuning." if ratio == 2 else "",
            )
            for ratio in SPEEDUPS
        ),
        Claim("exact match", "SkipDecode 2x", "not tuned 2x", "tuning is needed", kind="difference"),
    ],
    seeds=2,
)  # fmt: skip
