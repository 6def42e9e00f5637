"""Exact distributions by enumeration, with and without a matcher."""

from __future__ import annotations

import itertools

import torch
from scipy.stats import chisquare

from everytoken.testing.matcher import ToyMatcher as ToyMatcher  # tests import it from here

VOCAB = 13


def exact_distribution(model, prompt, steps, temperature=1.0, top_k=None, matcher=None):
    """Probability of every continuation of ``steps`` tokens, by enumeration."""
    vocab = model.config.vocab_size
    table = {}
    for tail in itertools.product(range(vocab), repeat=steps):
        ids = torch.tensor([prompt + list(tail)])
        logits = model(ids).logits[0, len(prompt) - 1 : -1] / temperature
        if matcher is not None:
            follower = matcher.fork()
            for place, token in enumerate(tail):
                keep = torch.tensor([item in follower.allowed() for item in range(vocab)])
                logits[place] = logits[place].masked_fill(~keep, -torch.inf)
                if not follower.accept_token(token):
                    break
        if top_k:
            floor = logits.topk(top_k).values[:, -1:]
            logits = logits.masked_fill(logits < floor, -torch.inf)
        probs = torch.softmax(logits, -1)
        table[tail] = float(torch.stack([probs[i, token] for i, token in enumerate(tail)]).prod())
    return table


def check_distribution(target, decoder, prompt, draws, matcher=None, steps=3, exact_of=None, **sampling):
    """Chi-square of sampled continuations against enumeration."""
    torch.manual_seed(1234)
    exact = exact_distribution(
        exact_of or target, prompt, steps, sampling.get("temperature", 1.0), sampling.get("top_k"), matcher
    )
    batch = torch.tensor([prompt] * draws)
    output = target.generate(
        batch, max_new_tokens=steps, do_sample=True, custom_generate=decoder, **{"top_k": 0, "top_p": 1.0} | sampling
    )
    counts: dict[tuple, int] = {}
    for row in output[:, len(prompt) :].tolist():
        counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    assert all(exact[key] > 0 for key in counts)
    frequent = [key for key in exact if exact[key] * draws >= 5]
    observed = [counts.get(key, 0) for key in frequent]
    expected = [exact[key] * draws for key in frequent]
    observed.append(draws - sum(observed))
    expected.append(draws - sum(expected))
    if expected[-1] < 1e-6:
        observed.pop(), expected.pop()
    scale = sum(observed) / sum(expected)
    assert chisquare(observed, [value * scale for value in expected]).pvalue > 1e-4
