"""R2R's claim: the large model's accuracy for a small part of its tokens, and a better use of them than entropy makes.

Two models are trained on the spot on sums with every running total written out (digits from the last to the first, as
they are carried). Between steps any of three separators may stand: a choice that is uncertain but harmless, which
entropy cannot tell from a carry. Whether an answer is right can be checked, so labels come from the whole answer.
"""

from __future__ import annotations

import random
import re
import time
from typing import TYPE_CHECKING

import torch

from ..core.charts import lines_svg
from .base import Arms, Claim, Context, Reproduction, Values, mean
from .beds.small_models import answer_batches, character_tokenizer, fit, reverse, small_model, worked_sum
from .files import Result

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..generation.r2r import R2R

CHARACTERS = "0123456789+=;,#> "
SEPARATORS = (";", ", ", "> ")
WHY = (
    "The paper routes between R1-1.5B and R1-32B on AIME, GPQA and LiveCodeBench (1.6x the accuracy of a 7B model at "
    "5.6B parameters a token); here two models of {} weights add four two-digit numbers."
)
WHY_SPEED = (
    "The paper's 2.8x compares 1.5B with 32B parameters on GPUs. Here a forward of either model is mostly Python and "
    "small kernels, so the large one costs a few times the small one, not hundreds of times, and the router's own "
    "forward counts."
)


def outcome(text: str) -> str | None:
    """The final number of an answer."""
    found = re.search(r"#(\d+)", text)
    return found.group(1) if found else None


def truth(prompt: str) -> str:
    return reverse(sum(int(part[::-1]) for part in prompt.rstrip("=").split("+")))


def solved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> float:
    """The share of sums that a model gets right, in one batch."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    output = model.generate(**inputs, max_new_tokens=80, do_sample=False)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])
    return sum(outcome(text) == truth(prompt) for text, prompt in zip(texts, prompts, strict=True)) / len(prompts)


def run(context: Context) -> Arms:
    from ..generation.r2r import R2R, EntropyRouter, LearnedRouter
    from ..generation.routing.configuration_token_router import TokenRouterConfig
    from ..generation.routing.labels import label
    from ..generation.routing.training import split_by_prompt, threshold_for_share, train_router, values
    from ..generation.routing.verifiers import AnswerVerifier

    tokenizer = character_tokenizer(CHARACTERS)
    vocab = len(tokenizer)
    rng = random.Random(context.seed)
    torch.manual_seed(context.seed)
    terms = 2 if context.quick else 4
    sizes = {"large": (64, 2), "small": (32, 1)} if context.quick else {"large": (128, 4), "small": (80, 2)}
    models = {}
    for name, (hidden, layers) in sizes.items():
        models[name] = small_model(vocab, hidden, layers, end=tokenizer.convert_tokens_to_ids("\n"), context=256)
        models[name].generation_config.pad_token_id = tokenizer.pad_token_id
    large, small = models["large"], models["small"]
    batches = answer_batches(rng, lambda r: worked_sum(r, terms, SEPARATORS), tokenizer, 64)
    checks = [worked_sum(random.Random(seed), terms, SEPARATORS)[0] for seed in range(60)]
    # learning is sudden and its moment differs by seed: the large model goes on until it can add, the small one stops
    # when it gets a third of the answers right, for later there would be no gap to close
    trained = {"large": fit(large, batches, 60 if context.quick else 600, 2e-3, context.report, "the large model")}
    while not context.quick and trained["large"] < 1800 and solved(large, tokenizer, checks) < 0.95:
        trained["large"] += fit(large, batches, 300, 2e-3, context.report, "the large model, again")
    trained["small"] = fit(
        small,
        batches,
        60 if context.quick else 700,
        3e-3,
        context.report,
        "the small model",
        enough=lambda: solved(small, tokenizer, checks) >= 1 / 3,
    )
    context.artifacts["steps of training"] = trained

    seen = [worked_sum(rng, terms, SEPARATORS)[0] for _ in range(24 if context.quick else 250)]
    labels = label(
        small,
        large,
        tokenizer,
        seen,
        AnswerVerifier(outcome),
        max_new_tokens=80,
        batch=64,
        count=vocab,
        report=context.report,
    )
    learn, held = split_by_prompt(labels, 0.2, context.seed)
    config = TokenRouterConfig(
        labels.hidden.shape[1], labels.embedding.shape[1], vocab, width=32, num_blocks=1, dropout=0.1
    )
    router, _ = train_router(learn, config, held, epochs=60, lr=1e-3, batch=256, seed=context.seed)
    kinds = [float((labels.kinds == kind).float().mean()) for kind in range(3)]
    context.artifacts["labels"] = dict(zip(("identical", "neutral", "divergent"), kinds, strict=True))

    fresh = random.Random(10_000 + context.seed)
    prompts = [worked_sum(fresh, terms, SEPARATORS)[0] for _ in range(12 if context.quick else 100)]

    def measure(name: str, model: PreTrainedModel, decoder: R2R | None) -> dict[str, Values]:
        right: list[float] = []
        tokens = 0
        began = time.perf_counter()
        share = 0.0
        for index, prompt in enumerate(prompts):
            context.report(f"{name}: sums", index + 1, len(prompts))
            inputs = tokenizer(prompt, return_tensors="pt")
            output = model.generate(**inputs, max_new_tokens=80, do_sample=False, custom_generate=decoder)
            new = output[0, inputs["input_ids"].shape[1] :]
            tokens += len(new)
            right.append(float(outcome(tokenizer.decode(new)) == truth(prompt)))
            if decoder is not None:
                share += decoder.large_share * len(new)
        spent = time.perf_counter() - began
        figures: dict[str, Values] = {"accuracy": right, "tokens per second": tokens / spent}
        parameters = {key: sum(item.numel() for item in models[key].parameters()) for key in models}
        share = share / tokens if decoder is not None else float(model is large)
        own = sum(item.numel() for item in router.parameters()) if name.startswith("R2R") else 0
        figures["large model's share"] = share
        figures["parameters a token"] = (
            (1 - share) * parameters["small"] + share * parameters["large"] + own
            if decoder is not None
            else parameters["large" if model is large else "small"]
        )
        return figures

    arms: Arms = {
        "small model": measure("small model", small, None),
        "large model": measure("large model", large, None),
        "R2R": measure("R2R", large, R2R(small, router)),
    }
    # the same share of tokens for entropy, and both at smaller shares
    everything = labels.logits  # all of them, in falling order: entropy does not mind
    entropy, learned = EntropyRouter()(everything, everything, everything), torch.sigmoid(values(router, labels))
    share = mean(arms["R2R"]["large model's share"])
    curve: dict[str, list[list[float]]] = {"R2R": [], "entropy": []}
    for part in (share, 0.05, 0.1, 0.2):
        for name, scores, chosen in (("R2R", learned, LearnedRouter(router)), ("entropy", entropy, EntropyRouter())):
            figures = measure(f"{name} at {part:.0%}", large, R2R(small, chosen, threshold_for_share(scores, part)))
            curve[name].append([mean(figures["large model's share"]), mean(figures["accuracy"])])
            if part == share and name == "entropy":
                arms["entropy routing"] = figures
    context.artifacts["accuracy by share"] = curve
    accuracy = {name: mean(figures["accuracy"]) for name, figures in arms.items()}
    gap = accuracy["large model"] - accuracy["small model"]
    if gap:
        context.artifacts["share of the accuracy gap closed"] = {
            name: (accuracy[name] - accuracy["small model"]) / gap for name in ("R2R", "entropy routing")
        }
    return arms


def curve_svg(result: Result) -> str:
    """Accuracy against the large model's share of the tokens, an SVG of its own; a line a seed."""
    names = {"entropy": "entropy routing", "R2R": "R2R"}
    seeds = [artifacts["accuracy by share"] for artifacts in result["artifacts"].values()]
    lines = {shown: [[(x, y) for x, y in curves[name]] for curves in seeds] for name, shown in names.items()}
    return lines_svg(lines, "the large model's share of the tokens", "share of right answers", percent=True)


REPRODUCTION = Reproduction(
    name="r2r",
    summary=(
        "worked sums by a large model (0.9M weights), a small one, and both routed by R2R and by entropy at an equal "
        "share"
    ),
    run=run,
    claims=[
        Claim(
            "accuracy",
            "R2R",
            "small model",
            "most of the gap closed",
            kind="difference",
            why=WHY.format("0.9M and 0.2M"),
        ),
        Claim("accuracy", "R2R", "large model", "comparable", kind="difference", why="At the threshold of 95% recall."),
        Claim("large model's share", "R2R", "", "0.11 to 0.15", kind="value", higher_is_better=False, threshold=0.15),
        Claim(
            "accuracy",
            "R2R",
            "entropy routing",
            "higher",
            kind="difference",
            why="At R2R's share of the large model's tokens.",
        ),
        Claim(
            "parameters a token", "R2R", "large model", "5.6B of 32B", higher_is_better=False, why="The router counts."
        ),
        Claim("tokens per second", "R2R", "large model", "2.8x", why=WHY_SPEED),
    ],
    seeds=3,
)
