"""Random small grammars, and an independent recogniser of viable prefixes: lark's Earley parser."""

from __future__ import annotations

from functools import lru_cache

from hypothesis import strategies as st

ALPHABET = "abc"
NAMES = ("root", "x", "y")


def expressions(names):
    """Expression trees as nested tuples."""
    leaves = st.one_of(
        st.text(ALPHABET, min_size=1, max_size=2).map(lambda t: ("text", t)),
        st.sampled_from(names).map(lambda n: ("ref", n)),
        st.sets(st.sampled_from(ALPHABET), min_size=1, max_size=2).map(lambda s: ("set", "".join(sorted(s)))),
    )
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=3).map(lambda parts: ("seq", *parts)),
            st.lists(inner, min_size=1, max_size=3).map(lambda parts: ("alt", *parts)),
            st.tuples(inner, st.sampled_from([(0, None), (1, None), (0, 1), (2, 2), (1, 3), (0, 2)])).map(
                lambda pair: ("rep", pair[0], *pair[1])
            ),
        ),
        max_leaves=6,
    )


def grammars():
    return st.fixed_dictionaries({name: expressions(NAMES) for name in NAMES})


def to_ebnf(tree):
    kind = tree[0]
    if kind == "text":
        return f'"{tree[1]}"'
    if kind == "ref":
        return tree[1]
    if kind == "set":
        return f"[{tree[1]}]"
    if kind in ("seq", "alt"):
        return "(" + (" " if kind == "seq" else " | ").join(map(to_ebnf, tree[1:])) + ")"
    _, inner, low, high = tree
    suffix = {(0, None): "*", (1, None): "+", (0, 1): "?"}.get((low, high), f"{{{low},{high}}}")
    return f"({to_ebnf(inner)}){suffix}"


def ebnf(trees):
    """A grammar as text."""
    return "\n".join(f"{name} ::= {to_ebnf(trees[name])}" for name in NAMES)


def to_lark(tree):
    kind = tree[0]
    if kind == "text":  # one terminal a character: prefixes may end inside a word
        return "(" + " ".join(f'"{char}"' for char in tree[1]) + ")"
    if kind == "ref":
        return {"root": "start", "x": "x", "y": "y"}[tree[1]]
    if kind == "set":
        return "(" + " | ".join(f'"{char}"' for char in tree[1]) + ")"
    if kind in ("seq", "alt"):
        return "(" + (" " if kind == "seq" else " | ").join(map(to_lark, tree[1:])) + ")"
    _, inner, low, high = tree
    suffix = {(0, None): "*", (1, None): "+", (0, 1): "?"}.get((low, high), f"~{low}..{high}")
    return f"({to_lark(inner)}){suffix}"


def productive(trees):
    """Whether every rule can be completed (Earley's valid-prefix property needs that)."""
    done = set()

    def can(tree):
        kind = tree[0]
        if kind in ("text", "set"):
            return True
        if kind == "ref":
            return tree[1] in done
        if kind == "seq":
            return all(map(can, tree[1:]))
        if kind == "alt":
            return any(map(can, tree[1:]))
        return tree[2] == 0 or can(tree[1])

    for _ in NAMES:
        done |= {name for name in NAMES if can(trees[name])}
    return done == set(NAMES)


class Earley:
    """``viable(text)``: some completion is in the language; ``complete(text)``: it is itself."""

    def __init__(self, trees):
        from lark import Lark

        source = "\n".join(f"{'start' if name == 'root' else name}: {to_lark(trees[name])}" for name in NAMES)
        self.parser = Lark(source, parser="earley", lexer="dynamic", ambiguity="resolve")
        self.status = lru_cache(maxsize=None)(self._status)

    def _status(self, text):
        from lark.exceptions import UnexpectedCharacters, UnexpectedEOF, UnexpectedInput

        try:
            self.parser.parse(text)
            return "complete"
        except UnexpectedEOF:
            return "viable"
        except UnexpectedCharacters:
            return "dead"
        except UnexpectedInput as error:
            raise AssertionError(error) from error

    def complete(self, text):
        return self.status(text) == "complete"

    def viable(self, text):
        return self.status(text) != "dead"
