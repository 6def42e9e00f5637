"""XGrammar: masks of a context-free grammar at almost no cost (arXiv 2411.15100).

A grammar is a pushdown automaton over bytes; its state is a set of stacks. Whether a token (a byte string s) is allowed
on a stack with top q and rest r is settled, for most tokens, by q alone::

    accepted(q) = {s : some run of s from q ends above r}               context-independent, yes
    depend(q)   = {s : every run of s that survives pops into r}       context-dependent: only these need the real stack
    the others                                                          context-independent, no

``depend`` is cut down when it is computed: after a pop the rest of s must be readable at some place that can follow the
rule anywhere in the grammar (context expansion). At run time

    mask(stacks) = union over (q, r) of  accepted(q) | {s in depend(q) : s survives on (q, r)}

The same split is made again with one more frame known, then two, and so on: a context (q, r_1, ..., r_k) settles some
of what (q, r_1, ..., r_k-1) left open, and most stacks are settled by one frame. Contexts of one frame are few (the
places that a rule can return to), so they are computed ahead; a context met once is a dictionary look-up ever after.
Sets are stored as whichever is smallest of a list of accepted tokens, of rejected tokens, and a bitset. Stacks are
nodes of a tree with parent pointers, so branches share them and rolling back any number of tokens is a change of
pointers.

In a decoder the mask of the next token is computed while the model runs::

    model.generate(**inputs, logits_processor=[GrammarLogitsProcessor(compiled)])    # any batch, any sampling, beams
    model.generate(**inputs, custom_generate=XGrammar(compiled))                     # masks cost no time; jumps

Choices of ours: contexts of growing depth, where the paper checks dependent tokens at every step; entries are computed
ahead for a tenth of a second, the others on first use; those of nodes that behave alike for as many bytes as the
longest token are shared, so that a string of up to 10,000 characters needs few; automata are deterministic within a
rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..core.errors import BadInputError
from ..decoding.base import Decoder, Example
from ..decoding.call import DecodingCall, DecodingStats
from ..decoding.checks import check_unread
from ..decoding.matcher import apply_token_bitmask_inplace, bitmask_to_bool
from ..decoding.row import DecodingRow
from ..decoding.steps import reader
from .engine.compiled import CompiledGrammar
from .engine.compiler import GrammarCompiler
from .engine.matcher import GrammarMatcher
from .engine.vocabulary import TokenizerInfo
from .logits_processor import (
    GrammarLogitsProcessor,
    check_of_schemas,
    check_vocabulary,
    letters,
    only_one,
    parse_source,
)

__all__ = ["GrammarLogitsProcessor", "XGrammar"]


@dataclass
class XGrammarStats(DecodingStats):
    """Counters of a call; ``accepted`` are tokens appended without a forward (``jump_forward``).

    Attributes:
        complete: whether each row's text is complete.
    """

    complete: list[bool] = field(default_factory=list)


@dataclass
class XGrammar(Decoder):
    """Decoding under a grammar whose masks are computed while the model runs.

    Args:
        constraint: a ``CompiledGrammar``, or one for each row of the batch.
        schema, regex, grammar: instead of ``constraint``: a JSON Schema, a regular expression, EBNF; the text or a
            file's name. ``prepare`` compiles them once the tokenizer is known.
        jump_forward: append text that must come next at once, tokenised as the tokenizer would, instead of sampling it
            token by token. The text's distribution stays what it is; fewer forward passes are needed.
        any_whitespace: for ``schema``: free white space between JSON tokens.
        strict_mode: for ``schema``: objects are closed unless the schema says otherwise.
        property_order: for ``schema``: ``"schema"``, ``"required_first"``, ``"flexible"`` or ``"any"``, see
            ``Grammar.from_json_schema``.

    With ``jump_forward=False`` the tokens are those of ``generate`` with a ``GrammarLogitsProcessor``, on every model
    that ``generate`` decodes without an encoder. Rows of a batch are decoded one after the other; images and other
    further inputs come with one row. The trace has ``choice_bits`` (how many bits of choice the grammar left),
    ``allowed`` tokens, their ``allowed_mass`` under the model, and the ``source`` of the token: model, forced or jump.
    """

    stats_type: ClassVar[type[DecodingStats]] = XGrammarStats
    trace_columns: ClassVar[tuple[str, ...]] = ("choice_bits", "allowed", "source", "allowed_mass")
    station: ClassVar[str] = "constraints"
    lossless: ClassVar[bool] = False
    reads_by_steps: ClassVar[bool] = True
    carries: ClassVar[frozenset[str] | None] = None
    colour: ClassVar[str] = "choice_bits"
    constraint: CompiledGrammar | Sequence[CompiledGrammar] | None = None
    schema: str | None = None
    regex: str | None = None
    grammar: str | None = None
    jump_forward: bool = False
    any_whitespace: bool = True
    strict_mode: bool = True
    property_order: str = "schema"
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        only_one("XGrammar", constraint=self.constraint, schema=self.schema, regex=self.regex, grammar=self.grammar)
        otherwise = any(given is not None for given in (self.constraint, self.regex, self.grammar))
        check_of_schemas(self, otherwise, "any_whitespace", "strict_mode", "property_order")
        if self.constraint is None:  # syntax errors are reported now, not after the model has loaded
            self._grammar = parse_source(
                self.schema,
                self.regex,
                self.grammar,
                any_whitespace=self.any_whitespace,
                strict_mode=self.strict_mode,
                property_order=self.property_order,
            )

    @property
    def stats(self) -> XGrammarStats:
        return cast(XGrammarStats, super().stats)

    @property
    def grammars(self) -> list[CompiledGrammar]:
        """The compiled grammars: one, or one a row; none before ``prepare``."""
        if self.constraint is None:
            return []
        return [self.constraint] if isinstance(self.constraint, CompiledGrammar) else list(self.constraint)

    def prepare(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Self:
        """Compiles for a tokenizer and a model's vocabulary size; returns itself."""
        self.tokenizer = tokenizer
        if self.constraint is None:
            info = TokenizerInfo.from_huggingface(tokenizer, vocab_size)
            self.constraint = GrammarCompiler(info).compile_grammar(self._grammar)
        return self

    def check_model(self, config: PreTrainedConfig) -> None:
        """Raises BadInputError for a grammar that was compiled for a larger vocabulary."""
        super().check_model(config)
        for grammar in self.grammars:
            check_vocabulary(grammar, config)

    def check_call(self, call: DecodingCall[XGrammarStats]) -> None:
        """Raises BadInputError without a compiled grammar (or a tokenizer to jump with), for as many grammars as do not
        fit the batch, and for scores of tokens that are appended unread."""
        if self.constraint is None:
            raise BadInputError(
                "The grammar is not compiled.", "Call decoder.prepare(tokenizer, model.config.vocab_size) first."
            )
        if self.jump_forward and self.tokenizer is None:
            raise BadInputError(
                "jump_forward needs the tokenizer.", "Call prepare(tokenizer, vocab_size), or pass tokenizer=."
            )
        if self.jump_forward and call.wants:
            raise BadInputError(
                f"jump_forward appends tokens without scores; {' and '.join(call.wants)} cannot be given.",
                "Use jump_forward=False, or leave it out.",
            )
        if len(self.grammars) not in (1, len(call.input_ids)):
            raise BadInputError(
                f"{len(self.grammars)} grammars do not fit a batch of {len(call.input_ids)} rows.",
                "Give one, or one a row.",
            )

    def matcher_for(self, call: DecodingCall[XGrammarStats], row: int) -> GrammarMatcher:
        return GrammarMatcher(self.grammars[min(row, len(self.grammars) - 1)])

    def decode_row(self, call: DecodingCall[XGrammarStats], row: DecodingRow) -> None:
        with ThreadPoolExecutor(1) as pool:
            self._decode(call, row, pool)

    def _decode(self, call: DecodingCall[XGrammarStats], row: DecodingRow, pool: ThreadPoolExecutor) -> None:
        """A forward over what is new, its mask beside it, a token, and what must follow that."""
        matcher = cast(GrammarMatcher, row.matcher)
        if row.cache is not None:
            check_unread(row.cache, len(row.text))
        elif call.cache is not None and len(call.rows) == 1:
            check_unread(call.cache, row.ids.shape[1])
        read = reader(call, row)
        vocab = call.vocab_size
        bitmask = torch.zeros(1, (vocab + 31) // 32, dtype=torch.int32)
        stop = False
        while not stop:
            masking = pool.submit(matcher.fill_next_token_bitmask, bitmask)  # while the model reads the last tokens
            logits = read()
            call.stats.target_forwards += 1
            restricted = masking.result()
            mass, allowed = 1.0, vocab
            scores = logits.clone() if restricted or row.processors else logits
            if restricted:
                if row.columns is not None:
                    keep = bitmask_to_bool(bitmask[0], vocab).to(logits.device)
                    allowed = int(keep.sum())
                    mass = float(torch.softmax(logits, -1)[keep].sum())
                apply_token_bitmask_inplace(scores, bitmask[0].to(logits.device))
            scores = row.processed(scores, masked=True)
            token = row.choose(scores)
            source = "forced" if allowed == 1 else "model"
            entries: dict[str, Any] = {"choice_bits": math.log2(allowed), "allowed": allowed, "allowed_mass": mass}
            stop = row.append(token, scores, logits, source=source, **entries)
            if self.jump_forward and not stop:
                for jumped in self._jump(matcher):
                    call.stats.accepted += 1
                    if stop := row.append(jumped, choice_bits=0.0, allowed=1, source="jump"):
                        break
        call.stats.complete.append(matcher.can_end())

    def figures(self) -> dict[str, float]:
        jumped = {"tokens jumped": float(self.stats.accepted)} if self.jump_forward else {}
        return {
            "target forwards": float(self.stats.target_forwards),
            **jumped,
            "complete texts": float(sum(self.stats.complete)),
        }

    def _jump(self, matcher: GrammarMatcher) -> list[int]:
        """The tokens of the text that must come next, but for the last one: what follows may change its cut."""
        forced = matcher.find_jump_forward_string()
        if not forced:
            return []
        assert self.tokenizer is not None
        tokens = self.tokenizer(forced, add_special_tokens=False)["input_ids"][:-1]
        probe = matcher.fork()
        return tokens if all(probe.accept_token(token) for token in tokens) else []

    @classmethod
    def examples(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Example]:
        size = model.config.get_text_config().vocab_size
        free, narrow = letters(size, "[^]*"), letters(size, "[b-h]*")
        return {
            "anything": Example(lambda **settings: cls(free, **settings), exact=True),
            "some letters": Example(lambda **settings: cls(narrow, **settings)),
        }
