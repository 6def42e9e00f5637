"""AWRS: exact token distributions, unbiased weights, and sequential Monte Carlo against enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from everytoken.constraints.awrs import AWRS, awrs, visit
from everytoken.constraints.base import CallableConstraint, DeadEndError
from everytoken.constraints.engine.vocabulary import TokenizerInfo
from everytoken.constraints.grammar import Grammar
from everytoken.constraints.particles import effective_sample_size, resample
from everytoken.core.errors import BadInputError
from everytoken.core.settings import load_function

from ..conftest import tiny_llama
from ..tiers import commit_tier
from .common import compile_

RUNS = 20_000


def problems():
    """Random distributions and constraints of 3 to 12 tokens, flat and peaked."""
    rng = np.random.default_rng(0)
    for size, sharp in ((3, 1.0), (5, 3.0), (8, 0.3), (12, 2.0)):
        logps = rng.normal(size=size) * sharp
        logps -= np.log(np.exp(logps).sum())
        allowed = rng.random(size) < 0.5
        allowed[rng.integers(size)] = True
        yield logps, allowed


FORMS = [
    {"estimator": "recursive"}, {"estimator": "geometric"}, {"estimator": "geometric", "max_accepts": 4},
    {"estimator": "geometric", "max_rejects": 2}, {"estimator": "geometric", "max_accepts": 3, "max_rejects": 4}, {},
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("number", commit_tier(range(4), [0]))
def test_weights_are_unbiased_for_every_token(form, number):
    """E[w 1(y = a)] = p(a) C(a) for every a, by a z-test."""
    logps, allowed = list(problems())[number]
    rng = np.random.default_rng(number)
    sums, squares = np.zeros(len(logps)), np.zeros(len(logps))
    for _ in range(RUNS):
        draw = awrs(logps, allowed.__getitem__, rng, **form)
        if draw.token is not None:
            weight = math.exp(draw.log_weight)
            sums[draw.token] += weight
            squares[draw.token] += weight * weight
    means = sums / RUNS
    errors = np.sqrt((squares / RUNS - means**2).clip(min=1e-12) / RUNS)
    wanted = np.exp(logps) * allowed
    assert (means[~allowed] == 0).all()
    assert (np.abs(means - wanted)[allowed] < 5 * errors[allowed]).all(), (means, wanted, errors)
    assert abs(means.sum() - wanted.sum()) < 5 * math.sqrt((errors**2).sum() + 1e-12)


@pytest.mark.parametrize(
    "form", [{"proper_weights": False}, {"estimator": "recursive"}, {"estimator": "geometric"}], ids=str
)
@pytest.mark.parametrize("number", commit_tier(range(4), [1]))
def test_tokens_follow_q_exactly(form, number):
    logps, allowed = list(problems())[number]
    rng = np.random.default_rng(100 + number)
    counts = np.zeros(len(logps))
    for _ in range(RUNS):
        counts[awrs(logps, allowed.__getitem__, rng, **form).token] += 1
    wanted = np.exp(logps) * allowed
    wanted = wanted / wanted.sum() * RUNS
    assert counts[~allowed].sum() == 0
    if allowed.sum() > 1:
        assert stats.chisquare(counts[allowed], wanted[allowed]).pvalue > 1e-4


def test_pruned_candidates_count_their_mass():
    """Tokens known to be impossible may be left out beforehand: the estimate is still of Z under the whole
    distribution.
    """
    logps = np.log(np.array([0.4, 0.3, 0.2, 0.1]))
    pruned = np.where([True, True, False, True], logps, -np.inf)
    rng = np.random.default_rng(0)
    for form in ({"estimator": "recursive"}, {"estimator": "geometric"}):
        weights = [
            math.exp(awrs(pruned, [True, False, True, True].__getitem__, rng, **form).log_weight) for _ in range(RUNS)
        ]
        assert abs(np.mean(weights) - 0.5) < 5 * np.std(weights) / math.sqrt(RUNS)


def test_all_allowed_weighs_one_and_one_allowed_is_found():
    rng = np.random.default_rng(0)
    logps = np.log(np.full(50, 0.02))
    for _ in range(200):
        draw = awrs(logps, lambda _t: True, rng, estimator="recursive")
        assert draw.log_weight == 0.0 and draw.evaluations == 2
        assert awrs(logps, lambda t: t == 17, rng).token == 17
        assert awrs(logps, lambda t: t == 17, rng, proper_weights=False).token == 17
    dead = awrs(logps, lambda _t: False, rng)
    assert dead.token is None and dead.log_weight == -math.inf and dead.evaluations == 50
    assert awrs(np.full(3, -np.inf), lambda _t: True, rng).token is None


def test_the_number_of_tests_is_the_expected_one():
    """Unweighted form: expected tests by enumerating all orders of sampling without replacement."""
    probs, allowed = np.array([0.5, 0.2, 0.2, 0.1]), [False, True, False, True]
    expected = 0.0
    for order in itertools.permutations(range(4)):
        chance, left = 1.0, 1.0
        for token in order:
            chance *= probs[token] / left
            left -= probs[token]
            if left <= 1e-12:
                break
        expected += chance * (1 + next(place for place, token in enumerate(order) if allowed[token]))
    rng = np.random.default_rng(1)
    tests = [awrs(np.log(probs), allowed.__getitem__, rng, proper_weights=False).evaluations for _ in range(RUNS)]
    assert abs(np.mean(tests) - expected) < 5 * np.std(tests) / math.sqrt(RUNS)


def test_no_token_is_tested_twice():
    rng = np.random.default_rng(0)
    logps = np.log(np.full(20, 0.05))
    for form in FORMS:
        for _ in range(50):
            seen = []
            draw = awrs(logps, lambda t, seen=seen: seen.append(t) or t % 3 == 0, rng, **form)
            assert len(seen) == len(set(seen)) == draw.evaluations


def test_visiting_order_is_sampling_without_replacement():
    rng = np.random.default_rng(0)
    logps = np.log(np.array([0.6, 0.3, 0.1]))
    counts = {}
    for _ in range(RUNS):
        order = tuple(visit(logps, rng))
        counts[order] = counts.get(order, 0) + 1
    wanted = {}
    for order in itertools.permutations(range(3)):
        probs = np.exp(logps)
        wanted[order] = probs[order[0]] * probs[order[1]] / (1 - probs[order[0]])
    orders = list(wanted)
    assert stats.chisquare([counts.get(o, 0) for o in orders], [wanted[o] * RUNS for o in orders]).pvalue > 1e-4
    long = rng.normal(size=5000)
    long[::7] = -np.inf
    order = list(visit(long, rng))
    assert len(order) == len(set(order)) == int(np.isfinite(long).sum())


@pytest.mark.parametrize(
    ("form", "message"),
    [({"max_accepts": 1}, "at least 2"), ({"max_rejects": 1}, "at least 2"), ({"estimator": "x"}, "estimator is")],
)
def test_bad_settings(form, message):
    with pytest.raises(BadInputError, match=message):
        awrs(np.zeros(2), lambda _t: True, np.random.default_rng(0), **form)


def test_resampling_keeps_proportions():
    rng = np.random.default_rng(0)
    weights = np.array([0.1, 0.2, 0.3, 0.4])
    for method in ("stratified", "multinomial"):
        counts = np.zeros(4)
        for _ in range(4000):
            for index in resample(weights, rng, method):
                counts[index] += 1
        assert np.allclose(counts / counts.sum(), weights, atol=0.01)
    assert effective_sample_size(np.full(5, 0.2)) == pytest.approx(5) and effective_sample_size(np.eye(3)[0]) == 1


# -- as a decoder, on a small real model ------------------------------------------------------------------------------
VOCAB = [None, b"a", b"b", b"c", None]  # 0 pads, 4 ends
INFO = TokenizerInfo(VOCAB, [4])


@pytest.fixture(scope="module")
def model():
    return tiny_llama(5, seed=3, eos=4)


def enumerate_texts(model, prompt, length, allowed):
    """Probability of every text of up to ``length`` tokens that ends with EOS or is cut, and satisfies the constraint."""
    total, texts = 0.0, {}
    pending = [((), 0.0)]
    while pending:
        text, logp = pending.pop()
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *text]])).logits[0, -1].double()
        logps = torch.log_softmax(logits, -1).tolist()
        for token in range(5):
            grown, value = (*text, token), logp + logps[token]
            if not allowed(grown):
                continue
            if token == 4 or len(grown) == length:
                texts[grown] = math.exp(value)
                total += math.exp(value)
            else:
                pending.append((grown, value))
    return total, texts


def ok(text: bytes) -> bool:
    return b"aa" not in text and not text.startswith(b"b") and text.count(b"c") <= 2


def allowed(tokens):
    text = b"".join(VOCAB[token] or b"" for token in tokens)
    if any(token == 0 for token in tokens) or not ok(text):
        return False
    return tokens[-1] != 4 or text.endswith(b"c")


CONSTRAINT = CallableConstraint(ok, lambda text: ok(text) and text.endswith(b"c"), on="bytes")


@pytest.mark.slow
def test_smc_estimates_the_marginal_likelihood_without_bias(model):
    prompt, length = [1, 2], 4
    total, _ = enumerate_texts(model, prompt, length, allowed)
    estimates = []
    for seed in range(400):
        decoder = AWRS(CONSTRAINT, particles=4, seed=seed, info=INFO)
        try:
            model.generate(
                torch.tensor([prompt]), max_new_tokens=length, do_sample=True, top_k=0, custom_generate=decoder
            )
            estimates.append(math.exp(decoder.log_marginal))
        except DeadEndError:
            estimates.append(0.0)
    assert abs(np.mean(estimates) - total) < 4.5 * np.std(estimates) / math.sqrt(len(estimates)), (
        np.mean(estimates),
        total,
    )


@pytest.mark.slow
def test_weighted_particles_follow_the_posterior(model):
    """E[sum of weights at a text] / E[sum of weights]: the model conditioned on the constraint, not locally
    renormalised.
    """
    prompt, length = [1, 2], 3
    total, texts = enumerate_texts(model, prompt, length, allowed)
    mass = dict.fromkeys(texts, 0.0)
    evidence = []
    for seed in range(500):
        decoder = AWRS(CONSTRAINT, particles=4, seed=seed, info=INFO)
        try:
            model.generate(
                torch.tensor([prompt]), max_new_tokens=length, do_sample=True, top_k=0, custom_generate=decoder
            )
        except DeadEndError:
            evidence.append(0.0)
            continue
        z = math.exp(decoder.log_marginal)
        evidence.append(z)
        for tokens, weight in decoder.particles_:
            mass[tuple(tokens)] += z * weight
    for text, prob in texts.items():
        if prob / total > 0.05:
            assert mass[text] / 500 == pytest.approx(prob, rel=0.35, abs=0.02 * total), text


def test_outputs_satisfy_the_constraint_in_batches_with_padding(model):
    ids = torch.tensor([[0, 0, 1, 2], [3, 1, 2, 3]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    decoder = AWRS(CONSTRAINT, trace_enabled=True, info=INFO)
    torch.manual_seed(0)
    output = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=True, top_k=0, custom_generate=decoder
    )
    for row, trace in zip(output[:, 4:].tolist(), decoder.trace, strict=True):
        tokens = row[: row.index(4) + 1] if 4 in row else [token for token in row if token != 0]
        assert allowed(tuple(tokens)) and trace.ids == tokens
        assert sum(trace.columns["evaluations"]) >= len(tokens) and len(trace.columns["log_weight"]) == len(tokens)
    assert decoder.stats.rounds == sum(len(trace.ids) for trace in decoder.trace)
    assert decoder.figures()["tests a token"] >= 1


def test_a_grammar_is_the_fast_constraint(model):
    compiled = compile_(Grammar.from_regex("(ab|c)*"), INFO)
    for particles in (1, 3):
        decoder = AWRS(compiled, particles=particles, seed=1)
        output = model.generate(
            torch.tensor([[1, 2]]),
            max_new_tokens=8,
            do_sample=True,
            top_k=0,
            custom_generate=decoder,
            return_dict_in_generate=True,
        )
        text = b"".join(VOCAB[token] or b"" for token in output.sequences[0, 2:].tolist())
        assert compiled and GrammarPrefix(compiled, text) and len(decoder.particles_) == particles


def GrammarPrefix(compiled, text):
    from everytoken.constraints.engine.matcher import GrammarMatcher

    return GrammarMatcher(compiled).longest_prefix(text) == len(text)


def test_a_critic_weighs_finished_texts(model):
    decoder = AWRS(
        CONSTRAINT, particles=6, seed=2, critic=lambda text: 50.0 if text.startswith("c") else 0.0, info=INFO
    )
    output = model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, do_sample=True, top_k=0, custom_generate=decoder)
    assert output[0, 2].item() == 3 or not any(tokens[0] == 3 for tokens, _ in decoder.particles_)


def test_dead_ends_tell_how_far_it_went(model):
    decoder = AWRS(lambda text: len(text) < 3, lambda text: False, info=INFO, seed=0)
    with pytest.raises(DeadEndError, match="Longest valid prefix") as caught:
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=9, do_sample=True, top_k=0, custom_generate=decoder)
    assert len(caught.value.prefix) == 2


def test_streaming_seeds_and_refusals(model):
    class Sink:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    ids, common = torch.tensor([[1, 2]]), {"max_new_tokens": 5, "do_sample": True, "top_k": 0}
    sink = Sink()
    first = AWRS(CONSTRAINT, seed=5, info=INFO).generate(model, ids, streamer=sink, **common)
    assert sink.tokens[-1] == "end" and sink.tokens[-len(first[0]) + 1 : -1] == first[0, 2:].tolist()
    assert torch.equal(first, AWRS(CONSTRAINT, seed=5, info=INFO).generate(model, ids, **common))
    for make, extra, message in (
        (lambda: AWRS(CONSTRAINT, info=INFO), {"do_sample": False}, "samples"),
        (lambda: AWRS(CONSTRAINT), {}, "tokenizer"),
        (lambda: AWRS(CONSTRAINT, info=INFO), {"num_beams": 2}, "num_beams"),
        (lambda: AWRS(CONSTRAINT, particles=2, info=INFO), {"streamer": Sink()}, "streamer"),
    ):
        with pytest.raises(BadInputError, match=message):
            make().generate(model, ids, **common | extra)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"particles": 0}, "at least one particle"), ({"ess_threshold": 2.0}, "share"), ({"resampling": "x"}, "resampling"),
        ({"constraint": "nocolon"}, "module:function"), ({"constraint": "no_such_module_x:f"}, "no module"),
        ({"constraint": "math:nothing"}, "has no"), ({"constraint": "math:pi"}, "not callable"), ({"regex": "("}, "not closed"),
        ({"regex": "a", "schema": "{}"}, "one of"), ({"max_accepts": 1}, "at least 2"),
    ],
)  # fmt: skip
def test_bad_decoders(settings, message):
    with pytest.raises(BadInputError, match=message):
        AWRS(**settings)


def test_functions_by_name():
    assert load_function("math:isfinite") is math.isfinite
