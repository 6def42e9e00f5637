"""The grammar engine: compiled grammars, and matchers that follow texts (the algorithm of ``xgrammar``, which see).

info = TokenizerInfo.from_huggingface(tokenizer, model.config.vocab_size)
compiled = GrammarCompiler(info).compile_json_schema(schema)
matcher = GrammarMatcher(compiled)
"""

from __future__ import annotations

import json
import os
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..core.errors import BadInputError, EverytokenError
from .grammar import Grammar, StructuralTag
from .kernels import (
    AMBIGUOUS,
    BITS,
    MAX_STACKS,
    REJECTED,
    advance,
    closing_nodes,
    forced,
    lookahead_classes,
    rehash,
    set_bits,
    settle,
    settle_one,
    survives,
)
from .pushdown import BOTTOM, Pushdown
from .vocabulary import TokenizerInfo, Trie

MEMO = 2048
"""Masks of states that are kept."""
CONTEXTS = 1 << 12
"""Contexts remembered for a grammar."""
SITES, FEW, CHUNK = 32, 8, 32
"""Ahead of time, dependent tokens are settled for up to so many places that a node may return to, and further down as long as
so few contexts have any left; nodes settled at a time."""
RENEW_FRAMES, RENEW_STATES = 1 << 20, 1 << 15
"""New matchers get fresh buffers once the shared ones have grown to this size."""


@dataclass(slots=True)
class TokenSet:
    """Tokens, stored as ``kind``: ids that are in (``ACCEPTED``), ids that are not (``REJECTED``), or ``BITS``."""

    kind: int
    data: np.ndarray
    size: int

    def bits(self) -> np.ndarray:
        """``[W]`` uint32; a fresh array unless stored as bits."""
        if self.kind == BITS:
            return self.data
        words = np.zeros((self.size + 31) // 32, np.uint32)
        if self.kind == REJECTED:
            words[:] = 0xFFFFFFFF
            if self.size % 32:
                words[-1] = (1 << (self.size % 32)) - 1
        set_bits(words, self.data, self.kind != REJECTED)
        return words


_BIT = np.left_shift(np.uint32(1), np.arange(32, dtype=np.uint32)).view(np.int32)
_INT32 = np.dtype(np.int32)
_NO_BYTES = np.zeros(0, np.uint8)


class _Entry:
    """What is known of the tokens in a context (a node, and what the top frames below it return to).

    Attributes:
        accepted: the tokens allowed whatever lies deeper; ``count`` of them.
        part: a trie of those that depend on it; None if there are none.
        deeper: the entries of contexts that tell one more frame, by the class of what it returns to.
    """

    __slots__ = ("_mask", "accepted", "count", "deeper", "part")

    def __init__(self, accepted: TokenSet, count: int, part: Trie | None):
        self.accepted, self.count, self.part = accepted, count, part
        self.deeper: dict[int, _Entry] = {}
        self._mask: Callable[[], np.ndarray | None] = _nothing

    def mask(self) -> np.ndarray:
        """``[W]`` uint32, shared for as long as somebody holds it: do not change it."""
        mask = self._mask()
        if mask is None:
            mask = self.accepted.bits()
            self._mask = weakref.ref(mask)
        return mask


def _nothing() -> None:
    return None


class _State:
    """A set of stacks, and what has been found out about it: together, states are a lazily built deterministic automaton."""

    __slots__ = ("ending", "mask", "moves", "restricted", "stacks")

    def __init__(self, stacks: tuple[int, ...]):
        self.stacks = stacks  # (node, frame, node, frame, ...), sorted
        self.mask: np.ndarray | None = None
        self.restricted = True
        self.ending: bool | None = None
        self.moves: dict[int, _State] = {}


class _Arena:
    """Frames, states and buffers that all matchers of a grammar share: what one has seen, the next one knows."""

    def __init__(self, room: int = 1 << 12):
        self.fn, self.fp = np.zeros(room, np.int32), np.zeros(room, np.int32)
        self.table = np.full(4 * room, -1, np.int64)
        self.sn, self.sp = np.zeros(1 << 12, np.int32), np.zeros(1 << 12, np.int32)
        self.sb = np.zeros(1 << 12, np.uint8)
        self.top = 0
        self.lock = threading.RLock()
        self.states: dict[tuple[int, ...], _State] = {}
        self.masked: deque[_State] = deque()
        self.moves = 0

    @property
    def full(self) -> bool:
        return self.top > RENEW_FRAMES or len(self.states) > RENEW_STATES or self.moves > 8 * RENEW_STATES

    def state(self, stacks: tuple[int, ...]) -> _State:
        found = self.states.get(stacks)
        if found is None:
            found = self.states.setdefault(stacks, _State(stacks))
        return found

    def remember(self, state: _State, mask: np.ndarray, restricted: bool) -> None:
        state.mask, state.restricted = mask, restricted
        self.masked.append(state)
        if len(self.masked) > MEMO:
            self.masked.popleft().mask = None

    def load(self, state: tuple[int, ...]) -> int:
        count = len(state) // 2
        if count == 1:
            self.sn[0], self.sp[0], self.sb[0] = state[0], state[1], 0
        else:
            pairs = np.array(state, np.int32).reshape(-1, 2)
            self.sn[:count], self.sp[:count], self.sb[:count] = pairs[:, 0], pairs[:, 1], 0
        return count

    def ensure(self) -> None:
        if self.top + 1024 > len(self.fn):
            self.grow()

    def grow(self, code: int = 0) -> None:
        """Twice the room for frames and stacks; ``code`` is the kernel's reason.

        Raises:
            EverytokenError: the state set has grown beyond any use.
        """
        if code == AMBIGUOUS:
            raise _ambiguous()
        self.fn, self.fp = _doubled(self.fn), _doubled(self.fp)
        self.table = np.full(4 * len(self.fn), -1, np.int64)
        rehash(self.table, self.fn, self.fp, self.top)
        self.sn, self.sp, self.sb = _doubled(self.sn), _doubled(self.sp), _doubled(self.sb)

    @property
    def frames(self) -> tuple[np.ndarray, np.ndarray, int]:
        return self.fn, self.fp, self.top


def _doubled(array: np.ndarray) -> np.ndarray:
    return np.concatenate([array, np.zeros_like(array)])


def _ambiguous() -> EverytokenError:
    return EverytokenError(
        f"The grammar is so ambiguous here that more than {MAX_STACKS:,} parses are alive.",
        "Make repeated alternatives distinct, or replace nested repetitions such as (a* b*)*.",
    )


class CompiledGrammar:
    """A grammar ready for one vocabulary. Shared freely between matchers and threads.

    Attributes:
        pushdown: the automaton.
        tokenizer_info: the vocabulary.
    """

    def __init__(self, pushdown: Pushdown, tokenizer_info: TokenizerInfo):
        self.pushdown, self.tokenizer_info = pushdown, tokenizer_info
        values = lookahead_classes(pushdown.tables, tokenizer_info.longest + 1)
        self.classes: list[int] = np.unique(values, return_inverse=True)[1].reshape(-1).tolist()
        _, _, _, _, call_ptr, call_start, call_to, final, *_ = pushdown.tables
        self.closes: list[bool] = closing_nodes(call_ptr, call_start, call_to, final).tolist()
        self._entries: dict[int, _Entry] = {}
        self._contexts = 0
        self._lock = threading.Lock()
        self._shared = _Arena()

    def arena(self) -> _Arena:
        """The buffers for a new matcher."""
        with self._lock:
            if self._shared.full:
                self._shared = _Arena()
            return self._shared

    # -- entries ---------------------------------------------------------------------------------------------------------
    def entry(self, arena: _Arena, node: int, frame: int) -> _Entry:
        """The tokens allowed on one stack: as much of it is looked at as they depend on."""
        found = self._entries.get(self.classes[node])
        if found is None:
            found = self._settle(None, [[node]])[0]
            with self._lock:
                found = self._entries.setdefault(self.classes[node], found)
        context = [node]
        while found.part is not None:
            to = key = BOTTOM
            if frame >= 0:
                to, frame = arena.fn.item(frame), arena.fp.item(frame)
                key = self.classes[to]
            context.append(to)
            following = found.deeper.get(key)
            if following is None:
                following = self._remember(found, key, self._settle_one(found, context))
            found = following
        return found

    def _remember(self, entry: _Entry, key: int, following: _Entry) -> _Entry:
        with self._lock:
            self._contexts += 1
            if self._contexts > CONTEXTS:
                self._contexts = 0
                for known in self._entries.values():
                    known.deeper = {}
            return entry.deeper.setdefault(key, following)

    def _settle_one(self, above: _Entry, context: list[int]) -> _Entry:
        """The entry of one context, while somebody waits; ``above`` is what is known with one frame less."""
        part, info = above.part, self.tokenizer_info
        assert part is not None
        words, depend = above.mask().copy(), np.empty(len(part[0]), np.int32)
        accepted, dependent = settle_one(self.pushdown.tables, part, np.array(context, np.int32), words, depend)
        if accepted < 0:
            raise _ambiguous()
        following = info.part(depend[:dependent], part) if dependent else None
        return _Entry(TokenSet(BITS, words, info.vocab_size), above.count + accepted, following)

    def _settle(self, above: _Entry | None, contexts: list[list[int]]) -> list[_Entry]:
        """The entries of contexts; ``above`` is what is known with one frame less (the same for all of them)."""
        info = self.tokenizer_info
        trie, known, count = info.trie, np.zeros(info.words, np.uint32), 0
        if above is not None and above.part is not None:
            trie, known, count = above.part, above.mask(), above.count
        pointers = np.zeros(len(contexts) + 1, np.int64)
        np.cumsum([len(context) for context in contexts], out=pointers[1:])
        flat = np.array([node for context in contexts for node in context], np.int32)
        kinds, counts, id_ptr, ids, rows, depend_ptr, depends = settle(
            self.pushdown.tables, trie, info.vocab_size, known, count, flat, pointers
        )
        if not len(kinds):
            raise _ambiguous()
        entries = []
        used, begins, firsts = 0, id_ptr.tolist(), depend_ptr.tolist()
        ids, rows = ids[: id_ptr[-1]].copy(), rows[: int((kinds == BITS).sum())].copy()  # without the room left over
        for place, (kind, size) in enumerate(zip(kinds.tolist(), counts.tolist(), strict=True)):
            if kind == BITS:
                data = rows[used]
                used += 1
            else:
                data = ids[begins[place] : begins[place + 1]]
            part = None
            if firsts[place] < firsts[place + 1]:
                part = info.part(depends[firsts[place] : firsts[place + 1]], trie)
            entries.append(_Entry(TokenSet(kind, data, info.vocab_size), size, part))
        return entries

    def warm(self, seconds: float | None = None, max_threads: int = 1) -> CompiledGrammar:
        """Settles now what is otherwise settled when first met: nodes, then what may follow them; returns itself.

        Args:
            seconds: stop after so long; None goes through to the end.
            max_threads: for the nodes.
        """
        began = time.perf_counter()

        def late() -> bool:
            return seconds is not None and time.perf_counter() - began > seconds

        def settle_nodes(chunk: list[tuple[int, int]]) -> None:
            if late():
                return
            found = self._settle(None, [[node] for _, node in chunk])
            with self._lock:
                for (group, _), entry in zip(chunk, found, strict=True):
                    self._entries.setdefault(group, entry)

        nodes = {group: node for node, group in enumerate(self.classes)}
        waiting = [(group, node) for group, node in nodes.items() if group not in self._entries]
        chunks = [waiting[place : place + CHUNK] for place in range(0, len(waiting), CHUNK)]
        if max_threads > 1 and len(chunks) > 4:  # fewer are done before the threads have started
            with ThreadPoolExecutor(min(max_threads, len(chunks))) as pool:
                list(pool.map(settle_nodes, chunks))
        else:
            for chunk in chunks:
                settle_nodes(chunk)
        if late():
            return self
        level = [(self._entries[group], [node]) for group, node in nodes.items()]
        level = [(entry, context) for entry, context in level if entry.part is not None]
        first = True
        while level and (first or len(level) <= FEW):
            first, deeper = False, []
            for entry, context in level:
                sites = {BOTTOM if to == BOTTOM else self.classes[to]: to for to in self.pushdown.returns(context[-1])}
                fresh = [(key, to) for key, to in sites.items() if key not in entry.deeper][:SITES]
                if not fresh:
                    continue
                found = self._settle(entry, [[*context, to] for _, to in fresh])
                for (key, to), following in zip(fresh, found, strict=True):
                    following = self._remember(entry, key, following)
                    if following.part is not None:
                        deeper.append((following, [*context, to]))
                if late():
                    return self
            level = deeper
        return self

    @property
    def memory_size_bytes(self) -> int:
        """Tables, and what has been settled."""
        total = sum(array.nbytes for array in self.pushdown.tables)
        pending = list(self._entries.values())
        for entry in pending:
            total += entry.accepted.data.nbytes
            total += sum(a.nbytes for a in entry.part if isinstance(a, np.ndarray)) if entry.part is not None else 0
            pending += list(entry.deeper.values())
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

    def compile_structural_tag(
        self, tags: Sequence[StructuralTag], triggers: Sequence[str], **options: Any
    ) -> CompiledGrammar:
        """Free text with tags; see ``Grammar.from_structural_tag``."""
        return self.compile_grammar(Grammar.from_structural_tag(tags, triggers, **options))

    def clear_cache(self) -> None:
        with self._lock:
            self._cache.clear()


class _Step:
    """One accepted token: the state after it, and the step before."""

    __slots__ = ("previous", "state", "stopped")

    def __init__(self, state: _State, stopped: bool, previous: _Step | None):
        self.state, self.stopped, self.previous = state, stopped, previous


class GrammarMatcher:
    """Follows one text under a grammar (a ``Matcher``).

    Args:
        compiled: the grammar.
        override_stop_tokens: tokens that end the text, instead of the vocabulary's.
        terminate_without_stop_token: the text counts as finished as soon as it may end.

    A matcher is for one thread at a time; different ones, forks included, may run in different threads.
    """

    START: ClassVar[tuple[int, ...]] = (0, -1)

    def __init__(
        self,
        compiled: CompiledGrammar,
        override_stop_tokens: Sequence[int] | None = None,
        terminate_without_stop_token: bool = False,
    ):
        if not isinstance(compiled, CompiledGrammar):
            raise BadInputError(
                f"GrammarMatcher needs a CompiledGrammar; got {type(compiled).__name__}.", "Use GrammarCompiler."
            )
        self.compiled = compiled
        info = compiled.tokenizer_info
        self.stop_token_ids = list(info.stop_token_ids if override_stop_tokens is None else override_stop_tokens)
        for token in self.stop_token_ids:
            if not 0 <= token < info.vocab_size:
                raise BadInputError(f"The stop token {token} is outside the vocabulary of {info.vocab_size} tokens.")
        self.terminate_without_stop_token = terminate_without_stop_token
        if not self.stop_token_ids and not terminate_without_stop_token:
            raise BadInputError(
                "There is no stop token: the text could never end.",
                "Give TokenizerInfo stop_token_ids, or set terminate_without_stop_token=True.",
            )
        self._arena = compiled.arena()
        self._step = _Step(self._arena.state(self.START), False, None)

    # -- what may come next ----------------------------------------------------------------------------------------------
    def _mask(self, state: _State) -> np.ndarray:
        """``[W]`` int32: the tokens that go on with the text (stop tokens aside)."""
        if state.mask is not None:
            return state.mask
        arena, stacks, vocab_size = self._arena, state.stacks, self.compiled.tokenizer_info.vocab_size
        entry = self.compiled.entry(arena, stacks[0], stacks[1])
        words, count = entry.mask(), entry.count
        if len(stacks) > 2:
            words = words.copy()
            for place in range(2, len(stacks), 2):
                words |= self.compiled.entry(arena, stacks[place], stacks[place + 1]).mask()
            count = int(np.bitwise_count(words).sum())
        mask = words.view(np.int32)
        with arena.lock:
            arena.remember(state, mask, count < vocab_size)
        return mask

    def fill_next_token_bitmask(self, bitmask: Any, index: int = 0) -> bool:
        """Writes the allowed tokens into a row of an int32 bitmask (torch on the CPU, or numpy).

        Returns:
            Whether any token is forbidden (if not, applying the mask can be left out).

        Raises:
            BadInputError: the text is finished already, or the bitmask has the wrong shape or type.
        """
        step = self._step
        state = step.state
        ending = state.ending if state.ending is not None else self._can_end(state)
        if step.stopped or (ending and self.terminate_without_stop_token):
            raise BadInputError(
                "The text is finished; there is no next token.", "Check is_terminated() first, or reset()."
            )
        words = state.mask if state.mask is not None else self._mask(state)
        rows = bitmask if type(bitmask) is np.ndarray else self._numpy(bitmask)
        row = rows[index] if rows.ndim == 2 else rows
        size = len(words)
        if (row.dtype is not _INT32 and row.dtype != _INT32) or len(row) < size:
            raise BadInputError(
                f"The bitmask has {len(row)} words of {row.dtype}; {size} of int32 are needed.",
                "Allocate it with allocate_token_bitmask(batch_size, tokenizer_info.vocab_size).",
            )
        if len(row) == size:
            row[:] = words
        else:
            row[:size], row[size:] = words, 0
        if ending:
            for token in self.stop_token_ids:
                row[token >> 5] |= _BIT[token & 31]
        return state.restricted

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
        row = np.zeros(self.compiled.tokenizer_info.words, np.int32)
        self.fill_next_token_bitmask(row)
        return np.flatnonzero(
            np.unpackbits(row.view(np.uint8), bitorder="little")[: self.compiled.tokenizer_info.vocab_size]
        )

    def accepts(self, token_id: int) -> bool:
        """Whether a token may come next; far cheaper than a mask the first time, and nothing is kept."""
        state = self._step.state
        info = self.compiled.tokenizer_info
        if self.is_terminated() or not 0 <= token_id < info.vocab_size:
            return False
        if token_id in self.stop_token_ids:
            return self._can_end(state)
        if state.mask is not None:
            return bool(state.mask.item(token_id >> 5) >> (token_id & 31) & 1)
        if token_id in state.moves:
            return True
        data = info.arrays[token_id] if token_id < len(info.arrays) else _NO_BYTES
        return len(data) > 0 and self._survives(data) == len(data)

    def _survives(self, data: np.ndarray) -> int:
        arena = self._arena
        with arena.lock:
            while True:
                count = arena.load(self._step.state.stacks)
                read = survives(self.compiled.pushdown.tables, data, *arena.frames, arena.sn, arena.sp, arena.sb, count)
                if read >= 0:
                    return int(read)
                arena.grow(read)

    def _can_end(self, state: _State) -> bool:
        if state.ending is None:
            closes, arena, stacks = self.compiled.closes, self._arena, state.stacks
            state.ending = False
            for place in range(0, len(stacks), 2):
                node, frame = stacks[place], stacks[place + 1]
                while closes[node] and frame >= 0:
                    node, frame = arena.fn.item(frame), arena.fp.item(frame)
                if closes[node] and frame < 0:
                    state.ending = True
                    break
        return state.ending

    def can_end(self) -> bool:
        """Whether the text so far is a complete one."""
        return self._can_end(self._step.state)

    # -- moving ----------------------------------------------------------------------------------------------------------
    def accept_token(self, token_id: int) -> bool:
        """Moves on; False (and no change) if the token is not allowed."""
        token_id = int(token_id)
        step = self._step
        state = step.state
        if step.stopped or (self.terminate_without_stop_token and self._can_end(state)):
            return False
        if token_id in self.stop_token_ids:
            if not self._can_end(state):
                return False
            self._step = _Step(state, True, step)
            return True
        following = state.moves.get(token_id)
        if following is None:
            info = self.compiled.tokenizer_info
            if not 0 <= token_id < len(info.arrays) or not len(info.arrays[token_id]):
                return False
            following = self._read(state, info.arrays[token_id])
            if following is None:
                return False
            state.moves[token_id] = following
            self._arena.moves += 1
        self._step = _Step(following, False, step)
        return True

    def accept_string(self, text: str | bytes) -> bool:
        """Moves over a text (one step for ``rollback``); False (and no change) if it is not allowed."""
        data = text.encode("utf-8") if isinstance(text, str) else bytes(text)
        if not data:
            return True
        if self.is_terminated():
            return False
        following = self._read(self._step.state, np.frombuffer(data, np.uint8))
        if following is None:
            return False
        self._step = _Step(following, False, self._step)
        return True

    def _read(self, state: _State, data: np.ndarray) -> _State | None:
        arena = self._arena
        with arena.lock:
            arena.ensure()
            while True:
                count, top, _ = advance(
                    self.compiled.pushdown.tables, data, *arena.frames, arena.table, arena.sn, arena.sp, arena.sb,
                    arena.load(state.stacks),
                )  # fmt: skip
                arena.top = int(top)
                if count >= 0:
                    break
                arena.grow(count)
            if count == 0:
                return None
            if count == 1:
                return arena.state((arena.sn.item(0), arena.sp.item(0)))
            order = np.lexsort((arena.sp[:count], arena.sn[:count]))  # a set has one name
            return arena.state(tuple(np.stack([arena.sn[order], arena.sp[order]], 1).reshape(-1).tolist()))

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
        """Back to the start."""
        self._arena = self.compiled.arena()
        self._step = _Step(self._arena.state(self.START), False, None)

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
        if self.is_terminated():
            return ""
        arena = self._arena
        output = np.zeros(4096, np.uint8)
        with arena.lock:
            while True:
                count = arena.load(self._step.state.stacks)
                size = forced(self.compiled.pushdown.tables, *arena.frames, arena.sn, arena.sp, arena.sb, count, output)
                if size >= 0:
                    break
                arena.grow(size)
        data = output[:size].tobytes()
        for cut in range(min(4, len(data) + 1)):  # not into the middle of a character
            try:
                return data[: len(data) - cut].decode("utf-8")
            except UnicodeDecodeError:
                continue
        return ""
