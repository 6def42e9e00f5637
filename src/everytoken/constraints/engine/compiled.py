"""A grammar compiled for one vocabulary: which tokens are allowed on a stack, found once and remembered.

The tokens allowed at a node of the automaton fall into those that the node alone decides and those that depend on
the frames
below it. A context is a node and as many frames as its tokens depend on; an entry holds what is known of one.
"""

from __future__ import annotations

import json
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

import numpy as np

from ...core.errors import BadInputError
from .analysis import BITS, REJECTED, closing_nodes, lookahead_classes, set_bits, settle, settle_one
from .arena import Arena, too_ambiguous
from .pushdown import Pushdown
from .steady import Runs
from .tables import BOTTOM, Int32s, Trie, UInt32s
from .vocabulary import TokenizerInfo

CONTEXTS = 1 << 12
"""Contexts remembered for a grammar."""
SITES, FEW, CHUNK = 32, 8, 32
"""Ahead of time, dependent tokens are settled for up to ``SITES`` places that a node may return to, and further down
as long
as at most ``FEW`` contexts have any left. ``CHUNK`` nodes are settled at a time."""


@dataclass(slots=True)
class TokenSet:
    """Tokens, stored as ``kind``: ids that are in (``ACCEPTED``), ids that are not (``REJECTED``), or ``BITS``."""

    kind: int
    data: Int32s | UInt32s
    size: int

    def bits(self) -> UInt32s:
        """``[W]`` uint32; a fresh array unless stored as bits."""
        if self.kind == BITS:
            return cast("UInt32s", self.data)
        words = np.zeros((self.size + 31) // 32, np.uint32)
        if self.kind == REJECTED:
            words[:] = 0xFFFFFFFF
            if self.size % 32:
                words[-1] = (1 << (self.size % 32)) - 1
        set_bits(words, cast("Int32s", self.data), self.kind != REJECTED)
        return words


class Entry:
    """What is known of the tokens in a context (a node, and what the top frames below it return to).

    Attributes:
        accepted: the tokens allowed whatever lies deeper; ``count`` of them.
        part: a trie of those that depend on it; None if there are none.
        deeper: the entries of contexts that tell one more frame, by the class of what it returns to.
    """

    __slots__ = ("_mask", "accepted", "count", "deeper", "part")

    def __init__(self, accepted: TokenSet, count: int, part: Trie | None):
        self.accepted, self.count, self.part = accepted, count, part
        self.deeper: dict[int, Entry] = {}
        self._mask: Callable[[], UInt32s | None] = _nothing

    def mask(self) -> UInt32s:
        """``[W]`` uint32, shared for as long as somebody holds it: do not change it."""
        mask = self._mask()
        if mask is None:
            mask = self.accepted.bits()
            self._mask = weakref.ref(mask)
        return mask


def _nothing() -> None:
    return None


class CompiledGrammar:
    """A grammar ready for one vocabulary. Shared freely between matchers and threads.

    Attributes:
        pushdown: the automaton.
        tokenizer_info: the vocabulary.
        packed: the automaton as kernels take it.
        classes: for each node its class; nodes of a class allow the same tokens.
        closes: for each node, whether its rule can be finished without reading.
    """

    def __init__(self, pushdown: Pushdown, tokenizer_info: TokenizerInfo):
        self.pushdown, self.tokenizer_info = pushdown, tokenizer_info
        self.packed = pushdown.tables.packed()
        values = lookahead_classes(self.packed, tokenizer_info.longest + 1)
        self.classes: list[int] = np.unique(values, return_inverse=True)[1].reshape(-1).tolist()
        self.closes: list[bool] = closing_nodes(self.packed).tolist()
        self._runs = Runs(pushdown.tables, self.classes, tokenizer_info)
        self._entries: dict[int, Entry] = {}
        self._contexts = 0
        self._lock = threading.Lock()
        self._shared = Arena()

    def arena(self) -> Arena:
        """The buffers for a new matcher."""
        with self._lock:
            if self._shared.full:
                self._shared = Arena()
            return self._shared

    # -- entries ------------------------------------------------------------------------------------------------------
    def entry(self, arena: Arena, node: int, frame: int) -> Entry:
        """The tokens allowed on one stack: as much of it is looked at as they depend on."""
        found = self._entries.get(self.classes[node])
        if found is None:
            found = self._settle_node(node)
            with self._lock:
                found = self._entries.setdefault(self.classes[node], found)
        context = [node]
        while found.part is not None:
            to = key = BOTTOM
            if frame >= 0:
                to, frame = arena.frame_node.item(frame), arena.frame_parent.item(frame)
                key = self.classes[to]
            context.append(to)
            following = found.deeper.get(key)
            if following is None:
                following = self._remember(found, key, self._settle_one(found, context))
            found = following
        return found

    def _remember(self, entry: Entry, key: int, following: Entry) -> Entry:
        with self._lock:
            self._contexts += 1
            if self._contexts > CONTEXTS:
                self._contexts = 0
                for known in self._entries.values():
                    known.deeper = {}
            return entry.deeper.setdefault(key, following)

    def _settle_node(self, node: int) -> Entry:
        """The entry of a node alone; inside free text, tokens of nothing else are known beforehand."""
        known = self._runs.known(node)
        if known is None:
            return self._settle(None, [[node]])[0]
        words, count, rest = known
        return self._walked(words, count, rest, [node])

    def _walked(self, words: UInt32s, count: int, trie: Trie, context: list[int]) -> Entry:
        """The entry of a context, of which ``count`` tokens are known; the trie has those that are not."""
        depend = np.empty(trie.size, np.int32)
        accepted, dependent = settle_one(self.packed, trie.packed(), np.array(context, np.int32), words, depend)
        if accepted < 0:
            raise too_ambiguous()
        following = self.tokenizer_info.part(depend[:dependent], trie) if dependent else None
        return Entry(TokenSet(BITS, words, self.tokenizer_info.vocab_size), count + accepted, following)

    def _settle_one(self, above: Entry, context: list[int]) -> Entry:
        """The entry of one context, while somebody waits; ``above`` is what is known with one frame less."""
        assert above.part is not None
        return self._walked(above.mask().copy(), above.count, above.part, context)

    def _settle(self, above: Entry | None, contexts: list[list[int]]) -> list[Entry]:
        """The entries of contexts; ``above`` is what is known with one frame less (the same for all of them)."""
        info = self.tokenizer_info
        trie, known, count = info.trie, np.zeros(info.words, np.uint32), 0
        if above is not None and above.part is not None:
            trie, known, count = above.part, above.mask(), above.count
        pointers = np.zeros(len(contexts) + 1, np.int64)
        np.cumsum([len(context) for context in contexts], out=pointers[1:])
        flat = np.array([node for context in contexts for node in context], np.int32)
        settled = settle(self.packed, trie.packed(), info.vocab_size, known, count, flat, pointers)
        kinds, counts, depends = settled.kinds, settled.counts, settled.depends
        if not len(kinds):
            raise too_ambiguous()
        entries = []
        used, begins, firsts = 0, settled.id_ptr.tolist(), settled.depend_ptr.tolist()
        ids = settled.ids[: begins[-1]].copy()  # without the room left over
        rows = settled.rows[: int((kinds == BITS).sum())].copy()
        for place, (kind, size) in enumerate(zip(kinds.tolist(), counts.tolist(), strict=True)):
            if kind == BITS:
                data = rows[used]
                used += 1
            else:
                data = ids[begins[place] : begins[place + 1]]
            part = None
            if firsts[place] < firsts[place + 1]:
                part = info.part(depends[firsts[place] : firsts[place + 1]], trie)
            entries.append(Entry(TokenSet(kind, data, info.vocab_size), size, part))
        return entries

    def warm(self, seconds: float | None = None, max_threads: int = 1) -> CompiledGrammar:
        """Settles now what is otherwise settled when first met: nodes, then what may follow them; returns itself.

        Args:
            seconds: stop after so long; None goes through to the end.
            max_threads: for the nodes.
        """
        if seconds == 0.0:
            return self
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

        def settle_free_text() -> None:
            for group, node in waiting:
                known = self._runs.known(node)
                if known is not None and not late():
                    words, count, rest = known
                    self._entries.setdefault(group, self._walked(words, count, rest, [node]))

        nodes = {group: node for node, group in enumerate(self.classes)}
        waiting = [(group, node) for group, node in nodes.items() if group not in self._entries]
        settle_free_text()
        waiting = [(group, node) for group, node in waiting if group not in self._entries]
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
            total += sum(a.nbytes for a in entry.part if isinstance(a, np.ndarray)) if entry.part else 0
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
