"""What the decoders of this station share: grammars given as settings, the output, and the logits processor."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor, PreTrainedConfig

from ..core.errors import BadInputError
from ..decoding.matcher import apply_token_bitmask_inplace
from ..decoding.output import DecodingOutput
from .engine.compiled import CompiledGrammar
from .engine.compiler import GrammarCompiler
from .engine.matcher import GrammarMatcher
from .engine.vocabulary import TokenizerInfo
from .grammar import Grammar


class GrammarLogitsProcessor(LogitsProcessor):
    """Keeps ``generate`` inside a grammar; one object serves one call after another.

    Args:
        compiled: the grammar, or one for each row of the batch.

    Rows are followed by their tokens, so beam search, which reorders them, works too.
    """

    def __init__(self, compiled: CompiledGrammar | Sequence[CompiledGrammar]):
        self.compiled = [compiled] if isinstance(compiled, CompiledGrammar) else list(compiled)
        if not self.compiled:
            raise BadInputError("There is no grammar.", "Pass a CompiledGrammar, or one for each row.")
        self.reset()

    def reset(self) -> None:
        """Forgets the text so far (noticed by itself when another prompt arrives)."""
        self._prompt: torch.Tensor | None = None
        self._matchers: dict[tuple[int, tuple[int, ...]], GrammarMatcher] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = input_ids.shape[0]
        length = None if self._prompt is None else self._prompt.shape[1]
        if length is None or input_ids.shape[1] < length or not torch.equal(input_ids[:, :length], self._prompt[:rows]):  # type: ignore[index]
            if len(self.compiled) not in (1, rows) and rows % len(self.compiled):
                raise BadInputError(
                    f"{len(self.compiled)} grammars do not fit a batch of {rows} rows.", "Give one, or one a row."
                )
            self._prompt, self._matchers = input_ids.clone(), {}
            length = input_ids.shape[1]
        info = self.compiled[0].tokenizer_info
        if info.vocab_size > scores.shape[-1]:
            raise BadInputError(
                f"The grammar was compiled for {info.vocab_size} tokens but the model has {scores.shape[-1]}.",
                "Build TokenizerInfo with vocab_size=model.config.vocab_size.",
            )
        bitmask = torch.full((rows, (scores.shape[-1] + 31) // 32), -1, dtype=torch.int32)
        fresh = {}
        for row, text in enumerate(input_ids[:, length:].tolist()):
            which = row * len(self.compiled) // rows
            key = (which, tuple(text))
            matcher = self._matchers.get(key)
            if matcher is None:
                matcher = self._follow(which, text)
            fresh[key] = matcher
            if not matcher.is_terminated():  # a finished row is padded by generate, whatever the scores
                matcher.fill_next_token_bitmask(bitmask, row)
        self._matchers = fresh
        scores = scores.clone()
        apply_token_bitmask_inplace(scores, bitmask.to(scores.device))
        return scores

    def _follow(self, which: int, text: list[int]) -> GrammarMatcher:
        known = self._matchers.get((which, tuple(text[:-1]))) if text else None
        if known is not None:
            matcher, rest = known.fork(), text[-1:]
        else:
            matcher, rest = GrammarMatcher(self.compiled[which]), text
        for token in rest:
            if matcher.is_terminated():
                break
            if not matcher.accept_token(token):
                raise BadInputError(
                    f"Token {token} was chosen although the grammar forbids it.",
                    "Another processor allowed or forced it: put the grammar last, or drop forced tokens.",
                )
        return matcher


ConstrainedOutput = DecodingOutput


def check_vocabulary(grammar: CompiledGrammar, config: PreTrainedConfig) -> None:
    """Raises BadInputError for a grammar that was compiled for a larger vocabulary than the model's."""
    compiled, width = grammar.tokenizer_info.vocab_size, config.get_text_config().vocab_size
    if compiled > width:
        raise BadInputError(
            f"The grammar was compiled for {compiled} tokens but the model has {width}.",
            "Build TokenizerInfo with vocab_size=model.config.vocab_size.",
        )


def letters(vocab_size: int, regex: str) -> CompiledGrammar:
    """A small grammar for the decoders' examples: token 0 ends a text, and token i spells letter i of the alphabet (1
    is b)."""
    spelled = [bytes([ord("a") + index]) for index in range(vocab_size)]
    return GrammarCompiler(TokenizerInfo(spelled, [0]), warm_seconds=0).compile_regex(regex)


def read_source(value: str) -> str:
    """A setting that may name a file: its text if there is such a file, else the value itself.

    Raises:
        BadInputError: it looks like a file's name, and there is none.
    """
    if "\n" not in value:
        # os.path's forms, unlike pathlib's, take text that cannot be a name at all: too long, a null character,
        # "~nobody".
        path = Path(os.path.expanduser(value))  # noqa: PTH111
        if os.path.isfile(path):  # noqa: PTH113
            try:
                return path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise BadInputError(f"{value} cannot be read: {error}", "It must be UTF-8 text.") from error
        if path.suffix in (".json", ".gbnf", ".ebnf") and "{" not in value:
            raise BadInputError(f"There is no file {value}.", "Check the path, or give the text itself.")
    return value


def parse_source(schema: str | None, regex: str | None, grammar: str | None, **options: Any) -> Grammar:
    """The grammar that one of three settings describes (any JSON if none is given); each may be the text or a file's
    name. ``options`` are those of ``Grammar.from_json_schema``; they say nothing of the others and are left aside.

    Raises:
        GrammarError: a syntax error, with its place.
    """
    if regex is not None:
        return Grammar.from_regex(read_source(regex).removesuffix("\n"))
    if grammar is not None:
        return Grammar.from_ebnf(read_source(grammar))
    return Grammar.from_json_schema("true" if schema is None else read_source(schema), **options)


def check_of_schemas(decoder: Any, described_otherwise: bool, *options: str) -> None:
    """Raises BadInputError for an option of JSON Schemas that differs from its default where no schema is given.

    Args:
        decoder: a dataclass of settings.
        options: names of its settings, whose defaults the class holds.
    """
    changed = [name for name in options if getattr(decoder, name) != getattr(type(decoder), name)]
    if described_otherwise and changed:
        name = type(decoder).__name__
        raise BadInputError(
            f"{name}: {', '.join(changed)} says how JSON is written, and the constraint is no schema.",
            "Give schema=..., or leave it out.",
        )


def only_one(decoder: str, **settings: Any) -> None:
    """Raises BadInputError if more than one of the settings is given."""
    given = [name for name, value in settings.items() if value is not None]
    if len(given) > 1:
        raise BadInputError(
            f"{decoder} takes one of {', '.join(settings)}; got {' and '.join(given)}.", "Leave the others out."
        )
