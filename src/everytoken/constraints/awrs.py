"""AWRS: adaptive weighted rejection sampling, constraints tested one token at a time (arXiv 2504.05410).

Masking tests every token of the vocabulary at every step, and renormalising locally bends the distribution of whole
texts. AWRS draws a token from the *unmasked* model, tests that one, and if it fails removes it and draws again. What it
returns follows exactly q(y) = p(y) C(y) / Z, and the rejections give an unbiased estimate w of Z = sum_y p(y) C(y)::

    E[w f(y)] = Z E_q[f(y)]   for every f

so that w is an importance weight: sequential Monte Carlo with it samples whole texts from the model conditioned on the
constraint. Tokens are visited in the order of Gumbel keys log p(y) + G, which is sampling without replacement.

Recursive estimator: with rejected mass M, the i-th visited token has c_i = p(y_i) / (1 - M)::

    y_i rejected:  L += log(1 - c_i),  M += p(y_i)
    y_i accepted:  w = exp(L) if it was the last one, or if y_(i+1) would be accepted too, else exp(L) c_i

Geometric estimator (for peaked p, several acceptances, or a cap on rejections): the run with replacement is simulated
from the one without, by adding Geometric(1 - M) - 1 phantom rejections before every fresh token; after ``max_accepts``
= a acceptances or ``max_rejects`` rejections, w = min(a - 1, n_acc) / (n_acc + n_rej - 1).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..core.errors import BadInputError
from ..core.settings import load_function
from ..decoding.base import Decoder, Example
from ..decoding.call import DecodingCall, DecodingStats
from ..decoding.row import DecodingRow
from ..decoding.steps import Steps, check_pickable, ids_of_row, inputs_of_row
from .base import CallableConstraint, Constraint, DeadEndError
from .engine.compiled import CompiledGrammar
from .engine.compiler import GrammarCompiler
from .engine.matcher import GrammarMatcher
from .engine.vocabulary import TokenizerInfo
from .grammar import Grammar
from .logits_processor import check_of_schemas, check_vocabulary, letters, only_one, parse_source
from .particles import Judge, Particle, TextJudge, effective_sample_size, log_mean, normalised, resample

NEGLIGIBLE = 1e-10
"""Probability mass that counts as none: what rounding leaves. (1e-5 in the authors' single precision; double precision
allows less, and a grammar may ask for a token that the model finds that unlikely.)"""
PEAKED = 2 / 3
"""From this largest probability on the geometric estimator takes over."""


@dataclass
class Draw:
    """One step: the token (None if nothing is allowed), the log-weight, and how many tokens were tested."""

    token: int | None
    log_weight: float
    evaluations: int


def visit(logps: np.ndarray, rng: np.random.Generator) -> Iterator[int]:
    """Tokens in the order of sampling without replacement; sorts only as far as it is asked."""
    keys = logps + rng.gumbel(size=logps.shape)
    taken, width = 0, 32
    while taken < len(keys):
        width = min(width, len(keys))
        best = np.argpartition(-keys, width - 1)[:width] if width < len(keys) else np.arange(len(keys))
        best = best[np.argsort(-keys[best])]
        for index in best[taken:]:
            if not math.isfinite(keys[index]):
                return
            yield int(index)
        taken, width = width, 8 * width


def awrs(
    logps: np.ndarray,
    accept: Callable[[int], bool],
    rng: np.random.Generator,
    proper_weights: bool = True,
    max_accepts: int = 2,
    max_rejects: float = math.inf,
    estimator: str = "auto",
) -> Draw:
    """One token from q, with an unbiased estimate of Z as its weight.

    Args:
        logps: ``[V]`` log-probabilities. If candidates were pruned (set to minus infinity) the weight counts what was
            kept.
        accept: whether a token is allowed; called at most once for each.
        proper_weights: False returns the first accepted token and weight 1: the same distribution, fewer tests.
        max_accepts, max_rejects: where the geometric estimator stops.
        estimator: ``"recursive"``, ``"geometric"``, or ``"auto"``.

    Raises:
        BadInputError: fewer than two acceptances with weights, a cap below one, or an unknown estimator.
    """
    if estimator not in ("auto", "recursive", "geometric"):
        raise BadInputError(f"estimator is 'auto', 'recursive' or 'geometric'; got {estimator!r}.")
    if max_accepts < 2 or max_rejects < 2:
        raise BadInputError(f"max_accepts and max_rejects must be at least 2; got {max_accepts} and {max_rejects}.")
    top = float(logps.max())
    if not math.isfinite(top):
        return Draw(None, -math.inf, 0)
    kept = top + math.log(float(np.exp(logps - top).sum()))  # below 0 if candidates were pruned
    logps = logps - kept
    answers: dict[int, bool] = {}

    def test(token: int) -> bool:
        if token not in answers:
            answers[token] = bool(accept(token))
        return answers[token]

    if not proper_weights:
        for token in visit(logps, rng):
            if test(token):
                return Draw(token, 0.0, len(answers))
        return Draw(None, -math.inf, len(answers))
    if estimator == "auto":
        geometric = top - kept >= math.log(PEAKED) or max_accepts > 2 or max_rejects < math.inf
        estimator = "geometric" if geometric else "recursive"
    if estimator == "recursive":
        chosen, weight = _recursive(logps, test, rng)
    else:
        chosen, weight = _geometric(logps, test, rng, max_accepts, max_rejects)
    return Draw(chosen, weight + kept if weight > -math.inf else weight, len(answers))


def _recursive(logps: np.ndarray, test: Callable[[int], bool], rng: np.random.Generator) -> tuple[int | None, float]:
    log_multiplier, rejected = 0.0, 0.0
    order = visit(logps, rng)
    for token in order:
        if 1 - rejected < NEGLIGIBLE:
            break
        prob = math.exp(logps[token])
        conditional = min(prob / (1 - rejected), 1.0)
        if not test(token):
            if conditional >= 1.0:
                break
            log_multiplier += math.log1p(-conditional)
            rejected += prob
            continue
        following = next(order, None) if 1 - rejected - prob >= NEGLIGIBLE else None
        if following is None or test(following):
            return token, log_multiplier
        return token, log_multiplier + math.log(conditional)
    return None, -math.inf


def _geometric(
    logps: np.ndarray, test: Callable[[int], bool], rng: np.random.Generator, max_accepts: int, max_rejects: float
) -> tuple[int | None, float]:
    candidates = logps.copy()
    first: int | None = None
    accepted, rejects, rejected = 0, 0.0, 0.0
    while accepted < max_accepts and rejects < max_rejects:
        found = False
        for token in visit(candidates, rng):
            if 1 - rejected < NEGLIGIBLE:
                break
            if rejected > 0:  # draws with replacement that would have hit what is rejected already
                rejects += float(rng.geometric(1 - rejected)) - 1
                if rejects >= max_rejects:
                    rejects = max_rejects
                    break
            if test(token):
                accepted, found = accepted + 1, True
                first = token if first is None else first
                break
            rejects += 1
            rejected += math.exp(logps[token])
            candidates[token] = -math.inf
            if rejects >= max_rejects:
                break
        if not found and rejects < max_rejects:
            break  # nothing is left to accept
    if accepted == 0:
        return None, -math.inf
    weight = min(max_accepts - 1, accepted) / (accepted + rejects - 1) if accepted + rejects > 1 else 1.0
    return first, math.log(weight) if weight > 0 else -math.inf


@dataclass
class AWRSStats(DecodingStats):
    """Counters of a call; ``rounds`` are tokens drawn.

    Attributes:
        evaluations: tests of the constraint.
        seconds_testing: time of drawing and testing, without the model.
        log_marginal: estimate of the log-probability that the model's text satisfies the constraint (of the last row).
        particles: the last row's texts with their normalised weights.
    """

    evaluations: int = 0
    seconds_testing: float = 0.0
    log_marginal: float = -math.inf
    particles: list[tuple[list[int], float]] = field(default_factory=list)


@dataclass
class AWRS(Decoder):
    """Decoding with rejection sampling under any constraint, alone or with particles (sequential Monte Carlo).

    Args:
        constraint: a ``CompiledGrammar``, a ``Constraint``, a function ``text -> bool`` (whether the text can be
            completed), or ``"module:function"``.
        finished: whether a text is complete, for functions (also ``"module:function"``); default ``constraint``.
        on: ``"text"`` or ``"bytes"``: what functions are given.
        schema, regex, grammar: instead of ``constraint``, as for ``XGrammar``.
        property_order: for ``schema``, as for ``XGrammar``.
        particles: texts carried at once; 1 is plain rejection sampling.
        max_accepts, max_rejects, proper_weights: see ``awrs``. With one particle the weights change nothing but cost
            tests.
        ess_threshold: resample when the effective sample size falls below this share of the particles.
        resampling: ``"stratified"`` or ``"multinomial"``.
        critic: ``text -> log-weight``, added when a text is finished (SMC's final potential).
        seed: of the random numbers; None draws one from torch's generator.

    After a call: ``particles_`` (token lists with normalised weights), ``log_marginal`` (estimate of the
    log-probability that the model's text satisfies the constraint), ``evaluations`` (tests of the constraint) and
    ``seconds_testing`` (drawing and testing, without the model). The returned sequence is one particle, drawn by
    weight. Greedy decoding (``do_sample=False``)
    is not what this samples from: it is refused. ``scores`` are what tokens were drawn from: the model's, not masked.
    """

    stats_type: ClassVar[type[DecodingStats]] = AWRSStats
    trace_columns: ClassVar[tuple[str, ...]] = ("evaluations", "log_weight")
    station: ClassVar[str] = "constraints"
    continues: ClassVar[bool] = False
    lossless: ClassVar[bool] = False
    reads_by_steps: ClassVar[bool] = True
    carries: ClassVar[frozenset[str] | None] = None
    colour: ClassVar[str] = "evaluations"
    samples_only: ClassVar[bool] = True
    constraint: Any = None
    finished: Any = None
    on: str = "text"
    schema: str | None = None
    regex: str | None = None
    grammar: str | None = None
    property_order: str = "schema"
    particles: int = 1
    max_accepts: int = 2
    max_rejects: int | None = None
    proper_weights: bool = True
    ess_threshold: float = 0.5
    resampling: str = "stratified"
    critic: Callable[[str], float] | None = field(default=None, repr=False)
    seed: int | None = None
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False)
    info: TokenizerInfo | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.particles < 1:
            raise BadInputError(f"AWRS needs at least one particle; got {self.particles}.")
        if self.resampling not in ("stratified", "multinomial"):
            raise BadInputError(f"resampling is 'stratified' or 'multinomial'; got {self.resampling!r}.")
        if not 0 <= self.ess_threshold <= 1:
            raise BadInputError(f"ess_threshold is a share between 0 and 1; got {self.ess_threshold}.")
        awrs(
            np.zeros(1),
            lambda _token: True,
            np.random.default_rng(0),
            True,
            self.max_accepts,
            self.max_rejects or math.inf,
        )
        self._compiled: CompiledGrammar | Constraint | None = None
        self._grammar: Grammar | None = None
        only_one("AWRS", constraint=self.constraint, schema=self.schema, regex=self.regex, grammar=self.grammar)
        otherwise = any(given is not None for given in (self.constraint, self.regex, self.grammar))
        check_of_schemas(self, otherwise, "property_order")
        if self.constraint is None:
            self._grammar = parse_source(self.schema, self.regex, self.grammar, property_order=self.property_order)
        elif isinstance(self.constraint, (CompiledGrammar, Constraint)):
            self._compiled = self.constraint
        else:
            check, done = (
                load_function(value, "A constraint", "--constraint checks:is_json") if isinstance(value, str) else value
                for value in (self.constraint, self.finished)
            )
            self._compiled = check if isinstance(check, Constraint) else CallableConstraint(check, done, self.on)

    @property
    def stats(self) -> AWRSStats:
        return cast(AWRSStats, super().stats)

    @property
    def evaluations(self) -> int:
        """Tests of the constraint in the last call."""
        return self.stats.evaluations

    @property
    def seconds_testing(self) -> float:
        """Seconds of the last call spent on drawing and testing."""
        return self.stats.seconds_testing

    @property
    def log_marginal(self) -> float:
        """Estimate of the log-probability that the model's text satisfies the constraint."""
        return self.stats.log_marginal

    @property
    def particles_(self) -> list[tuple[list[int], float]]:
        """The last row's texts with their normalised weights."""
        return self.stats.particles

    @property
    def streams(self) -> bool:
        return self.particles == 1

    def prepare(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Self:
        """Compiles for a tokenizer and a model's vocabulary size; returns itself."""
        self.tokenizer = tokenizer
        self.info = TokenizerInfo.from_huggingface(tokenizer, vocab_size)
        if self._grammar is not None:
            self._compiled = GrammarCompiler(self.info).compile_grammar(self._grammar)
        return self

    def judge(self) -> Judge:
        """A fresh judge of tokens: ``accepts``, ``accept_token``, ``fork``."""
        if isinstance(self._compiled, CompiledGrammar):
            return GrammarMatcher(self._compiled)
        if self._compiled is None or self.info is None:
            raise BadInputError(
                "AWRS does not know the tokenizer.", "Call decoder.prepare(tokenizer, model.config.vocab_size) first."
            )
        return TextJudge(self._compiled, self.info)

    def check_model(self, config: PreTrainedConfig) -> None:
        """Raises BadInputError for a grammar that was compiled for a larger vocabulary."""
        super().check_model(config)
        if isinstance(self._compiled, CompiledGrammar):
            check_vocabulary(self._compiled, config)

    def check_call(self, call: DecodingCall[AWRSStats]) -> None:
        """Raises BadInputError without a tokenizer, and what ``check_pickable`` raises for several particles."""
        self.judge()
        if self.particles > 1:
            check_pickable("AWRS with several particles", call.model, call.model_kwargs)

    def decode_rows(self, call: DecodingCall[AWRSStats]) -> None:
        rng = np.random.default_rng(int(torch.randint(1 << 62, (1,))) if self.seed is None else self.seed)
        for row in call.rows:
            self._decode(call, row, rng)

    def _decode(self, call: DecodingCall[AWRSStats], row: DecodingRow, rng: np.random.Generator) -> None:
        """Sequential Monte Carlo: all living particles share a forward; each draws and tests its own token.

        Raises:
            DeadEndError: every particle died; says how far the text was valid.
        """
        stats, vocab = call.stats, call.vocab_size
        steps = Steps(call.model, inputs_of_row(call, row))
        logits = steps.read(ids_of_row(call, row))[:, :vocab].expand(self.particles, -1)
        stats.target_forwards += 1
        alive = [Particle(self.judge(), row.fork()) for _ in range(self.particles)]
        everyone = list(alive)
        if self.particles > 1:
            steps.pick([0] * self.particles)
        while alive:
            text = torch.cat([particle.row.ids for particle in alive])
            scores = row.processors(text, logits.clone())
            logps = torch.log_softmax(scores, -1).double().cpu().numpy()
            for place, particle in enumerate(alive):
                self._extend(particle, logps[place], scores[place], logits[place], rng, stats)
            if all(particle.log_weight == -math.inf for particle in everyone):
                raise self._dead(max(everyone, key=lambda particle: len(particle.row.new)).row)
            log_weights = np.array([particle.log_weight for particle in everyone])
            weights = normalised(log_weights)
            source = {id(particle): place for place, particle in enumerate(alive)}
            ancestry = [source.get(id(particle)) for particle in everyone]
            if len(everyone) > 1 and effective_sample_size(weights) < self.ess_threshold * len(everyone):
                mean = log_mean(log_weights)
                chosen = resample(weights, rng, self.resampling)
                ancestry = [ancestry[index] for index in chosen]
                everyone = [everyone[index].fork() for index in chosen]
                for particle in everyone:
                    particle.log_weight = mean
            going = [
                (particle, place)
                for particle, place in zip(everyone, ancestry, strict=True)
                if not particle.finished and particle.log_weight > -math.inf
            ]
            alive = [particle for particle, _ in going]
            if not alive:
                break
            places = [place for _, place in going if place is not None]  # whoever goes on was alive
            if places != list(range(logits.shape[0])):
                steps.pick(places)
            logits = steps.read(torch.cat([ids_of_row(call, particle.row) for particle in alive]))[:, :vocab]
            stats.target_forwards += 1
        log_weights = np.array([particle.log_weight for particle in everyone])
        weights = normalised(log_weights)
        stats.log_marginal = log_mean(log_weights)
        stats.particles = [
            (list(particle.row.new), float(weight)) for particle, weight in zip(everyone, weights, strict=True)
        ]
        stats.evaluations += sum(particle.evaluations for particle in everyone)
        row.adopt(everyone[int(rng.choice(len(everyone), p=weights))].row)

    def _extend(
        self,
        particle: Particle,
        logps: np.ndarray,
        scores: torch.Tensor,
        logits: torch.Tensor,
        rng: np.random.Generator,
        stats: AWRSStats,
    ) -> None:
        """Draws a particle's next token, and ends the particle where nothing is allowed or the text is finished."""
        began = time.perf_counter()
        draw = awrs(
            logps, particle.judge.accepts, rng, self.proper_weights, self.max_accepts,
            math.inf if self.max_rejects is None else self.max_rejects,
        )  # fmt: skip
        stats.seconds_testing += time.perf_counter() - began
        stats.rounds += 1
        particle.log_weight += draw.log_weight
        if draw.token is None:
            particle.log_weight = -math.inf
            stats.evaluations += draw.evaluations
            return
        particle.judge.accept_token(draw.token)
        particle.evaluations += draw.evaluations
        ended = particle.row.append(
            draw.token, scores, logits, evaluations=draw.evaluations, log_weight=draw.log_weight
        )
        particle.finished = ended or particle.judge.is_terminated()
        if particle.finished and self.critic is not None:
            particle.log_weight += float(self.critic(self._spell(particle.row.new).decode("utf-8", "replace")))

    def figures(self) -> dict[str, float]:
        figures = {
            "target forwards": float(self.stats.target_forwards),
            "tests of the constraint": float(self.evaluations),
            "tests a token": self.evaluations / max(self.stats.rounds, 1),
        }
        return figures | ({"log-probability of the constraint": self.log_marginal} if self.proper_weights else {})

    def _spell(self, tokens: Sequence[int]) -> bytes:
        info = self.info or getattr(self._compiled, "tokenizer_info", None)
        return (
            b"".join(info.vocabulary[t] or b"" for t in tokens if t < len(info.vocabulary)) if info is not None else b""
        )

    def _dead(self, row: DecodingRow) -> DeadEndError:
        return DeadEndError(
            f"No token keeps the text valid ({'all particles' if self.particles > 1 else 'the text'} died).",
            self._spell(row.new),
            "Use more particles, a higher temperature, or a constraint that looks further ahead.",
        )

    @classmethod
    def examples(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Example]:
        size = model.config.get_text_config().vocab_size
        free = letters(size, "[^]*")
        return {
            "anything": Example(lambda **settings: cls(free, **settings), exact=True),
            "particles": Example(lambda **settings: cls(free, particles=3, **settings), prefix_stable=False),
        }
