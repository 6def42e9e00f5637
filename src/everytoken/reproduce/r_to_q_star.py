"""Claims of "From r to Q*": implicit rewards find a planted error, and wider beams over the DPO policy find better
answers.

The embedded model is trained with DPO for a few steps on its own continuations of openings, the more positive one
preferred (a lexicon judges). Then (a) one word of a positive continuation is replaced by a negative one, and tokens are
ranked by implicit reward; (b) beams of several widths are searched under the policy and under the model that it came
from.
"""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING

import torch

from .base import Arms, Claim, Context, Reproduction, mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..core.implicit_reward import ImplicitReward

WORDS = [
    "terrible",
    "horrible",
    "awful",
    "bad",
    "ugly",
    "disgusting",
    "cruel",
    "miserable",
    "painful",
    "worst",
    "sad",
    "boring",
    "poor",
    "dangerous",
    "broken",
    "wrong",
    "dull",
    "lost",
    "dead",
    "sick",
    "angry",
    "empty",
    "hard",
    "cold",
    "dirty",
    "weak",
    "disappointing",
    "failed",
    "useless",
    "annoying",
]
WIDTHS = (1, 3, 5, 10)
WHY_CREDIT = (
    "The paper shows planted errors in one summarisation example. Here one word of a positive continuation becomes the "
    "negative one that the base model finds likeliest there; chance is one in about twenty tokens."
)
WHY_BEAM = (
    "The paper's 10 to 15 points of GPT-4 win rate are for a 6.9B policy on TL;DR after full training; here the reward "
    "is a lexicon's score of 20 tokens, after a few steps of DPO that move a 135M model little."
)


def planted(
    reward: ImplicitReward, tokenizer: PreTrainedTokenizerBase, cases: list[tuple[str, str, tuple[int, int]]]
) -> dict[str, list[int]]:
    """The rank (0 first) of the worst corrupted token among a continuation's tokens: by implicit reward, and by
    log-probabilities.
    """
    ranks: dict[str, list[int]] = {"implicit reward": [], "policy log-probability": [], "base log-probability": []}
    for prompt, text, (start, end) in cases:
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        after = encoded["input_ids"]
        ids = torch.tensor([before + after])
        mask = torch.zeros_like(ids, dtype=torch.bool)
        mask[:, len(before) :] = True
        stats = reward.statistics(ids, mask)
        bad = [place for place, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and b > start]
        part = slice(len(before), None)
        scores = {
            "implicit reward": stats["logps"][0, part] - stats["ref_logps"][0, part],
            "policy log-probability": stats["logps"][0, part],
            "base log-probability": stats["ref_logps"][0, part],
        }
        for name, score in scores.items():
            order = score.argsort().tolist()
            ranks[name].append(min(order.index(place) for place in bad))
    return ranks


@torch.no_grad()
def corrupt(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, text: str, rng: random.Random
) -> tuple[str, tuple[int, int]] | None:
    """Replaces one inner word by the negative one that the base model finds likeliest there, so that its improbability
    does not give it
    away: the text and the place of the new word; None without such a word."""
    words = list(re.finditer(r"(?<= )[a-z]{4,}(?= )", text))
    if not words:
        return None
    chosen = rng.choice(words)
    firsts = [tokenizer(" " + word, add_special_tokens=False)["input_ids"][0] for word in WORDS]
    before = tokenizer(prompt + text[: chosen.start() - 1], add_special_tokens=False, return_tensors="pt")
    word = WORDS[int(base(**before, logits_to_keep=1).logits[0, -1, firsts].argmax())]
    return text[: chosen.start()] + word + text[chosen.end() :], (chosen.start(), chosen.start() + len(word))


def run(context: Context) -> Arms:
    from ..core.implicit_reward import ImplicitReward
    from ..core.loading import load_model, load_tokenizer
    from ..generation.qstar_beam import QStarBeam
    from ..preference.dpo import DPOLoss
    from ..preference.short_training import train_quietly
    from ..training.datasets.sentiment import continuations, openings, positivity, sentiment_pairs

    tokenizer = load_tokenizer(context.model)
    base = load_model(context.model, dtype="float32", packed=True)
    steps, batch, samples, new_tokens = (2, 4, 6, 10) if context.quick else (16, 8, 48, 20)
    rows = sentiment_pairs(
        base,
        tokenizer,
        steps * batch,
        max_new_tokens=new_tokens,
        report=context.report,
    )
    policy = load_model(context.model, dtype="float32", packed=True)
    context.report("DPO", 0, steps)
    train_quietly(
        policy,
        base,
        DPOLoss(beta=0.1),
        tokenizer,
        rows,
        per_device_train_batch_size=batch,
        max_steps=steps,
        learning_rate=5e-5,
        seed=context.seed,
    )

    rng = random.Random(context.seed)
    torch.manual_seed(context.seed)
    prompts = (openings("test") * 4)[: 2 * samples]
    texts = continuations(base, tokenizer, prompts, new_tokens)
    scored = sorted(
        zip(positivity([p + t for p, t in zip(prompts, texts, strict=True)]), prompts, texts, strict=True), reverse=True
    )
    cases = []
    for _, prompt, text in scored[:samples]:
        if (changed := corrupt(base, tokenizer, prompt, text, rng)) is not None:
            cases.append((prompt, *changed))
    context.report("credit of planted errors", 0, 0)
    ranks = planted(ImplicitReward(policy, base, 0.1), tokenizer, cases)
    arms: Arms = {}
    for name, found in ranks.items():
        arms[name] = {f"planted error among the lowest {k}": [float(rank < k) for rank in found] for k in (1, 3)}
    context.artifacts["planted errors"] = len(cases)

    curve: dict[str, dict[str, list[float]]] = {}
    prompts = prompts[: 4 if context.quick else 32]
    for name, model in (("DPO policy", policy), ("base model", base)):
        curve[name] = {}
        for width in WIDTHS[:2] if context.quick else WIDTHS:
            context.report(f"{name}, {width} beams", 0, 0)
            rewards = []
            for first in range(0, len(prompts), 8):
                part = prompts[first : first + 8]
                inputs = tokenizer(part, return_tensors="pt", padding=True, padding_side="left")
                output = model.generate(
                    **inputs,
                    max_new_tokens=new_tokens,
                    do_sample=False,
                    custom_generate=QStarBeam(width),
                    pad_token_id=tokenizer.eos_token_id,
                )
                new = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                rewards += positivity([p + t for p, t in zip(part, new, strict=True)])
            curve[name][str(width)] = rewards
        torch.manual_seed(context.seed)
        sampled = continuations(model, tokenizer, prompts, new_tokens)
        curve[name]["sampled"] = positivity([p + t for p, t in zip(prompts, sampled, strict=True)])
        for label, values in curve[name].items():
            arms[f"{name}, {label} beams" if label != "sampled" else f"{name}, sampled"] = {"reward": values}
    context.artifacts["reward by beam width"] = {
        name: {label: mean(values) for label, values in widths.items()} for name, widths in curve.items()
    }
    return arms


REPRODUCTION = Reproduction(
    name="r-to-q-star",
    summary="a DPO-trained policy: rank of a planted error by implicit reward, and reward of beams of width 1 to 10",
    run=run,
    claims=[
        Claim(
            "planted error among the lowest 1",
            "implicit reward",
            "base log-probability",
            "credit lands on it",
            kind="difference",
            why=WHY_CREDIT,
        ),
        Claim(
            "planted error among the lowest 3",
            "implicit reward",
            "base log-probability",
            "credit lands on it",
            kind="difference",
        ),
        Claim("reward", "DPO policy, 5 beams", "DPO policy, 1 beams", "higher", kind="difference", why=WHY_BEAM),
        Claim("reward", "DPO policy, 5 beams", "DPO policy, sampled", "10 to 15 points of win rate", kind="difference"),
        Claim(
            "reward",
            "DPO policy, 10 beams",
            "DPO policy, 5 beams",
            "lower",
            kind="difference",
            higher_is_better=False,
            why="Degeneration of wide beams.",
        ),
        Claim(
            "reward",
            "DPO policy, 5 beams",
            "base model, 5 beams",
            "higher",
            kind="difference",
            why="What DPO adds at the same width.",
        ),
    ],
    seeds=3,
    extra=("train", "trl"),
)
