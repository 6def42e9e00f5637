"""XGrammar: masks of a context-free grammar at almost no cost (arXiv 2411.15100).

A grammar is a pushdown automaton over bytes; its state is a set of stacks. Whether a token (a byte string s) is allowed on a
stack with top q and rest r is settled, for most tokens, by q alone::

    accepted(q) = {s : some run of s from q ends above r}               context-independent, yes
    depend(q)   = {s : every run of s that survives pops into r}        context-dependent: only these need the real stack
    the others                                                          context-independent, no

``depend`` is cut down when it is computed: after a pop the rest of s must be readable at some place that can follow the rule
anywhere in the grammar (context expansion). At run time

    mask(stacks) = union over (q, r) of  accepted(q) | {s in depend(q) : s survives on (q, r)}

The same split is made again with one more frame known, then two, and so on: a context (q, r_1, ..., r_k) settles some of what
(q, r_1, ..., r_k-1) left open, and most stacks are settled by one frame. Contexts of one frame are few (the places that a rule
can return to), so they are computed ahead; a context met once is a dictionary look-up ever after.
Sets are stored as whichever is smallest of a list of accepted tokens, of rejected tokens, and a bitset. Stacks are nodes of a
tree with parent pointers, so branches share them and rolling back any number of tokens is a change of pointers.

In a decoder the mask of the next token is computed while the model runs::

    model.generate(**inputs, logits_processor=[GrammarLogitsProcessor(compiled)])    # any batch, any sampling, beams
    model.generate(**inputs, custom_generate=XGrammar(compiled))                     # masks cost no time; jumps

Choices of ours: contexts of growing depth, where the paper checks dependent tokens at every step; entries are computed ahead for a
tenth of a second, the others on first use; those of nodes that behave alike for as many bytes as the longest token are shared, so
that a string of up to 10,000 characters needs few; automata are deterministic within a rule.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList

from ..core.errors import BadInputError
from ..core.trace import TokenTrace
from ..decoding.base import (
    Decoder,
    DecodingStats,
    check_one_row,
    check_prompt,
    check_unread,
    join_rows,
    refuse_unsupported,
    split_rows,
)
from ..decoding.matcher import apply_token_bitmask_inplace, bitmask_to_bool
from .logits_processor import ConstrainedOutput, GrammarLogitsProcessor, only_one, parse_source
from .matcher import CompiledGrammar, GrammarCompiler, GrammarMatcher
from .vocabulary import TokenizerInfo

__all__ = ["GrammarLogitsProcessor", "XGrammar"]


@dataclass
class XGrammar(Decoder):
    """Decoding under a grammar whose masks are computed while the model runs.

    Args:
        constraint: a ``CompiledGrammar``, or one for each row of the batch.
        schema, regex, grammar: instead of ``constraint``: a JSON Schema, a regular expression, EBNF; the text or a file's name.
            ``prepare`` compiles them once the tokenizer is known.
        jump_forward: append text that must come next at once, tokenised as the tokenizer would, instead of sampling it token
            by token. The text's distribution stays what it is; fewer forward passes are needed.
        any_whitespace: for ``schema``: free white space between JSON tokens.
        strict_mode: for ``schema``: objects are closed unless the schema says otherwise.

    With ``jump_forward=False`` the tokens are those of ``generate`` with a ``GrammarLogitsProcessor``. Rows of a batch are
    decoded one after the other.
    """

    lossless: ClassVar[bool] = False
    colour: ClassVar[str] = "choice_bits"
    constraint: CompiledGrammar | Sequence[CompiledGrammar] | None = None
    schema: str | None = None
    regex: str | None = None
    grammar: str | None = None
    jump_forward: bool = False
    any_whitespace: bool = True
    strict_mode: bool = True
    tokenizer: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        only_one("XGrammar", constraint=self.constraint, schema=self.schema, regex=self.regex, grammar=self.grammar)
        self._complete: list[bool] = []
        if self.constraint is None:  # syntax errors are reported now, not after the model has loaded
            self._grammar = parse_source(self.schema, self.regex, self.grammar, self.any_whitespace, self.strict_mode)

    def prepare(self, tokenizer: Any, vocab_size: int) -> XGrammar:
        """Compiles for a tokenizer and a model's vocabulary size; returns itself."""
        self.tokenizer = tokenizer
        if self.constraint is None:
            info = TokenizerInfo.from_huggingface(tokenizer, vocab_size)
            self.constraint = GrammarCompiler(info).compile_grammar(self._grammar)
        return self

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
        """Decodes as ``generate`` would, within the grammar; see ``Decoder``.

        Raises:
            BadInputError: no compiled grammar, an empty prompt, or a generation mode that one path cannot honour.
        """
        start = time.perf_counter()
        config = generation_config if generation_config is not None else model.generation_config
        refuse_unsupported("XGrammar", config, synced_gpus)
        check_prompt(model, input_ids.shape[1])
        if self.constraint is None:
            raise BadInputError(
                "The grammar is not compiled.", "Call decoder.prepare(tokenizer, model.config.vocab_size) first."
            )
        if self.jump_forward and self.tokenizer is None:
            raise BadInputError(
                "jump_forward needs the tokenizer.", "Call prepare(tokenizer, vocab_size), or pass tokenizer=."
            )
        grammars = [self.constraint] if isinstance(self.constraint, CompiledGrammar) else list(self.constraint)
        rows = split_rows(input_ids, model_kwargs.get("attention_mask"))
        if len(grammars) not in (1, len(rows)):
            raise BadInputError(
                f"{len(grammars)} grammars do not fit a batch of {len(rows)} rows.", "Give one, or one a row."
            )
        cache = model_kwargs.get("past_key_values")
        check_one_row("XGrammar", len(rows), streamer, cache)
        self.stats, self.trace, self._complete = DecodingStats(), [], []
        processors, criteria = (
            LogitsProcessorList(logits_processor or []),
            StoppingCriteriaList(stopping_criteria or []),
        )
        new = []
        with ThreadPoolExecutor(1) as pool:
            for place, (ids, padding) in enumerate(rows):
                mine = cache if len(rows) == 1 and cache is not None else DynamicCache()
                matcher = GrammarMatcher(grammars[min(place, len(grammars) - 1)])
                new.append(
                    self._row(
                        model, ids, padding, mine, matcher, processors, criteria, bool(config.do_sample), streamer, pool
                    )
                )
        if streamer is not None:
            streamer.end()
        self.stats.seconds = time.perf_counter() - start
        self.stats.new_tokens = sum(map(len, new))
        sequences = join_rows(input_ids, new, config)
        if not config.return_dict_in_generate:
            return sequences
        return ConstrainedOutput(
            sequences=sequences,
            past_key_values=mine if len(rows) == 1 else None,
            stats=self.stats,
            trace=self.trace or None,
        )

    def _row(
        self, model: Any, ids: torch.Tensor, padding: torch.Tensor, cache: Any, matcher: GrammarMatcher, processors: Any, criteria: Any,
        do_sample: bool, streamer: Any, pool: ThreadPoolExecutor,
    ) -> list[int]:  # fmt: skip
        check_unread(cache, len(ids))
        device, past = ids.device, cache.get_seq_length()
        text = torch.cat([padding, ids])[None]
        pending = ids[past:]
        vocab = model.config.get_text_config().vocab_size
        bitmask = torch.zeros(1, (vocab + 31) // 32, dtype=torch.int32)
        new: list[int] = []
        columns: dict[str, list[Any]] = {"choice_bits": [], "allowed": [], "source": [], "allowed_mass": []}
        stop = False

        def append(token: int, allowed: int, source: str, mass: float | None) -> bool:
            nonlocal text
            new.append(token)
            text = torch.cat([text, torch.tensor([[token]], device=device)], 1)
            if streamer is not None:
                streamer.put(torch.tensor([token]))
            if self.trace_enabled:
                for name, value in zip(columns, (math.log2(allowed), allowed, source, mass), strict=True):
                    columns[name].append(value)
            return bool(criteria(text, None).all()) or matcher.is_terminated()

        while not stop:
            masking = pool.submit(matcher.fill_next_token_bitmask, bitmask)  # while the model reads the last tokens
            positions = torch.arange(past, past + len(pending), device=device)[None]
            output = model(
                input_ids=pending[None], position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            self.stats.target_forwards += 1
            past += len(pending)
            logits = output.logits[:, -1, :vocab].float()
            restricted = masking.result()
            mass, allowed = 1.0, vocab
            if restricted:
                if self.trace_enabled:
                    keep = bitmask_to_bool(bitmask, vocab).to(device)
                    allowed = int(keep.sum())
                    mass = float(torch.softmax(logits, -1)[keep].sum())
                apply_token_bitmask_inplace(logits, bitmask.to(device))
            scores = processors(text, logits)
            token = int(torch.multinomial(torch.softmax(scores, -1), 1)) if do_sample else int(scores.argmax(-1))
            if not matcher.accept_token(token):
                raise BadInputError(
                    f"A logits processor chose token {token}, which the grammar forbids.",
                    "Drop forced tokens, or the processor.",
                )
            stop = append(token, allowed, "forced" if allowed == 1 else "model", mass)
            pending = torch.tensor([token], device=device)
            if self.jump_forward and not stop:
                for jumped in self._jump(matcher):
                    matcher.accept_token(jumped)
                    self.stats.accepted += 1
                    pending = torch.cat([pending, torch.tensor([jumped], device=device)])
                    if stop := append(jumped, 1, "jump", None):
                        break
        self._complete.append(matcher.can_end())
        if self.trace_enabled:
            self.trace.append(TokenTrace(new, columns=columns, station="constraints"))
        return new

    def figures(self) -> dict[str, float]:
        jumped = {"tokens jumped": float(self.stats.accepted)} if self.jump_forward else {}
        return {
            "target forwards": float(self.stats.target_forwards),
            **jumped,
            "complete texts": float(sum(self._complete)),
        }

    def _jump(self, matcher: GrammarMatcher) -> list[int]:
        """The tokens of the text that must come next, but for the last one: what follows may change its cut."""
        forced = matcher.find_jump_forward_string()
        if not forced:
            return []
        tokens = self.tokenizer(forced, add_special_tokens=False)["input_ids"][:-1]
        probe = matcher.fork()
        return tokens if all(probe.accept_token(token) for token in tokens) else []
