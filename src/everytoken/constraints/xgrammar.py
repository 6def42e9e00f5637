"""XGrammar: masks of a context-free grammar at almost no cost (arXiv 2411.15100).

A grammar is a pushdown automaton over bytes; its state is a set of stacks. Whether a token (a byte string s) is allowed on a
stack with top q and rest r is settled, for most tokens, by q alone::

    accepted(q) = {s : some run of s from q ends above r}               context-independent, yes
    depend(q)   = {s : every run of s that survives pops into r}        context-dependent: only these need the real stack
    the others                                                          context-independent, no

``depend`` is cut down when it is computed: after a pop the rest of s must be readable at some place that can follow the rule
anywhere in the grammar (context expansion). At run time

    mask(stacks) = union over (q, r) of  accepted(q) | {s in depend(q) : s survives on (q, r)}

and each result is remembered under the frames of r that the run looked at, so in steady state a mask is a dictionary look-up.
Sets are stored as whichever is smallest of a list of accepted tokens, of rejected tokens, and a bitset. Stacks are nodes of a
tree with parent pointers, so branches share them and rolling back any number of tokens is a change of pointers.

Choices of ours: entries are computed on first use (``warm`` computes all); nodes that behave alike for as many bytes as the
longest token share an entry, so that a string of up to 10,000 characters needs few; automata are deterministic within a rule.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..core.errors import BadInputError, EverytokenError
from .base import DeadEndError
from .grammar import Grammar, StructuralTag
from .pushdown import Pushdown
from .vocabulary import TokenizerInfo, Trie

MAX_STACKS = 1 << 18
"""A state set, with what it reaches without reading, may hold so many stacks; more means a hopelessly ambiguous grammar."""
MEMO = 2048
"""Masks remembered for each automaton entry, and for each family of matchers."""


@dataclass
class TokenSet:
    """Tokens, stored as ``kind``: ``"accepted"`` ids, ``"rejected"`` ids, or ``"bits"``."""

    kind: str
    data: np.ndarray
    size: int

    @classmethod
    def from_bits(cls, bits: np.ndarray, accepted: int, vocab_size: int) -> TokenSet:
        words = len(bits)
        if accepted <= words:
            return cls("accepted", np.flatnonzero(_to_bool(bits)[:vocab_size]).astype(np.int32), vocab_size)
        if vocab_size - accepted <= words:
            return cls("rejected", np.flatnonzero(~_to_bool(bits)[:vocab_size]).astype(np.int32), vocab_size)
        return cls("bits", bits, vocab_size)

    def bits(self) -> np.ndarray:
        """``[W]`` uint32; a fresh array unless stored as bits."""
        if self.kind == "bits":
            return self.data
        chosen = np.zeros(((self.size + 31) // 32) * 32, np.bool_)
        chosen[: self.size] = self.kind == "rejected"
        chosen[self.data] = self.kind == "accepted"
        return np.packbits(chosen, bitorder="little").view(np.uint32)


def _to_bool(bits: np.ndarray) -> np.ndarray:
    return np.unpackbits(bits.view(np.uint8), bitorder="little").view(np.bool_)


class _Entry:
    """What a node says about tokens: those settled by itself, and the trie of those that depend on the stack."""

    def __init__(self, accepted: TokenSet, part: Trie | None):
        self.accepted, self.part = accepted, part
        self.resolved: OrderedDict[tuple[int, ...], np.ndarray] = OrderedDict()
        self.depths: list[int] = []


class _Arena:
    """Frames and buffers of a family of matchers (a matcher and its forks)."""

    def __init__(self, room: int = 1 << 12):
        self.fn, self.fp, self.fd = (np.zeros(room, np.int32) for _ in range(3))
        self.table = np.full(4 * room, -1, np.int64)
        self.sn, self.sp = np.zeros(1 << 12, np.int32), np.zeros(1 << 12, np.int32)
        self.sb = np.zeros(1 << 12, np.uint8)
        self.top = 0
        self.lock = threading.RLock()
        self.masks: OrderedDict[tuple[int, ...], tuple[np.ndarray, bool]] = OrderedDict()
        self.endings: dict[tuple[int, ...], bool] = {}

    def load(self, state: tuple[int, ...]) -> int:
        count = len(state) // 2
        if count == 1:
            self.sn[0], self.sp[0], self.sb[0] = state[0], state[1], 0
        else:
            pairs = np.array(state, np.int32).reshape(-1, 2)
            self.sn[:count], self.sp[:count], self.sb[:count] = pairs[:, 0], pairs[:, 1], 0
        return count

    def ensure(self) -> None:
        if self.top + 1024 > len(self.fn) or 2 * len(self.fn) > len(self.table):
            self.grow()

    def grow(self) -> None:
        """Twice the room for frames and stacks.

        Raises:
            EverytokenError: the state set has grown beyond any use.
        """
        from .kernels import rehash

        if len(self.sn) >= MAX_STACKS:
            raise EverytokenError(
                f"The grammar is so ambiguous here that more than {MAX_STACKS:,} parses are alive.",
                "Make repeated alternatives distinct, or replace nested repetitions such as (a* b*)*.",
            )
        room = 2 * len(self.fn)
        self.fn, self.fp, self.fd = (np.concatenate([a, np.zeros(room - len(a), a.dtype)]) for a in (self.fn, self.fp, self.fd))
        self.table = np.full(4 * room, -1, np.int64)
        rehash(self.table, self.fn, self.fp, self.top)
        size = 2 * len(self.sn)
        self.sn, self.sp, self.sb = (np.concatenate([a, np.zeros(size - len(a), a.dtype)]) for a in (self.sn, self.sp, self.sb))

    @property
    def frames(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        return self.fn, self.fp, self.fd, self.top


class CompiledGrammar:
    """A grammar ready for one vocabulary. Shared freely between matchers and threads.

    Attributes:
        pushdown: the automaton.
        tokenizer_info: the vocabulary.
    """

    def __init__(self, pushdown: Pushdown, tokenizer_info: TokenizerInfo):
        from .kernels import lookahead_classes

        self.pushdown, self.tokenizer_info = pushdown, tokenizer_info
        values = lookahead_classes(pushdown.tables, tokenizer_info.longest + 1)
        self.classes: list[int] = np.unique(values, return_inverse=True)[1].reshape(-1).tolist()
        self._entries: dict[int, _Entry] = {}
        self._lock = threading.Lock()
        self._scratch = threading.local()

    # -- entries ---------------------------------------------------------------------------------------------------------
    def entry(self, node: int) -> _Entry:
        """The tokens that a node settles, computed on first use."""
        found = self._entries.get(self.classes[node])
        if found is None:
            found = self._compute(node)
            with self._lock:
                found = self._entries.setdefault(self.classes[node], found)
        return found

    def _compute(self, node: int) -> _Entry:
        from .kernels import OVERFLOW, UNKNOWN, walk

        info = self.tokenizer_info
        arena = getattr(self._scratch, "arena", None)
        if arena is None:
            arena = self._scratch.arena = _Arena()
            self._scratch.depend = np.zeros(len(info.trie[0]), np.int32)
        bits = np.zeros(info.words, np.uint32)
        while True:
            count = arena.load((node, UNKNOWN))
            accepted, dependent, _ = walk(
                self.pushdown.tables, info.trie, *arena.frames, arena.sn, arena.sp, arena.sb, count, bits, self._scratch.depend
            )
            if accepted != OVERFLOW:
                break
            arena.grow()
        part = info.part(self._scratch.depend[:dependent]) if dependent else None
        return _Entry(TokenSet.from_bits(bits, int(accepted), info.vocab_size), part)

    def stack_mask(self, arena: _Arena, node: int, parent: int) -> np.ndarray:
        """``[W]`` uint32: the tokens allowed on one stack (do not change it)."""
        entry = self.entry(node)
        part = entry.part
        if part is None:
            known = entry.resolved.get(())
            if known is None:
                known = entry.resolved[()] = entry.accepted.bits()
            return known
        for depth in entry.depths:
            known = entry.resolved.get(self._visible(arena, parent, depth))
            if known is not None:
                return known
        from .kernels import OVERFLOW, walk

        bits = entry.accepted.bits().copy()
        depend = np.zeros(len(part[0]), np.int32)
        while True:
            count = arena.load((node, parent))
            accepted, _, lowest = walk(
                self.pushdown.tables, part, *arena.frames, arena.sn, arena.sp, arena.sb, count, bits, depend
            )
            if accepted != OVERFLOW:
                break
            arena.grow()
        height = int(arena.fd[parent]) if parent >= 0 else 0
        depth = height - int(lowest) + 1 if lowest <= height else 0
        with self._lock:
            if depth not in entry.depths:
                entry.depths.append(depth)
            if len(entry.resolved) >= MEMO:
                entry.resolved.popitem(last=False)
            entry.resolved[self._visible(arena, parent, depth)] = bits
        return bits

    def _visible(self, arena: _Arena, parent: int, depth: int) -> tuple[int, ...]:
        """The top ``depth`` frames below a node, by what they return to (-1: the bottom)."""
        if depth == 1:  # the usual case
            return (depth, self.classes[arena.fn.item(parent)]) if parent >= 0 else (depth, -1)
        key = [depth]
        for _ in range(depth):
            if parent < 0:
                key.append(-1)
                break
            key.append(self.classes[arena.fn.item(parent)])
            parent = arena.fp.item(parent)
        return tuple(key)

    def warm(self, threads: int = 1) -> CompiledGrammar:
        """Computes the entries of all nodes now (they are otherwise made when first met); returns itself."""
        nodes = list({group: node for node, group in enumerate(self.classes)}.values())
        if threads <= 1:
            for node in nodes:
                self.entry(node)
        else:
            from concurrent.futures import ThreadPoolExecutor

            self.tokenizer_info.trie  # noqa: B018  built once, before the threads need it
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(self.entry, nodes))
        return self

    @property
    def memory_size_bytes(self) -> int:
        """Tables, entries and remembered masks."""
        total = sum(array.nbytes for array in self.pushdown.tables)
        for entry in list(self._entries.values()):
            total += entry.accepted.data.nbytes + sum(bits.nbytes for bits in list(entry.resolved.values()))
            total += sum(a.nbytes for a in entry.part if isinstance(a, np.ndarray)) if entry.part is not None else 0
        return total

    def serialise(self) -> str:
        """As JSON text, for ``deserialise`` with the same vocabulary."""
        return json.dumps({"vocabulary": self.tokenizer_info.fingerprint, "pushdown": self.pushdown.serialise()})

    @classmethod
    def deserialise(cls, data: str, tokenizer_info: TokenizerInfo) -> CompiledGrammar:
        """From ``serialise``.

        Raises:
            BadInputError: damaged, or made for another vocabulary.
        """
        try:
            content = json.loads(data)
            fingerprint, pushdown = content["vocabulary"], content["pushdown"]
        except (ValueError, KeyError, TypeError) as error:
            raise BadInputError(f"This is no serialised grammar: {error}", "Compile the grammar again.") from error
        if fingerprint != tokenizer_info.fingerprint:
            raise BadInputError("This grammar was compiled for another vocabulary.", "Compile it for this one.")
        return cls(Pushdown.deserialise(pushdown), tokenizer_info)

    serialize_json = serialise
    deserialize_json = deserialise


class GrammarCompiler:
    """Compiles for one vocabulary and remembers what it compiled; safe to share between threads.

    Args:
        tokenizer_info: the vocabulary.
        cache_limit: grammars to remember; 0 remembers none.
    """

    def __init__(self, tokenizer_info: TokenizerInfo, cache_limit: int = 256):
        self.tokenizer_info, self.cache_limit = tokenizer_info, cache_limit
        self._cache: OrderedDict[Any, CompiledGrammar] = OrderedDict()
        self._busy: dict[Any, threading.Lock] = {}
        self._lock = threading.Lock()

    def _cached(self, key: Any, make: Any) -> CompiledGrammar:
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
                compiled = CompiledGrammar(Pushdown.from_grammar(make()), self.tokenizer_info)
                with self._lock:
                    if self.cache_limit:
                        self._cache[key] = compiled
                        while len(self._cache) > self.cache_limit:
                            self._cache.popitem(last=False)
            finally:
                with self._lock:
                    self._busy.pop(key, None)
            return compiled

    def compile_grammar(self, grammar: Grammar | str, root_rule_name: str = "root") -> CompiledGrammar:
        """From a ``Grammar`` or EBNF text."""
        if isinstance(grammar, Grammar):
            return CompiledGrammar(Pushdown.from_grammar(grammar), self.tokenizer_info)
        return self._cached(("ebnf", grammar, root_rule_name), lambda: Grammar.from_ebnf(grammar, root_rule_name))

    def compile_regex(self, pattern: str) -> CompiledGrammar:
        """Texts that the pattern matches as a whole."""
        return self._cached(("regex", pattern), lambda: Grammar.from_regex(pattern))

    def compile_json_schema(self, schema: Any, **options: Any) -> CompiledGrammar:
        """Documents of a schema; options as for ``SchemaOptions``."""
        try:
            text = schema if isinstance(schema, str) else json.dumps(schema)
        except (TypeError, ValueError) as error:
            raise BadInputError(f"The schema is not JSON: {error}", "Pass a dict, a bool or JSON text.") from error
        except RecursionError as error:
            raise BadInputError("The schema is nested too deeply.", "Move inner parts under $defs.") from error
        key = ("schema", text, tuple(sorted((name, str(value)) for name, value in options.items())))
        return self._cached(key, lambda: Grammar.from_json_schema(schema, **options))

    def compile_builtin_json_grammar(self, **options: Any) -> CompiledGrammar:
        """Any JSON value."""
        return self.compile_json_schema(True, **options)

    def compile_structural_tag(self, tags: Sequence[StructuralTag], triggers: Sequence[str], **options: Any) -> CompiledGrammar:
        """Free text with tags; see ``Grammar.from_structural_tag``."""
        return self.compile_grammar(Grammar.from_structural_tag(tags, triggers, **options))

    def clear_cache(self) -> None:
        with self._lock:
            self._cache.clear()


class _Step:
    """One accepted token: the state after it, and the step before."""

    __slots__ = ("previous", "state", "stopped")

    def __init__(self, state: tuple[int, ...], stopped: bool, previous: _Step | None):
        self.state, self.stopped, self.previous = state, stopped, previous


class GrammarMatcher:
    """Follows one text under a grammar (a ``Matcher``).

    Args:
        compiled: the grammar.
        override_stop_tokens: tokens that end the text, instead of the vocabulary's.
        terminate_without_stop_token: the text counts as finished as soon as it may end.

    A matcher is for one thread at a time; ``fork`` gives independent ones that share what they can.
    """

    START: ClassVar[tuple[int, ...]] = (0, -1)

    def __init__(
        self, compiled: CompiledGrammar, override_stop_tokens: Sequence[int] | None = None, terminate_without_stop_token: bool = False
    ):
        if not isinstance(compiled, CompiledGrammar):
            raise BadInputError(f"GrammarMatcher needs a CompiledGrammar; got {type(compiled).__name__}.", "Use GrammarCompiler.")
        self.compiled = compiled
        info = compiled.tokenizer_info
        self.stop_token_ids = list(info.stop_token_ids if override_stop_tokens is None else override_stop_tokens)
        self.terminate_without_stop_token = terminate_without_stop_token
        if not self.stop_token_ids and not terminate_without_stop_token:
            raise BadInputError(
                "There is no stop token: the text could never end.",
                "Give TokenizerInfo stop_token_ids, or set terminate_without_stop_token=True.",
            )
        self._arena = _Arena()
        self._step = _Step(self.START, False, None)

    # -- what may come next ----------------------------------------------------------------------------------------------
    def _mask(self) -> tuple[np.ndarray, bool]:
        """``(words, whether anything is forbidden)`` of the state."""
        arena, state = self._arena, self._step.state
        found = arena.masks.get(state)
        if found is not None:
            return found
        with arena.lock:
            if len(state) == 2:
                words = self.compiled.stack_mask(arena, state[0], state[1])
            else:
                words = self.compiled.stack_mask(arena, state[0], state[1]).copy()
                for place in range(2, len(state), 2):
                    words |= self.compiled.stack_mask(arena, state[place], state[place + 1])
            if self._can_end(state) and self.stop_token_ids:
                words = words.copy()
                for token in self.stop_token_ids:
                    words[token >> 5] |= np.uint32(1 << (token & 31))
            restricted = int(np.bitwise_count(words).sum()) < self.compiled.tokenizer_info.vocab_size
            if len(arena.masks) >= MEMO:
                arena.masks.popitem(last=False)
            found = arena.masks[state] = (words.view(np.int32), restricted)
        return found

    def fill_next_token_bitmask(self, bitmask: Any, index: int = 0) -> bool:
        """Writes the allowed tokens into a row of an int32 bitmask (torch on the CPU, or numpy).

        Returns:
            Whether any token is forbidden (if not, applying the mask can be left out).

        Raises:
            BadInputError: the text is finished already, or the bitmask has the wrong shape or type.
        """
        if self.is_terminated():
            raise BadInputError("The text is finished; there is no next token.", "Check is_terminated() first, or reset().")
        words, restricted = self._mask()
        rows = bitmask if isinstance(bitmask, np.ndarray) else self._numpy(bitmask)
        row = rows[index] if rows.ndim == 2 else rows
        if row.dtype != np.int32 or len(row) < len(words):
            raise BadInputError(
                f"The bitmask has {len(row)} words of {row.dtype}; {len(words)} of int32 are needed.",
                "Allocate it with allocate_token_bitmask(batch_size, tokenizer_info.vocab_size).",
            )
        row[: len(words)] = words
        if len(row) > len(words):
            row[len(words) :] = 0
        return restricted

    @staticmethod
    def _numpy(bitmask: Any) -> np.ndarray:
        try:
            return bitmask.numpy()
        except (AttributeError, TypeError, RuntimeError) as error:
            raise BadInputError(f"The bitmask must be an int32 tensor on the CPU: {error}") from error

    def allowed_tokens(self) -> np.ndarray:
        """Ids of the tokens that may come next."""
        if self.is_terminated():
            return np.zeros(0, np.int64)
        return np.flatnonzero(_to_bool(self._mask()[0])[: self.compiled.tokenizer_info.vocab_size])

    def accepts(self, token_id: int) -> bool:
        """Whether a token may come next; far cheaper than a mask the first time, and nothing is kept."""
        state = self._step.state
        info = self.compiled.tokenizer_info
        if self.is_terminated() or not 0 <= token_id < info.vocab_size:
            return False
        if token_id in self.stop_token_ids:
            return self._can_end(state)
        known = self._arena.masks.get(state)
        if known is not None:
            return bool(known[0].item(token_id >> 5) >> (token_id & 31) & 1)
        if token_id >= len(info.arrays) or not len(info.arrays[token_id]):
            return False
        return self._survives(info.arrays[token_id]) == len(info.arrays[token_id])

    def _survives(self, data: np.ndarray) -> int:
        from .kernels import OVERFLOW, survives

        arena = self._arena
        with arena.lock:
            while True:
                count = arena.load(self._step.state)
                read = survives(self.compiled.pushdown.tables, data, *arena.frames, arena.sn, arena.sp, arena.sb, count)
                if read != OVERFLOW:
                    return int(read)
                arena.grow()

    def _can_end(self, state: tuple[int, ...]) -> bool:
        from .kernels import OVERFLOW, can_end

        arena = self._arena
        known = arena.endings.get(state)
        if known is None:
            with arena.lock:
                while (
                    result := can_end(
                        self.compiled.pushdown.tables, *arena.frames, arena.sn, arena.sp, arena.sb, arena.load(state)
                    )
                ) == OVERFLOW:
                    arena.grow()
            known = result == 1
            if len(arena.endings) >= 4 * MEMO:
                arena.endings.clear()
            arena.endings[state] = known
        return known

    def can_end(self) -> bool:
        """Whether the text so far is a complete one."""
        return self._can_end(self._step.state)

    # -- moving ----------------------------------------------------------------------------------------------------------
    def accept_token(self, token_id: int) -> bool:
        """Moves on; False (and no change) if the token is not allowed."""
        token_id = int(token_id)
        info = self.compiled.tokenizer_info
        if self.is_terminated() or not 0 <= token_id < info.vocab_size:
            return False
        if token_id in self.stop_token_ids:
            if not self._can_end(self._step.state):
                return False
            self._step = _Step(self._step.state, True, self._step)
            return True
        if token_id >= len(info.arrays) or not len(info.arrays[token_id]):
            return False
        return self._read(info.arrays[token_id])

    def accept_string(self, text: str | bytes) -> bool:
        """Moves over a text (one step for ``rollback``); False (and no change) if it is not allowed."""
        data = text.encode("utf-8") if isinstance(text, str) else bytes(text)
        if self.is_terminated() and data:
            return False
        return self._read(np.frombuffer(data, np.uint8)) if data else True

    def _read(self, data: np.ndarray) -> bool:
        from .kernels import OVERFLOW, advance

        arena = self._arena
        state = self._step.state
        with arena.lock:
            arena.ensure()
            while True:
                count, top, read = advance(
                    self.compiled.pushdown.tables, data, *arena.frames, arena.table, arena.sn, arena.sp, arena.sb, arena.load(state)
                )
                arena.top = int(top)
                if count != OVERFLOW:
                    break
                arena.grow()
            if count == 0:
                return False
            if count == 1:
                fresh: tuple[int, ...] = (arena.sn.item(0), arena.sp.item(0))
            else:
                order = np.lexsort((arena.sp[:count], arena.sn[:count]))  # a set has one name
                fresh = tuple(np.stack([arena.sn[order], arena.sp[order]], 1).reshape(-1).tolist())
        self._step = _Step(fresh, False, self._step)
        return True

    def longest_prefix(self, text: str | bytes) -> int:
        """How many bytes of a text could be accepted from here."""
        data = np.frombuffer(text.encode("utf-8") if isinstance(text, str) else bytes(text), np.uint8)
        return self._survives(data) if not self.is_terminated() else 0

    def rollback(self, num_tokens: int = 1) -> None:
        """Takes back the last accepted tokens.

        Raises:
            BadInputError: fewer have been accepted.
        """
        step = self._step
        for taken in range(num_tokens):
            if step.previous is None:
                raise BadInputError(f"Cannot take back {num_tokens} tokens: only {taken} have been accepted.")
            step = step.previous
        self._step = step

    def reset(self) -> None:
        """Back to the start (and to fresh buffers)."""
        self._arena = _Arena()
        self._step = _Step(self.START, False, None)

    def fork(self) -> GrammarMatcher:
        """An independent matcher in the same state; costs the same however long the text is."""
        other = object.__new__(GrammarMatcher)
        other.__dict__.update(self.__dict__)
        return other

    def is_terminated(self) -> bool:
        """Whether the text is finished: a stop token was accepted (or, without stop tokens, the text may end)."""
        if self._step.stopped:
            return True
        return self.terminate_without_stop_token and self._can_end(self._step.state)

    def find_jump_forward_string(self) -> str:
        """The text that must come next because nothing else is possible (up to 4,096 bytes; empty if there is a choice)."""
        from .kernels import OVERFLOW, forced

        if self.is_terminated():
            return ""
        arena = self._arena
        output = np.zeros(4096, np.uint8)
        with arena.lock:
            while True:
                count = arena.load(self._step.state)
                size = forced(self.compiled.pushdown.tables, *arena.frames, arena.sn, arena.sp, arena.sb, count, output)
                if size != OVERFLOW:
                    break
                arena.grow()
        data = output[:size].tobytes()
        for cut in range(min(4, len(data) + 1)):  # not into the middle of a character
            try:
                return data[: len(data) - cut].decode("utf-8")
            except UnicodeDecodeError:
                continue
        return ""

    def dead_end(self, text: bytes) -> DeadEndError:
        """The error for a text that cannot go on (from a callable constraint; a grammar has no dead ends)."""
        return DeadEndError("No token can follow.", text)
