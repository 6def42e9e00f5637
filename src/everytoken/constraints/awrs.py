"""AWRS: adaptive weighted rejection sampling, constraints tested one token at a time (arXiv 2504.05410).

Masking tests every token of the vocabulary at every step, and renormalising locally bends the distribution of whole texts.
AWRS draws a token from the *unmasked* model, tests that one, and if it fails removes it and draws again. What it returns
follows exactly q(y) = p(y) C(y) / Z, and the rejections give an unbiased estimate w of Z = sum_y p(y) C(y)::

    E[w f(y)] = Z E_q[f(y)]   for every f

so that w is an importance weight: sequential Monte Carlo with it samples whole texts from the model conditioned on the
constraint. Tokens are visited in the order of Gumbel keys log p(y) + G, which is sampling without replacement.

Recursive estimator: with rejected mass M, the i-th visited token has c_i = p(y_i) / (1 - M)::

    y_i rejected:  L += log(1 - c_i),  M += p(y_i)
    y_i accepted:  w = exp(L) if it was the last one, or if y_(i+1) would be accepted too, else exp(L) c_i

Geometric estimator (for peaked p, several acceptances, or a cap on rejections): the run with replacement is simulated from the
one without, by adding Geometric(1 - M) - 1 phantom rejections before every fresh token; after ``max_accepts`` = a acceptances or
``max_rejects`` rejections, w = min(a - 1, n_acc) / (n_acc + n_rej - 1).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList

from ..core.errors import BadInputError
from ..core.settings import load_function
from ..core.trace import TokenTrace
from ..decoding.base import (
    Decoder,
    DecodingStats,
    check_one_row,
    check_prompt,
    join_rows,
    refuse_unsupported,
    split_rows,
)
from .base import CallableConstraint, Constraint, DeadEndError
from .grammar import Grammar
from .logits_processor import ConstrainedOutput, only_one, parse_source
from .matcher import CompiledGrammar, GrammarCompiler, GrammarMatcher
from .vocabulary import TokenizerInfo

NEGLIGIBLE = 1e-10
"""Probability mass that counts as none: what rounding leaves. (1e-5 in the authors' single precision; double precision allows
less, and a grammar may ask for a token that the model finds that unlikely.)"""
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
        logps: ``[V]`` log-probabilities. If candidates were pruned (set to minus infinity) the weight counts what was kept.
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


# -- what judges tokens ----------------------------------------------------------------------------------------------------
class _TextJudge:
    """A constraint on texts, asked token by token."""

    def __init__(self, constraint: Constraint, info: TokenizerInfo, text: bytes = b""):
        self.constraint, self.info, self.text = constraint, info, text

    def accepts(self, token: int) -> bool:
        if token in self.info.stop_token_ids:
            return self.constraint.complete(self.text)
        piece = self.info.vocabulary[token] if token < len(self.info.vocabulary) else None
        return bool(piece) and self.constraint.prefix(self.text + piece)  # type: ignore[operator]

    def accept_token(self, token: int) -> bool:
        if token not in self.info.stop_token_ids:
            self.text += self.info.vocabulary[token] or b""
        return True

    def fork(self) -> _TextJudge:
        return _TextJudge(self.constraint, self.info, self.text)


@dataclass
class _Particle:
    judge: Any
    tokens: list[int]
    log_weight: float
    finished: bool = False
    evaluations: list[int] = field(default_factory=list)
    increments: list[float] = field(default_factory=list)

    def fork(self) -> _Particle:
        return _Particle(
            self.judge.fork(),
            list(self.tokens),
            self.log_weight,
            self.finished,
            list(self.evaluations),
            list(self.increments),
        )


def resample(weights: np.ndarray, rng: np.random.Generator, method: str = "stratified") -> np.ndarray:
    """Ancestors for each of N particles, in proportion to normalised weights."""
    count = len(weights)
    if method == "multinomial":
        return rng.choice(count, count, p=weights)
    points = (np.arange(count) + rng.random(count)) / count
    return np.minimum(np.searchsorted(np.cumsum(weights), points), count - 1)


def effective_sample_size(weights: np.ndarray) -> float:
    return float(1.0 / np.square(weights).sum())


@dataclass
class AWRS(Decoder):
    """Decoding with rejection sampling under any constraint, alone or with particles (sequential Monte Carlo).

    Args:
        constraint: a ``CompiledGrammar``, a ``Constraint``, a function ``text -> bool`` (whether the text can be completed), or
            ``"module:function"``.
        finished: whether a text is complete, for functions (also ``"module:function"``); default ``constraint``.
        on: ``"text"`` or ``"bytes"``: what functions are given.
        schema, regex, grammar: instead of ``constraint``, as for ``XGrammar``.
        particles: texts carried at once; 1 is plain rejection sampling.
        max_accepts, max_rejects, proper_weights: see ``awrs``. With one particle the weights change nothing but cost tests.
        ess_threshold: resample when the effective sample size falls below this share of the particles.
        resampling: ``"stratified"`` or ``"multinomial"``.
        critic: ``text -> log-weight``, added when a text is finished (SMC's final potential).
        seed: of the random numbers; None draws one from torch's generator.

    After a call: ``particles_`` (token lists with normalised weights), ``log_marginal`` (estimate of the log-probability that
    the model's text satisfies the constraint), ``evaluations`` (tests of the constraint) and ``seconds_testing`` (drawing and testing, without the model). The returned sequence is one particle,
    drawn by weight. Greedy decoding (``do_sample=False``) is not what this samples from: it is refused.
    """

    lossless: ClassVar[bool] = False
    colour: ClassVar[str] = "evaluations"
    samples_only: ClassVar[bool] = True
    constraint: Any = None
    finished: Any = None
    on: str = "text"
    schema: str | None = None
    regex: str | None = None
    grammar: str | None = None
    particles: int = 1
    max_accepts: int = 2
    max_rejects: int | None = None
    proper_weights: bool = True
    ess_threshold: float = 0.5
    resampling: str = "stratified"
    critic: Callable[[str], float] | None = field(default=None, repr=False)
    seed: int | None = None
    tokenizer: Any = field(default=None, repr=False)
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
        self.particles_: list[tuple[list[int], float]] = []
        self.log_marginal, self.evaluations, self.seconds_testing = -math.inf, 0, 0.0
        self._compiled: CompiledGrammar | Constraint | None = None
        self._grammar: Grammar | None = None
        only_one("AWRS", constraint=self.constraint, schema=self.schema, regex=self.regex, grammar=self.grammar)
        if self.constraint is None:
            self._grammar = parse_source(self.schema, self.regex, self.grammar)
        elif isinstance(self.constraint, (CompiledGrammar, Constraint)):
            self._compiled = self.constraint
        else:
            check, done = (
                load_function(value, "A constraint", "--constraint checks:is_json") if isinstance(value, str) else value
                for value in (self.constraint, self.finished)
            )
            self._compiled = check if isinstance(check, Constraint) else CallableConstraint(check, done, self.on)

    def prepare(self, tokenizer: Any, vocab_size: int) -> AWRS:
        """Compiles for a tokenizer and a model's vocabulary size; returns itself."""
        self.tokenizer = tokenizer
        self.info = TokenizerInfo.from_huggingface(tokenizer, vocab_size)
        if self._grammar is not None:
            self._compiled = GrammarCompiler(self.info).compile_grammar(self._grammar)
        return self

    def judge(self) -> Any:
        """A fresh judge of tokens: ``accepts``, ``accept_token``, ``fork``."""
        if isinstance(self._compiled, CompiledGrammar):
            return GrammarMatcher(self._compiled)
        if self._compiled is None or self.info is None:
            raise BadInputError(
                "AWRS does not know the tokenizer.", "Call decoder.prepare(tokenizer, model.config.vocab_size) first."
            )
        return _TextJudge(self._compiled, self.info)

    @torch.inference_mode()
    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generation_config: Any = None,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> ConstrainedOutput | torch.Tensor:
        """Samples a constrained text for each row.

        Raises:
            BadInputError: greedy decoding, no tokenizer, an empty prompt, or a mode that this cannot honour.
            DeadEndError: every particle died; says how far the text was valid.
        """
        start = time.perf_counter()
        config = generation_config if generation_config is not None else model.generation_config
        refuse_unsupported("AWRS", config, synced_gpus)
        check_prompt(model, input_ids.shape[1])
        if not config.do_sample:
            raise BadInputError(
                "AWRS samples; greedy decoding was asked for.", "Pass do_sample=True, or use XGrammar for greedy text."
            )
        cache = model_kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            raise BadInputError(
                "AWRS cannot continue a filled cache.", "Pass the whole prompt without past_key_values."
            )
        if streamer is not None and self.particles > 1:
            raise BadInputError("A streamer cannot follow several particles.", "Use particles=1, or no streamer.")
        rows = split_rows(input_ids, model_kwargs.get("attention_mask"))
        check_one_row("AWRS", len(rows), streamer, cache)
        rng = np.random.default_rng(int(torch.randint(1 << 62, (1,))) if self.seed is None else self.seed)
        self.stats, self.trace, self.evaluations, self.seconds_testing = DecodingStats(), [], 0, 0.0
        processors, criteria = (
            LogitsProcessorList(logits_processor or []),
            StoppingCriteriaList(stopping_criteria or []),
        )
        new = [self._row(model, ids, padding, processors, criteria, streamer, rng) for ids, padding in rows]
        if streamer is not None:
            streamer.end()
        self.stats.seconds = time.perf_counter() - start
        self.stats.new_tokens = sum(map(len, new))
        sequences = join_rows(input_ids, new, config)
        if not config.return_dict_in_generate:
            return sequences
        return ConstrainedOutput(sequences=sequences, stats=self.stats, trace=self.trace or None)

    def _row(
        self, model: Any, ids: torch.Tensor, padding: torch.Tensor, processors: Any, criteria: Any, streamer: Any, rng: np.random.Generator
    ) -> list[int]:  # fmt: skip
        vocab = model.config.get_text_config().vocab_size
        device = ids.device
        prompt = torch.cat([padding, ids])
        cache = DynamicCache()
        output = model(input_ids=ids[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.stats.target_forwards += 1
        alive = [_Particle(self.judge(), [], 0.0) for _ in range(self.particles)]
        everyone = list(alive)
        logits = output.logits[:, -1, :vocab].float().expand(self.particles, -1)
        if self.particles > 1:
            cache.batch_repeat_interleave(self.particles)
        log_marginal = 0.0
        while alive:
            text = torch.stack(
                [torch.cat([prompt, torch.tensor(p.tokens, dtype=prompt.dtype, device=device)]) for p in alive]
            )
            logps = torch.log_softmax(processors(text, logits.clone()), -1).double().cpu().numpy()
            for particle, row in zip(alive, logps, strict=True):
                self._extend(particle, row, rng, criteria, prompt, streamer)
            if all(p.log_weight == -math.inf for p in everyone):
                longest = max(everyone, key=lambda p: len(p.tokens))
                raise self._dead(longest)
            log_weights = np.array([p.log_weight for p in everyone])
            weights = np.exp(log_weights - log_weights.max())
            weights /= weights.sum()
            source = {id(particle): row for row, particle in enumerate(alive)}
            ancestry = [source.get(id(particle)) for particle in everyone]
            if len(everyone) > 1 and effective_sample_size(weights) < self.ess_threshold * len(everyone):
                mean = log_weights.max() + math.log(np.exp(log_weights - log_weights.max()).mean())
                chosen = resample(weights, rng, self.resampling)
                ancestry = [ancestry[index] for index in chosen]
                everyone = [everyone[index].fork() for index in chosen]
                for particle in everyone:
                    particle.log_weight = mean
            going = [
                (p, row)
                for p, row in zip(everyone, ancestry, strict=True)
                if not p.finished and p.log_weight > -math.inf
            ]
            alive = [particle for particle, _ in going]
            if not alive:
                break
            rows = [row for _, row in going]
            if rows != list(range(logits.shape[0])):
                cache.batch_select_indices(torch.tensor(rows, device=device))
            last = torch.tensor([[particle.tokens[-1]] for particle in alive], device=device)
            positions = torch.full_like(last, len(ids) + len(alive[0].tokens) - 1)
            output = model(input_ids=last, position_ids=positions, past_key_values=cache, use_cache=True)
            self.stats.target_forwards += 1
            logits = output.logits[:, -1, :vocab].float()
        log_weights = np.array([p.log_weight for p in everyone])
        log_marginal = float(log_weights.max() + math.log(np.exp(log_weights - log_weights.max()).mean()))
        weights = np.exp(log_weights - log_weights.max())
        weights /= weights.sum()
        self.log_marginal = log_marginal
        self.particles_ = [(list(p.tokens), float(w)) for p, w in zip(everyone, weights, strict=True)]
        self.evaluations += sum(sum(p.evaluations) for p in everyone)
        winner = everyone[int(rng.choice(len(everyone), p=weights))]
        if self.trace_enabled:
            columns: dict[str, list[Any]] = {
                "evaluations": list(winner.evaluations),
                "log_weight": list(winner.increments),
            }
            self.trace.append(TokenTrace(list(winner.tokens), columns=columns, station="constraints"))
        return winner.tokens

    def _extend(
        self,
        particle: _Particle,
        logps: np.ndarray,
        rng: np.random.Generator,
        criteria: Any,
        prompt: torch.Tensor,
        streamer: Any,
    ) -> None:
        began = time.perf_counter()
        draw = awrs(
            logps, particle.judge.accepts, rng, self.proper_weights, self.max_accepts,
            math.inf if self.max_rejects is None else self.max_rejects,
        )  # fmt: skip
        self.seconds_testing += time.perf_counter() - began
        self.stats.rounds += 1
        particle.log_weight += draw.log_weight
        if draw.token is None:
            particle.log_weight = -math.inf
            self.evaluations += draw.evaluations
            return
        particle.judge.accept_token(draw.token)
        particle.tokens.append(draw.token)
        particle.evaluations.append(draw.evaluations)
        particle.increments.append(draw.log_weight)
        if streamer is not None:
            streamer.put(torch.tensor([draw.token]))
        text = torch.cat([prompt, torch.tensor(particle.tokens, dtype=prompt.dtype, device=prompt.device)])[None]
        ended = getattr(particle.judge, "is_terminated", lambda: False)()
        particle.finished = ended or bool(criteria(text, None).all())
        if particle.finished and self.critic is not None:
            particle.log_weight += float(self.critic(self._spell(particle.tokens).decode("utf-8", "replace")))

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

    def _dead(self, particle: _Particle) -> DeadEndError:
        return DeadEndError(
            f"No token keeps the text valid ({'all particles' if self.particles > 1 else 'the text'} died).",
            self._spell(particle.tokens),
            "Use more particles, a higher temperature, or a constraint that looks further ahead.",
        )
