"""Tokens inside free text, found once for a vocabulary: what any grammar asks for first is the inside of a string.

Where a node reads most characters and goes on in the same way after each (``analysis.steady_runs``), a token that
consists of such characters needs no look. These tokens are the same for every grammar with the same characters, and so
is the trie of all others. Where the way on is the same whatever number of characters has been read, a token counts by
what it holds from its first other byte on: tokens with equal ends are looked at once.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..grammar.expressions import LAST_CHAR, ByteSet, Chars, alt, star
from ..grammar.grammar import Grammar
from .analysis import set_bits, settle_one
from .pushdown import Pushdown
from .tables import BOTTOM, Int32s, Int64s, Tables, Trie, UInt32s
from .vocabulary import TokenizerInfo, trie_of

MANY = 2_000
"""Smaller vocabularies are looked at token by token."""
FREE = 64
"""A node that reads fewer ASCII characters than this is looked at like any other."""
CALLS = 64
"""Nodes that are looked at for one from which a run begins."""
KINDS = 8
"""Kinds of free text that a vocabulary remembers."""
_lock = threading.Lock()


@dataclass
class FreeText:
    """The tokens of a vocabulary by one set of characters: some ASCII characters, and all that are not ASCII.

    Attributes:
        ids: tokens that consist of such characters (the last one may be unfinished), those of fewest characters first.
        characters: how many characters each of them begins.
        rest: a trie of all other tokens.
    """

    info: TokenizerInfo
    ids: Int32s
    characters: Int64s
    rest: Trie
    inside: list[bool]
    _words: dict[int, UInt32s] = field(default_factory=dict)

    def words(self, most: int) -> tuple[UInt32s, int]:
        """``[W]`` uint32, a fresh array: the tokens of at most so many characters; and how many these are."""
        count = int(np.searchsorted(self.characters, most, "right"))
        known = self._words.get(count)
        if known is None:
            known = np.zeros(self.info.words, np.uint32)
            set_bits(known, self.ids[:count], True)
            self._words[count] = known
        return known.copy(), count

    @property
    def longest(self) -> int:
        """The most characters of one of the tokens."""
        return int(self.characters[-1]) if len(self.characters) else 0

    @cached_property
    def ends(self) -> Trie:
        """The other tokens by what they hold from their first other byte on."""
        inside = self.inside
        if not self.rest.size:
            return self.rest
        found: list[tuple[bytes, int]] = []
        for index in np.sort(self.rest.token_ids).tolist():
            token = self.info.vocabulary[index]
            assert token is not None
            found.append((token[beginning(token, inside) :], index))
        return trie_of(found)


def beginning(token: bytes, inside: list[bool]) -> int:
    """How many bytes a token holds before the first character that is not free (or not whole)."""
    place = 0
    while place < len(token):
        byte = token[place]
        if byte < 0x80:
            if not inside[byte]:
                return place
            place += 1
            continue
        size = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
        try:
            token[place : place + size].decode("utf-8")
        except UnicodeDecodeError:
            return place
        place += size
    return place


def free_text(info: TokenizerInfo, plain: tuple[int, int]) -> FreeText:
    """The tokens by one set of ASCII characters (as two words of bits), made once for a vocabulary."""
    with _lock:
        known: dict[tuple[int, int], FreeText] = info.__dict__.setdefault("_free_texts", {})
        if plain not in known:
            while len(known) >= KINDS:
                del known[next(iter(known))]
            known[plain] = _made(info, plain)
        return known[plain]


def _made(info: TokenizerInfo, plain: tuple[int, int]) -> FreeText:
    inside = [bool(plain[byte >> 6] >> (byte & 63) & 1) for byte in range(128)]
    ranges = tuple((byte, byte) for byte in range(128) if inside[byte])
    text = Grammar({"root": star(alt(ByteSet(ranges), Chars(((0x80, LAST_CHAR),))))})
    trie, words = info.trie, np.zeros(info.words, np.uint32)
    settle_one(
        Pushdown.from_grammar(text).tables.packed(), trie.packed(), np.array([0, BOTTOM], np.int32), words,
        np.empty(trie.size, np.int32),
    )  # fmt: skip
    accepted = (words[trie.token_ids >> 5] >> (trie.token_ids & 31).astype(np.uint32) & 1).astype(np.bool_)
    nodes = np.repeat(np.arange(trie.size, dtype=np.int32), np.diff(trie.token_ptr))
    rest = info.part(np.unique(nodes[~accepted]))
    ids = trie.token_ids[accepted]
    characters = info.characters[ids]
    order = np.argsort(characters, kind="stable")
    return FreeText(info, ids[order], characters[order], rest, inside)


class Runs:
    """Where in a grammar free text goes on.

    Args:
        classes: of nodes that behave equally for as long as a token is (see ``CompiledGrammar``).
    """

    def __init__(self, tables: Tables, classes: list[int], info: TokenizerInfo):
        self.tables, self.classes, self.info = tables, classes, info
        self.stopping: dict[int, bool] = {}

    def known(self, node: int) -> tuple[UInt32s, int, Trie] | None:
        """Tokens allowed at a node without a look, how many, and a trie of those that must be looked at; None: all."""
        tables = self.tables
        if self.info.vocab_size < MANY:
            return None
        if tables.call_ptr.item(node) == tables.call_ptr.item(node + 1):
            plain = self._characters(node)
            if plain is None:
                return None
            free, run = free_text(self.info, plain), tables.run.item(node)
            if run >= free.longest:
                return *free.words(run), free.ends if self._unchanged(node) else free.rest
            if self._stops(node, plain, run):  # longer ones are not allowed, whatever follows
                return *free.words(run), free.rest
            return None
        for reached in self._called(node):  # a rule that is called: what it reads, the caller reads
            plain = self._characters(reached)
            if plain is not None:
                free = free_text(self.info, plain)
                if tables.run[reached] >= free.longest:
                    return *free.words(free.longest), free.rest
        return None

    def _called(self, node: int) -> list[int]:
        tables, found = self.tables, [node]
        for here in found:
            for start in tables.call_start[tables.call_ptr[here] : tables.call_ptr[here + 1]].tolist():
                if start not in found and len(found) < CALLS:
                    found.append(start)
        return found[1:]

    def _characters(self, node: int) -> tuple[int, int] | None:
        """The ASCII characters of the run that begins at a node, if it reads nearly all characters."""
        if not self.tables.wide.item(node) or self.tables.run.item(node) < 1:
            return None
        low, high, *others = self.tables.plain[node].tolist()
        return (low, high) if not any(others) and (low.bit_count() + high.bit_count()) >= FREE else None

    def _after(self, node: int) -> int:
        """The node behind a character of the run."""
        tables = self.tables
        low, high = tables.plain[node, 0].item(), tables.plain[node, 1].item()
        byte = (low & -low).bit_length() - 1 if low else 64 + (high & -high).bit_length() - 1
        for edge in range(tables.edge_ptr.item(node), tables.edge_ptr.item(node + 1)):
            if tables.edge_lo.item(edge) <= byte <= tables.edge_hi.item(edge):
                return tables.edge_to.item(edge)
        raise AssertionError("a run without an edge")

    def _unchanged(self, node: int) -> bool:
        """Whether all nodes that a token's characters lead to behave as the first one does."""
        here, group = node, self.classes[node]
        for _ in range(self.info.longest):
            after = self._after(here)
            if after == here:
                return True
            if self.classes[after] != group:
                return False
            here = after
        return True

    def _stops(self, node: int, plain: tuple[int, int], run: int) -> bool:
        """Whether the characters of a run lead, one way only, to a node that reads none of them."""
        if node not in self.stopping:
            chain = [node]
            for _ in range(run):
                chain.append(self._after(chain[-1]))
            nodes = [chain[-1]]  # that must read nothing of it: the last one, and what follows where the rule may end
            if self.tables.final[chain].any():
                rule = self.tables.node_rule[node]
                nodes += self.tables.follow_to[self.tables.follow_ptr[rule] : self.tables.follow_ptr[rule + 1]].tolist()
            stops = self._alone(chain) and self._silent(nodes, plain)
            self.stopping |= dict.fromkeys(chain[:-1], stops)
        return self.stopping[node]

    def _silent(self, nodes: list[int], plain: tuple[int, int]) -> bool:
        """Whether nodes read nothing of a run's characters and call nothing; only the first one's rule may end."""
        if self.calling[nodes].any() or self.tables.final[nodes[1:]].any():
            return False
        return not any(
            high >= 0x80 or (plain[0] | plain[1] << 64) & ((1 << (high + 1)) - (1 << low))
            for low, high in self._edges(nodes)[:, :2].tolist()
        )

    def _alone(self, chain: list[int]) -> bool:
        """Whether all nodes of a chain but the last one lead on by reading only, by one edge for a byte.

        So do those inside a character behind them. Between characters the rule may end.
        """
        inside, seen = np.array(chain[:-1]), np.array(chain)
        for depth in range(4):  # a character has at most four bytes
            if self.calling[inside].any() or self.several[inside].any() or (depth and self.tables.final[inside].any()):
                return False
            edges = self._edges(inside)
            inside = np.setdiff1d(edges[edges[:, 1] >= 0x80, 2], seen)
            seen = np.union1d(seen, inside)
        return True

    def _edges(self, nodes: NDArray[np.int64] | list[int]) -> NDArray[np.int64]:
        """``[.., 3]``: the edges of some nodes."""
        tables, wanted = self.tables, np.asarray(nodes)
        begins, counts = tables.edge_ptr[wanted], tables.edge_ptr[wanted + 1] - tables.edge_ptr[wanted]
        places = np.repeat(begins - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        return np.stack([tables.edge_lo[places], tables.edge_hi[places], tables.edge_to[places]], 1).astype(np.int64)

    @cached_property
    def calling(self) -> NDArray[np.bool_]:
        """``[N]``: which nodes call rules."""
        return np.diff(self.tables.call_ptr) > 0

    @cached_property
    def several(self) -> NDArray[np.bool_]:
        """``[N]``: which nodes have several edges for one byte."""
        tables = self.tables
        source = np.repeat(np.arange(len(tables.final)), np.diff(tables.edge_ptr))
        order = np.lexsort((tables.edge_lo, source))
        low, high, owner = tables.edge_lo[order], tables.edge_hi[order], source[order]
        found = np.zeros(len(tables.final), np.bool_)
        found[owner[1:][(owner[1:] == owner[:-1]) & (low[1:] <= high[:-1])]] = True
        return found
