"""Hash trees of RFC 6962: leaves and nodes are hashed with different tags, and a tree of any size needs no padding.

::

    leaf = SHA-256(0x00 || data)      node = SHA-256(0x01 || left || right)

A tree of n leaves is split at the largest power of two below n. The tags keep an inner node from passing as a leaf; no
padding keeps n leaves from having the root of more. A proof that a leaf is in a tree does *not* prove how many leaves
the tree has: leaf 0 of 3 verifies as leaf 0 of 4 too.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from ..core.errors import BadInputError

HASH = 32
"""Bytes of a hash."""
LONGEST_PATH = 64


def leaf_hash(data: bytes) -> bytes:
    """The hash of a leaf."""
    return hashlib.sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash of an inner node."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def root(leaves: Sequence[bytes]) -> bytes:
    """The root over leaf hashes; of none, the hash of nothing."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    level = list(leaves)
    while len(level) > 1:  # pairs from the left, an odd one moves up: the split at the largest power of two below n
        paired = [node_hash(level[place], level[place + 1]) for place in range(0, len(level) - 1, 2)]
        level = paired + ([level[-1]] if len(level) % 2 else [])
    return level[0]


def path(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """The siblings from leaf ``index`` to the root.

    Raises:
        BadInputError: there is no such leaf.
    """
    if not 0 <= index < len(leaves):
        raise BadInputError(f"There is no leaf {index} of {len(leaves)}.")
    found, level = [], list(leaves)
    while len(level) > 1:
        sibling = index ^ 1
        if sibling < len(level):
            found.append(level[sibling])
        paired = [node_hash(level[place], level[place + 1]) for place in range(0, len(level) - 1, 2)]
        level = paired + ([level[-1]] if len(level) % 2 else [])
        index //= 2
    return found


def verify(leaf: bytes, index: int, count: int, siblings: Sequence[bytes], expected: bytes) -> bool:
    """Whether a path leads from a leaf to the root of a tree of ``count`` leaves (RFC 9162, section 2.1.3.2).

    Roots are compared in constant time. A proof of more than 64 hashes, or of hashes of another length, is false.
    """
    if not 0 <= index < count or len(siblings) > LONGEST_PATH or any(len(item) != HASH for item in siblings):
        return False
    place, last, reached = index, count - 1, leaf
    for sibling in siblings:
        if last == 0:
            return False
        if place & 1 or place == last:
            reached = node_hash(sibling, reached)
            while place and not place & 1:
                place, last = place >> 1, last >> 1
        else:
            reached = node_hash(reached, sibling)
        place, last = place >> 1, last >> 1
    return last == 0 and hmac.compare_digest(reached, expected)
