"""The two structures that the kernels read: a grammar's automaton and a vocabulary's trie, both as flat arrays.

Inside the kernels they are named tuples. From Python a plain tuple reaches compiled code a microsecond sooner, which
is a fifth of
what accepting a token takes, so kernels that Python calls take ``packed()`` tuples and begin with
``Tables(*packed)``. The kernels do
not check bounds: ``Pushdown.check`` does, where tables come from outside.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
UInt8s = NDArray[np.uint8]
Int32s = NDArray[np.int32]
UInt32s = NDArray[np.uint32]
Int64s = NDArray[np.int64]
UInt64s = NDArray[np.uint64]

BOTTOM = -1
"""In place of a frame, or of a node to return to: nothing is below, the text ends here."""


PackedTables = tuple[
    Int32s, UInt8s, UInt8s, Int32s, Int32s, Int32s, Int32s, UInt8s, Int32s, Int32s, Int32s, UInt64s, Bools, Int32s
]
PackedTrie = tuple[UInt8s, Int32s, Int32s, Int32s, Int32s, UInt64s, Bools, Int32s, int]


class Tables(NamedTuple):
    """A pushdown automaton over bytes with N nodes, E edges, C calls and R rules; node 0 starts the root rule.

    The edges of node n lie at ``edge_ptr[n] .. edge_ptr[n + 1]``, its calls at ``call_ptr[n] .. call_ptr[n + 1]``,
    and what
    follows rule r at ``follow_ptr[r] .. follow_ptr[r + 1]``.

    Attributes:
        edge_ptr: ``[N + 1]``, where each node's edges start.
        edge_lo: ``[E]``, the smallest byte that an edge reads.
        edge_hi: ``[E]``, the largest.
        edge_to: ``[E]``, the node after it.
        call_ptr: ``[N + 1]``, where each node's calls start.
        call_start: ``[C]``, the first node of the rule called.
        call_to: ``[C]``, the node to return to; -1 where nothing is left to do on return (a tail call).
        final: ``[N]``, 1 where the node's rule may end.
        node_rule: ``[N]``, the rule to which a node belongs.
        follow_ptr: ``[R + 1]``, where each rule's places start.
        follow_to: the nodes at which a text can go on after a rule.
        plain: ``[N, 4]``, the set of bytes (as bits) that lead to the node's main target (see
        ``analysis.steady_runs``).
        wide: ``[N]``, whether every non-ASCII character leads there too.
        run: ``[N]``, for how many characters this can be repeated.
    """

    edge_ptr: Int32s
    edge_lo: UInt8s
    edge_hi: UInt8s
    edge_to: Int32s
    call_ptr: Int32s
    call_start: Int32s
    call_to: Int32s
    final: UInt8s
    node_rule: Int32s
    follow_ptr: Int32s
    follow_to: Int32s
    plain: UInt64s
    wide: Bools
    run: Int32s

    def packed(self) -> PackedTables:
        """As kernels take them from Python."""
        return cast("PackedTables", tuple(self))


_TYPES = (
    np.int32, np.uint8, np.uint8, np.int32, np.int32, np.int32, np.int32, np.uint8, np.int32, np.int32, np.int32,
    np.uint64, np.bool_, np.int32,
)  # fmt: skip
TABLE_TYPES: dict[str, np.dtype] = {name: np.dtype(kind) for name, kind in zip(Tables._fields, _TYPES, strict=True)}
"""The element type of each table."""


class Trie(NamedTuple):
    """Tokens by their bytes: M nodes in preorder (a node comes before those below it), T tokens.

    Attributes:
        byte: ``[M]``, the byte that leads to a node.
        depth: ``[M]``, how many bytes lead to it, at least 1.
        skip: ``[M]``, the first node after those below it.
        token_ptr: ``[M + 1]``; the tokens that end at node m are ``token_ids[token_ptr[m] : token_ptr[m + 1]]``.
        token_ids: ``[T]``.
        subtree: ``[M, 4]``, the set of bytes (as bits) at a node and below it.
        characters: ``[M]``, whether these are UTF-8 when a character starts at the node; the last one may be
        unfinished.
        height: ``[M]``, how many bytes the longest token through a node adds, the node's own byte included.
        levels: the largest depth plus 1.
    """

    byte: UInt8s
    depth: Int32s
    skip: Int32s
    token_ptr: Int32s
    token_ids: Int32s
    subtree: UInt64s
    characters: Bools
    height: Int32s
    levels: int

    @property
    def size(self) -> int:
        """How many nodes there are."""
        return len(self.byte)

    def packed(self) -> PackedTrie:
        """As kernels take it from Python."""
        return cast("PackedTrie", tuple(self))


class Settled(NamedTuple):
    """The tokens of K contexts, as ``analysis.settle`` finds them.

    Attributes:
        kinds: ``[K]``, how each set is stored: ACCEPTED and REJECTED as ids, BITS as the next of ``rows``.
        counts: ``[K]``, how many tokens are allowed.
        id_ptr: ``[K + 1]``, where each context's ids start.
        ids: token ids.
        rows: ``[.., W]``, bits.
        depend_ptr: ``[K + 1]``, where each context's dependent trie nodes start.
        depends: trie nodes of tokens that depend on more than the context tells.
    """

    kinds: UInt8s
    counts: Int64s
    id_ptr: Int64s
    ids: Int32s
    rows: UInt32s
    depend_ptr: Int64s
    depends: Int32s
