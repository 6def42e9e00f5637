"""From grammars to compiled grammars, with a cache; threads share one compilation."""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Unpack

from ...core.errors import BadInputError
from ..grammar import Grammar, StructuralTag
from ..grammar.json_schema import Schema, SchemaSettings
from ..jit import announce, kernels_kept
from .compiled import CompiledGrammar
from .pushdown import Pushdown
from .vocabulary import TokenizerInfo

_prepared = threading.Event()
Key = tuple[str | tuple[tuple[str, str], ...], ...]
"""What a compilation depends on: the kind of source, the source, options."""


def warm_kernels(background: bool = False) -> threading.Thread:
    """Compiles the engine's kernels, or loads those that an earlier process has compiled, before they are needed.

    The first use on a machine takes a minute or two, which is said in the log; later processes load in under a
    second what was kept.

    Args:
        background: return at once, while a daemon thread goes on; ``join`` it to wait.

    Returns:
        The thread, finished unless ``background``.
    """
    thread = threading.Thread(target=_use_every_kernel, name="everytoken-kernels", daemon=True)
    thread.start()
    if not background:
        thread.join()
    return thread


def _use_every_kernel() -> None:
    from ..grammar.automata import trie
    from .matcher import GrammarMatcher

    trie([b"many", b"words"])
    vocabulary = [bytes([byte]) for byte in range(256)] + [b'": ', b'"}', b"]}", None]
    compiler = GrammarCompiler(TokenizerInfo(vocabulary, [len(vocabulary) - 1]), cache_limit=0, warm_seconds=10.0)
    # products of automata too: two patterns, a length, and names that others must not have
    strings = {"type": "string", "minLength": 2, "allOf": [{"pattern": "^[ab]+$"}, {"pattern": "b"}]}
    compiler.compile_json_schema({"type": "object", "properties": {"a": strings}})
    matcher = GrammarMatcher(compiler.compile_builtin_json_grammar())
    for token in b'{"a": [1, {"b": null}]}':
        matcher.allowed_tokens()
        matcher.accepts(0)
        matcher.accept_token(token)
    matcher.find_jump_forward_string()
    matcher.longest_prefix("{")


def _prepare_kernels() -> None:
    """Before the first grammar: where kernels are missing on disk, says so and compiles all of them, once for all."""
    if not _prepared.is_set():
        _prepared.set()
        if not kernels_kept():
            announce()
            _use_every_kernel()


class GrammarCompiler:
    """Compiles for one vocabulary and remembers what it compiled; safe to share between threads.

    Args:
        tokenizer_info: the vocabulary.
        cache_limit: grammars to remember; 0 remembers none.
        warm_seconds: time to spend on masks ahead, for each grammar; what is left is computed when it is first needed.
        max_threads: for that; default as many as there are processors, up to 8.
    """

    def __init__(
        self,
        tokenizer_info: TokenizerInfo,
        cache_limit: int = 256,
        warm_seconds: float = 0.1,
        max_threads: int | None = None,
    ):
        self.tokenizer_info, self.cache_limit, self.warm_seconds = tokenizer_info, cache_limit, warm_seconds
        self.max_threads = min(8, os.cpu_count() or 1) if max_threads is None else max_threads
        self._cache: OrderedDict[Key, CompiledGrammar] = OrderedDict()
        self._busy: dict[Key, threading.Lock] = {}
        self._lock = threading.Lock()

    def _cached(self, key: Key, make: Callable[[], Grammar]) -> CompiledGrammar:
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
            busy = self._busy.setdefault(key, threading.Lock())
        with busy:  # two threads that want the same grammar: one compiles, the other waits
            with self._lock:
                if key in self._cache:
                    return self._cache[key]
            try:
                compiled = self._compile(make())
                with self._lock:
                    if self.cache_limit:
                        self._cache[key] = compiled
                        while len(self._cache) > self.cache_limit:
                            self._cache.popitem(last=False)
            finally:
                with self._lock:
                    self._busy.pop(key, None)
            return compiled

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        _prepare_kernels()
        return CompiledGrammar(Pushdown.from_grammar(grammar), self.tokenizer_info).warm(
            self.warm_seconds, self.max_threads
        )

    def compile_grammar(self, grammar: Grammar | str, root_rule_name: str = "root") -> CompiledGrammar:
        """From a ``Grammar`` or EBNF text."""
        if isinstance(grammar, Grammar):
            return self._compile(grammar)
        return self._cached(("ebnf", grammar, root_rule_name), lambda: Grammar.from_ebnf(grammar, root_rule_name))

    def compile_regex(self, pattern: str) -> CompiledGrammar:
        """Texts that the pattern matches as a whole."""
        return self._cached(("regex", pattern), lambda: Grammar.from_regex(pattern))

    def compile_json_schema(self, schema: Schema | str, **options: Unpack[SchemaSettings]) -> CompiledGrammar:
        """Documents of a schema; options as for ``SchemaOptions``."""
        try:
            text = schema if isinstance(schema, str) else json.dumps(schema)
        except (TypeError, ValueError) as error:
            raise BadInputError(f"The schema is not JSON: {error}", "Pass a dict, a bool or JSON text.") from error
        except RecursionError as error:
            raise BadInputError("The schema is nested too deeply.", "Move inner parts under $defs.") from error
        key = ("schema", text, tuple(sorted((name, str(value)) for name, value in options.items())))
        return self._cached(key, lambda: Grammar.from_json_schema(schema, **options))

    def compile_builtin_json_grammar(self, **options: Unpack[SchemaSettings]) -> CompiledGrammar:
        """Any JSON value."""
        return self.compile_json_schema(True, **options)

    def compile_structural_tag(
        self, tags: Sequence[StructuralTag], triggers: Sequence[str], **options: Unpack[SchemaSettings]
    ) -> CompiledGrammar:
        """Free text with tags; see ``Grammar.from_structural_tag``."""
        return self.compile_grammar(Grammar.from_structural_tag(tags, triggers, **options))

    def clear_cache(self) -> None:
        with self._lock:
            self._cache.clear()
