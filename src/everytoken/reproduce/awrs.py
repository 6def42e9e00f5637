"""AWRS's claims: a handful of tests per token instead of the whole vocabulary, and weights that undo masking's
distortion.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ..core.scoring import encode_prompt
from .base import Arms, Claim, Context, Reproduction

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
RECORDS = [
    {"name": "Bo Lind", "age": 7, "tags": ["school", "football"]},
    {"name": "Ada King", "age": 36, "tags": ["mathematics", "engines", "poetry"]},
    {"name": "Rosa Marin", "age": 61, "tags": ["bakery"]},
]
WHO = ["a painter", "a customer of a bookshop", "a sailor"]
EXAMPLES = "Records of people, one JSON object each:\n" + "\n".join(map(json.dumps, RECORDS))
PATTERN = r"[A-Z][A-Za-z0-9 ,;:'\-\n]*(\.( |\n)+[A-Z][A-Za-z0-9 ,;:'\-\n]*)*\."
PROSE = ["Why is the sky blue? Answer in three sentences.", "Tell me about owls.", "What is bread made of?"]
WHY_TESTS = (
    "The baseline tests every token of the vocabulary with the same checker. The paper's constraints are costlier and "
    "its models larger; the better the model follows the constraint by itself, the fewer tests: a 135M model does so "
    "less than theirs."
)
WHY_UNASKED = (
    "Nothing in this prompt asks for JSON: the model puts next to no mass on what the schema allows, and AWRS draws "
    "until it finds it. This is the case that masking is for."
)
WHY_TIME = (
    "The checker is this library's own, which answers in microseconds; at that price a mask of the grammar engine "
    "would be faster still (see xgrammar). The dearer a test, the more this ratio approaches that of the numbers of "
    "tests."
)
WHY_SMC = (
    "Divergence from the model conditioned on the constraint, on a toy where that is known exactly by enumeration: a "
    "text of three letters whose last step punishes a tempting first one."
)


def _allowing(allowed: Callable[[tuple[int, ...]], bool], text: tuple[int, ...]) -> Callable[[int], bool]:
    return lambda token: allowed((*text, token))


def toy_divergence(seed: int, particles: int, runs: int) -> dict[str, float]:
    """KL from the exact posterior to what masking, and AWRS with particles, sample, on a three-step Markov chain."""
    from ..constraints.awrs import awrs
    from ..constraints.particles import effective_sample_size, resample

    rng = np.random.default_rng(seed)
    first = np.log(np.array([0.9, 0.1]))
    middle = np.log(np.array([[0.98, 0.02], [0.3, 0.7]]))

    def allowed(text: tuple[int, ...]) -> bool:  # after a 0 the second step must be the unlikely 1
        return len(text) < 2 or text[0] == 1 or text[1] == 1

    exact: dict[tuple[int, ...], float] = {}
    for a in range(2):
        for b in range(2):
            if allowed((a, b)):
                exact[a, b] = math.exp(first[a] + middle[a, b])
    total = sum(exact.values())
    exact = {text: prob / total for text, prob in exact.items()}
    counts = {name: dict.fromkeys(exact, 1e-9) for name in ("masking", "AWRS")}
    for _ in range(runs):
        text: Any = ()
        for step in range(2):
            logps = first if step == 0 else middle[text[0]]
            text = (
                *text,
                awrs(logps, _allowing(allowed, text), rng, proper_weights=False).token,
            )
        counts["masking"][text] += 1
        everyone: list[Any] = [((), 0.0)] * particles
        for step in range(2):
            moved = []
            for path, weight in everyone:
                draw = awrs(first if step == 0 else middle[path[0]], _allowing(allowed, path), rng)
                moved.append(((*path, draw.token), weight + draw.log_weight))
            logs = np.array([weight for _, weight in moved])
            weights = np.exp(logs - logs.max())
            weights /= weights.sum()
            if effective_sample_size(weights) < particles / 2 and step == 0:
                moved = [(moved[i][0], 0.0) for i in resample(weights, rng)]
                weights = np.full(particles, 1 / particles)
            everyone = moved
        counts["AWRS"][everyone[int(rng.choice(particles, p=weights))][0]] += 1
    result = {}
    for name, found in counts.items():
        size = sum(found.values())
        result[name] = sum(prob * math.log(prob / (found[text] / size)) for text, prob in exact.items())
    return result


def run(context: Context) -> Arms:
    import torch

    from ..constraints.awrs import AWRS
    from ..constraints.engine.compiler import GrammarCompiler
    from ..constraints.engine.matcher import GrammarMatcher
    from ..constraints.engine.vocabulary import TokenizerInfo
    from ..core.loading import load_tokenizer

    tokenizer = load_tokenizer(context.model)
    model = context.load_model()
    vocab = model.config.get_text_config().vocab_size
    info = TokenizerInfo.from_huggingface(tokenizer, vocab)
    compiler = GrammarCompiler(info)
    limit = 24 if context.quick else 64
    some = slice(0, 1) if context.quick else slice(None)
    schema = compiler.compile_json_schema(SCHEMA)
    tasks = {
        "JSON": (schema, [f"{EXAMPLES}\nWrite one more, of {who}. Write only the JSON object." for who in WHO[some]]),
        "JSON, not asked for": (schema, [f"Tell me about {who}: name, age and tags." for who in WHO[some]]),
        "sentences": (compiler.compile_regex(PATTERN), PROSE[some]),
    }
    arms: Arms = {name: {} for name in ("AWRS", "AWRS, unweighted", "masking with the same checker")}
    for task, (compiled, prompts) in tasks.items():
        work = [encode_prompt(tokenizer, prompt) for prompt in prompts]
        for name in ("AWRS", "AWRS, unweighted"):
            tests = steps = spent = 0.0
            for index, inputs in enumerate(work):
                context.report(f"{task}, {name}: prompts", index + 1, len(work))
                decoder = AWRS(compiled, proper_weights=name == "AWRS", seed=1000 * context.seed + index)
                torch.manual_seed(context.seed)
                model.generate(
                    **inputs,
                    max_new_tokens=limit,
                    do_sample=True,
                    temperature=0.7,
                    top_k=0,
                    top_p=1.0,
                    custom_generate=decoder,
                )
                tests, steps = tests + decoder.evaluations, steps + decoder.stats.rounds
                spent += decoder.seconds_testing
            arms[name][f"{task}: tests a token"] = tests / steps
            arms[name][f"{task}: milliseconds a token"] = 1e3 * spent / steps
        # full masking with the same checker, at states along one text
        context.report(f"{task}: masking with the same checker", 0, 0)
        matcher = GrammarMatcher(compiled)
        times = []
        text = decoder._spell(decoder.particles_[0][0])
        for token in tokenizer(text.decode("utf-8", "replace"), add_special_tokens=False)["input_ids"][
            : 4 if context.quick else 16
        ]:
            began = time.perf_counter()
            for other in range(vocab):
                matcher.accepts(other)
            times.append(time.perf_counter() - began)
            if not matcher.accept_token(token):
                break
        baseline = arms["masking with the same checker"]
        baseline[f"{task}: tests a token"] = float(vocab)
        baseline[f"{task}: milliseconds a token"] = 1e3 * statistics.median(times)
    context.report("posterior of a toy model", 0, 0)
    toy = toy_divergence(context.seed, 8, 2_000 if context.quick else 20_000)
    arms["masking with the same checker"]["divergence from the posterior, nats"] = toy["masking"]
    arms["AWRS"]["divergence from the posterior, nats"] = toy["AWRS"]
    return arms


MASKING = "masking with the same checker"
REPRODUCTION = Reproduction(
    name="awrs",
    takes_weights=True,
    summary=(
        "the embedded model under a JSON schema and a regular expression: tests and time per token; a posterior known "
        "exactly"
    ),
    run=run,
    claims=[
        Claim(
            "JSON: tests a token",
            "AWRS",
            MASKING,
            "orders of magnitude fewer",
            higher_is_better=False,
            threshold=0.01,
            why=WHY_TESTS,
        ),
        Claim(
            "JSON, not asked for: tests a token",
            "AWRS",
            MASKING,
            "orders of magnitude fewer",
            higher_is_better=False,
            threshold=0.01,
            why=WHY_UNASKED,
        ),
        Claim(
            "sentences: tests a token",
            "AWRS",
            MASKING,
            "orders of magnitude fewer",
            higher_is_better=False,
            threshold=0.01,
            why=WHY_TESTS,
        ),
        Claim(
            "sentences: tests a token",
            "AWRS, unweighted",
            MASKING,
            "orders of magnitude fewer",
            higher_is_better=False,
            threshold=0.01,
            why=WHY_TESTS,
        ),
        Claim("JSON: milliseconds a token", "AWRS", MASKING, "faster", higher_is_better=False, why=WHY_TIME),
        Claim("sentences: milliseconds a token", "AWRS", MASKING, "faster", higher_is_better=False, why=WHY_TIME),
        Claim(
            "divergence from the posterior, nats",
            "AWRS",
            MASKING,
            "nearer to the posterior",
            kind="difference",
            higher_is_better=False,
            why=WHY_SMC,
        ),
    ],
    seeds=3,
)
