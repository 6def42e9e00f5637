"""The grammar engine: compiled grammars, and matchers that follow texts (the algorithm of ``xgrammar``, which see).

info = TokenizerInfo.from_huggingface(tokenizer, model.config.vocab_size)
compiled = GrammarCompiler(info).compile_json_schema(schema)
matcher = GrammarMatcher(compiled)
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..core.errors import BadInputError, EverytokenError
from .grammar import Grammar, StructuralTag
from .pushdown import Pushdown
from .vocabulary import TokenizerInfo, Trie

MEMO = 2048
"""Masks remembered for each automaton entry, and for states."""
RENEW_FRAMES, RENEW_STATES = 1 << 20, 1 << 15
"""New matchers get fresh buffers once the shared ones have grown to this size."""


@dataclass
class TokenSet:
    """Tokens, stored as ``kind``: ``"accepted"`` ids, ``"rejected"`` ids, or ``"bits"``."""

    kind: str
    data: np.ndarray
    size: int

    @classmethod
    def from_bits(cls, bits: np.ndarray, accepted: int, vocab_size: int) -> TokenSet:
        from .kernels import members

        if accepted <= len(bits):
            return cls("accepted", members(bits, vocab_size, 1, accepted), vocab_size)
        if vocab_size - accepted <= len(bits):
            return cls("rejected", members(bits, vocab_size, 0, vocab_size - accepted), vocab_size)
        return cls("bits", bits, vocab_size)

    def bits(self) -> np.ndarray:
        """``[W]`` uint32; a fresh array unless stored as bits."""
        if self.kind == "bits":
            return self.data
        from .kernels import set_bits

        words = np.zeros((self.size + 31) // 32, np.uint32)
        if self.kind == "rejected":
            words[:] = 0xFFFFFFFF
            if self.size % 32:
                words[-1] = (1 << (self.size % 32)) - 1
        set_bits(words, self.data, self.kind == "accepted")
        return words


_BIT = np.left_shift(np.uint32(1), np.arange(32, dtype=np.uint32)).view(np.int32)
_NO_BYTES = np.zeros(0, np.uint8)


class _Entry:
    """What a node says about tokens: those settled by itself, and the trie of those that depend on the stack."""

    def __init__(self, accepted: TokenSet, part: Trie | None):
        self.accepted, self.part = accepted, part
        self.resolved: OrderedDict[tuple[int, ...], np.ndarray] = OrderedDict()
        self.depths: list[int] = []


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
        self.fn, self.fp, self.fd = (np.zeros(room, np.int32) for _ in range(3))
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
        from .kernels import AMBIGUOUS, MAX_STACKS, rehash

        if code == AMBIGUOUS:
            raise EverytokenError(
                f"The grammar is so ambiguous here that more than {MAX_STACKS:,} parses are alive.",
                "Make repeated alternatives distinct, or replace nested repetitions such as (a* b*)*.",
            )
        room = 2 * len(self.fn)
        self.fn, self.fp, self.fd = (
            np.concatenate([a, np.zeros(room - len(a), a.dtype)]) for a in (self.fn, self.fp, self.fd)
        )
        self.table = np.full(4 * room, -1, np.int64)
        rehash(self.table, self.fn, self.fp, self.top)
        size = 2 * len(self.sn)
        self.sn, self.sp, self.sb = (
            np.concatenate([a, np.zeros(size - len(a), a.dtype)]) for a in (self.sn, self.sp, self.sb)
        )

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
        from .kernels import closing_nodes, lookahead_classes

        self.pushdown, self.tokenizer_info = pushdown, tokenizer_info
        values = lookahead_classes(pushdown.tables, tokenizer_info.longest + 1)
        self.classes: list[int] = np.unique(values, return_inverse=True)[1].reshape(-1).tolist()
        _, _, _, _, call_ptr, call_start, call_to, final, *_ = pushdown.tables
        self.closes: list[bool] = closing_nodes(call_ptr, call_start, call_to, final).tolist()
        self._entries: dict[int, _Entry] = {}
        self._lock = threading.Lock()
        self._scratch = threading.local()
        self._shared = _Arena()

    def arena(self) -> _Arena:
        """The buffers for a new matcher."""
        with self._lock:
            if self._shared.full:
                self._shared = _Arena()
            return self._shared

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
        from .kernels import CROWDED, UNKNOWN, walk

        info = self.tokenizer_info
        arena = getattr(self._scratch, "arena", None)
        if arena is None:
            arena = self._scratch.arena = _Arena()
            self._scratch.depend = np.zeros(len(info.trie[0]), np.int32)
        bits, loose = np.zeros(info.words, np.uint32), False
        while True:
            count = arena.load((node, UNKNOWN))
            accepted, dependent, _ = walk(  # type: ignore[call-arg]
                self.pushdown.tables,
                info.trie,
                *arena.frames,
                arena.sn,
                arena.sp,
                arena.sb,
                count,
                bits,
                self._scratch.depend,
                loose,
            )
            if accepted >= 0:
                break
            bits[:] = 0
            if accepted != CROWDED:
                arena.grow(accepted)
            loose = loose or accepted == CROWDED
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
        from .kernels import walk

        bits = entry.accepted.bits().copy()
        depend = np.zeros(len(part[0]), np.int32)
        while True:
            count = arena.load((node, parent))
            accepted, _, lowest = walk(
                self.pushdown.tables, part, *arena.frames, arena.sn, arena.sp, arena.sb, count, bits, depend, False
            )
            if accepted >= 0:
                break
            bits = entry.accepted.bits().copy()
            arena.grow(accepted)
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
        key = [depth]
        for _ in range(depth):
            if parent < 0:
                key.append(-1)
                break
            key.append(self.classes[arena.fn.item(parent)])
            parent = arena.fp.item(parent)
        return tuple(key)

    def warm(self, seconds: float | None = None) -> CompiledGrammar:
        """Computes the entries of nodes now that are otherwise made when first met; returns itself.

        Args:
            seconds: stop after so long; None computes all.
        """
        began = time.perf_counter()
        for node in {group: node for node, group in enumerate(self.classes)}.values():
            self.entry(node)
            if seconds is not None and time.perf_counter() - began > seconds:
                break
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
        warm_seconds: time to spend on masks ahead, for each grammar; what is left is computed when it is first needed.
    """

    def __init__(self, tokenizer_info: TokenizerInfo, cache_limit: int = 256, warm_seconds: float = 0.1):
        self.tokenizer_info, self.cache_limit, self.warm_seconds = tokenizer_info, cache_limit, warm_seconds
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
        return CompiledGrammar(Pushdown.from_grammar(grammar), self.tokenizer_info).warm(self.warm_seconds)

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
        arena, stacks = self._arena, state.stacks
        with arena.lock:
            words = self.compiled.stack_mask(arena, stacks[0], stacks[1])
            if len(stacks) > 2:
                words = words.copy()
                for place in range(2, len(stacks), 2):
                    words |= self.compiled.stack_mask(arena, stacks[place], stacks[place + 1])
            restricted = (
                bool((words[:-1] != 0xFFFFFFFF).any())
                or self.compiled.tokenizer_info.vocab_size > len(words) * 32 - 32 + int(words[-1]).bit_count()
            )
            mask = words.view(np.int32)
            arena.remember(state, mask, restricted)
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
        if step.stopped or (self.terminate_without_stop_token and self._can_end(state)):
            raise BadInputError(
                "The text is finished; there is no next token.", "Check is_terminated() first, or reset()."
            )
        words = state.mask if state.mask is not None else self._mask(state)
        rows = bitmask if isinstance(bitmask, np.ndarray) else self._numpy(bitmask)
        row = rows[index] if rows.ndim == 2 else rows
        size = len(words)
        if row.dtype != np.int32 or len(row) < size:
            raise BadInputError(
                f"The bitmask has {len(row)} words of {row.dtype}; {size} of int32 are needed.",
                "Allocate it with allocate_token_bitmask(batch_size, tokenizer_info.vocab_size).",
            )
        if len(row) == size:
            row[:] = words
        else:
            row[:size], row[size:] = words, 0
        if self.stop_token_ids and self._can_end(state):
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
        from .kernels import survives

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
        from .kernels import advance

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
        from .kernels import forced

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
