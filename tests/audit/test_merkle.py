"""Hash trees: the roots and paths of RFC 6962's test data, brute force, and what inclusion proofs do not prove."""

from __future__ import annotations

import hashlib

import pytest

from everytoken.audit.merkle import leaf_hash, node_hash, path, root, verify
from everytoken.core.errors import BadInputError

DATA = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
LEAVES = [leaf_hash(bytes.fromhex(item)) for item in DATA]
ROOTS = ["e3b0c44298fc1c14", "6e340b9cffb37a98", "fac54203e7cc696c", "aeb6bcfe274b70a1", "d37ee418976dd957"]
ROOTS += ["4e3bbb1f7b478dcf", "76e67dadbcdf1e10", "ddb89be403809e32", "5dc9da79a70659a9"]


def recursive(leaves):
    """The definition: split at the largest power of two below n."""
    if len(leaves) == 1:
        return leaves[0]
    split = 1
    while 2 * split < len(leaves):
        split *= 2
    return node_hash(recursive(leaves[:split]), recursive(leaves[split:]))


def of(count):
    return [leaf_hash(bytes([number])) for number in range(count)]


def test_known_roots_and_a_known_path():
    assert [root(LEAVES[:count]).hex()[:16] for count in range(9)] == ROOTS
    assert [item.hex()[:16] for item in path(LEAVES, 5)] == ["bc1a0643b12e4d2d", "ca854ea128ed050b", "d37ee418976dd957"]


def test_every_leaf_of_every_tree_verifies():
    for count in range(1, 41):
        leaves = of(count)
        expected = root(leaves)
        assert expected == recursive(leaves)
        for index in range(count):
            assert verify(leaves[index], index, count, path(leaves, index), expected)


def test_inclusion_proofs_do_not_prove_the_count():
    """The two counts of the sheet: false sizes below 80 that pass, and those that pass for the last leaf."""
    passing = last = 0
    for count in range(1, 40):
        leaves = of(count)
        expected = root(leaves)
        for index in range(count):
            siblings = path(leaves, index)
            for claimed in range(1, 80):
                if claimed != count and index < claimed:
                    passing += verify(leaves[index], index, claimed, siblings, expected)
        siblings = path(leaves, count - 1)
        for claimed in range(1, 80):
            passes = claimed != count and verify(leaves[-1], claimed - 1, claimed, siblings, expected)
            assert passes == (claimed != count and (count - 1).bit_count() == (claimed - 1).bit_count())
            last += passes
    assert (passing, last) == (11_946, 690)
    three = of(3)
    assert verify(three[0], 0, 4, path(three, 0), root(three))
    assert verify(three[2], 4, 5, path(three, 2), root(three))


def test_the_papers_padding_lets_five_leaves_be_eight():
    def padded(leaves):
        size = 1 << (len(leaves) - 1).bit_length()
        return root(leaves + [leaves[-1]] * (size - len(leaves)))

    five = of(5)
    assert padded(five) == padded([*five, five[-1]]) == padded([*five, five[-1], five[-1], five[-1]])
    assert len({root([*five, *[five[-1]] * more]) for more in range(4)}) == 4


def test_changed_proofs_fail():
    leaves = of(11)
    expected, siblings = root(leaves), path(leaves, 6)
    for place in range(len(siblings)):
        for bit in (0, 100, 255):
            changed = bytearray(siblings[place])
            changed[bit // 8] ^= 1 << bit % 8
            assert not verify(leaves[6], 6, 11, [*siblings[:place], bytes(changed), *siblings[place + 1 :]], expected)
    assert not verify(leaves[6], 6, 11, siblings[::-1], expected)
    assert not verify(leaves[6], 6, 11, siblings[:-1], expected)
    assert not verify(leaves[6], 6, 11, [*siblings, expected], expected)
    assert not verify(leaves[6], 7, 11, siblings, expected)
    assert not verify(leaves[6], 6, 11, [item[:31] for item in siblings], expected)
    assert not verify(leaves[6], 6, 11, siblings * 20, expected)
    for index, count in ((-1, 11), (11, 11), (0, 0)):
        assert not verify(leaves[6], index, count, siblings, expected)
    inner = node_hash(leaves[6], leaves[7])  # an inner node is no leaf: another tag
    assert leaf_hash(leaves[6] + leaves[7]) != inner == hashlib.sha256(b"\x01" + leaves[6] + leaves[7]).digest()
    with pytest.raises(BadInputError):
        path(leaves, 11)
