"""From a grammar's rules to one automaton a rule: what is built in, unrolled, dropped and refused on the way."""

from __future__ import annotations

import operator
from collections import Counter

from .automata import Builder, build, trim
from .automaton import ArrayAutomaton, Automaton, arrays
from .expressions import (
    EMPTY,
    Alt,
    Expression,
    GrammarError,
    Graph,
    Ref,
    Repeat,
    Rules,
    Seq,
    expression_size,
    references,
    seq,
)
from .grammar import Grammar

INLINE_ONCE, INLINE_ALWAYS, FINISHED = 2_000, 16, 12
"""Rules up to these sizes are built into the rules that mention them: those mentioned once, all, and all that are
automata already (larger ones, as the free string, are better shared)."""
NESTED = {Seq, Alt, Graph, Repeat}
"""Expressions that hold others."""
UNROLL, BLOCK, BUILT_IN = 100_000, 128, 20_000
"""A bounded repetition is unrolled up to so many states; beyond, it becomes calls of rules for ``BLOCK`` items. The
items are built into these rules if that makes no more states than ``BUILT_IN``."""


def rule_automata(grammar: Grammar) -> dict[str, ArrayAutomaton]:
    """One automaton a rule, root first; small rules are built in, useless ones dropped.

    Raises:
        GrammarError: no text matches the grammar, or a rule calls itself before reading anything (left recursion).
    """
    rules = dict(grammar.rules)
    for name, body in list(rules.items()):
        if expression_size(body, {}, UNROLL + 1) > UNROLL:  # as few are: all others hold no long repetition
            rules[name] = _bound_repeats(body, rules)
    mentioned = {name: references(body) for name, body in rules.items()}
    counts = Counter(name for names in mentioned.values() for name in names)
    mentions = {name: set(names) for name, names in mentioned.items()}
    order = _bottom_up(mentions)
    recursive = _recursive(mentions, order)
    sizes: dict[str, int] = {}
    for name in order:
        sizes[name] = expression_size(rules[name], sizes, INLINE_ONCE + 1)
    inlined = {
        name
        for name in rules
        if name not in recursive
        and name != grammar.root
        and (
            sizes[name] <= (FINISHED if isinstance(rules[name], Automaton) else INLINE_ALWAYS)
            or (counts[name] == 1 and sizes[name] <= INLINE_ONCE)
        )
    }

    def inline(name: str) -> Expression | None:
        return rules[name] if name in inlined else None

    automata: dict[str, ArrayAutomaton] = {}
    pending = [grammar.root]
    while pending:
        name = pending.pop()
        if name in automata:
            continue
        automata[name] = arrays(build(rules[name], inline))
        pending += automata[name].called()
    return _productive_only(automata, grammar.root)


def _bottom_up(mentions: dict[str, set[str]]) -> list[str]:
    """Rule names, those mentioned before those that mention them (cycles cut anywhere)."""
    order: list[str] = []
    state: dict[str, int] = {}
    for start in mentions:
        stack = [(start, False)]
        while stack:
            name, done = stack.pop()
            if done:
                order.append(name)
            elif name not in state:
                state[name] = 1
                stack.append((name, True))
                stack += [(other, False) for other in mentions[name] if other not in state]
    return order


def _cycles(mentions: dict[str, set[str]]) -> list[set[str]]:
    """Sets of rules that lead to each other (Tarjan's algorithm, without recursion)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    on_stack: set[str] = set()
    stack: list[str] = []
    found: list[set[str]] = []
    for start in mentions:
        if start in index:
            continue
        work = [(start, iter(mentions[start]))]
        index[start] = low[start] = len(index)
        stack.append(start)
        on_stack.add(start)
        while work:
            name, following = work[-1]
            for other in following:
                if other not in index:
                    index[other] = low[other] = len(index)
                    stack.append(other)
                    on_stack.add(other)
                    work.append((other, iter(mentions[other])))
                    break
                if other in on_stack:
                    low[name] = min(low[name], index[other])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[name])
                if low[name] == index[name]:
                    members: set[str] = set()
                    while True:
                        member = stack.pop()
                        on_stack.discard(member)
                        members.add(member)
                        if member == name:
                            break
                    if len(members) > 1 or name in mentions[name]:
                        found.append(members)
    return found


def _recursive(mentions: dict[str, set[str]], order: list[str]) -> set[str]:
    """Rules on a cycle, and rules nested so deep that building them in would exhaust Python's stack."""
    found = {name for members in _cycles(mentions) for name in members}
    height: dict[str, int] = {}
    for name in order:
        height[name] = 1 + max((height.get(other, 0) for other in mentions[name] if other not in found), default=0)
        if height[name] > 12:  # cut the chain here
            found.add(name)
    return found


def _bound_repeats(item: Expression, rules: Rules) -> Expression:
    """The same with every repetition that is too long to be unrolled as calls of further ``rules``."""
    if isinstance(item, (Seq, Alt)):
        parts = tuple([_bound_repeats(part, rules) if type(part) in NESTED else part for part in item.parts])
        return item if all(map(operator.is_, parts, item.parts)) else type(item)(parts)
    if isinstance(item, Graph):
        edges = tuple((a, _bound_repeats(label, rules), b) for a, label, b in item.edges)
        return Graph(item.size, edges, item.finals, item.reads)
    if not isinstance(item, Repeat):
        return item
    inner = _bound_repeats(item.item, rules)
    count = item.low if item.high is None else item.high
    if count * expression_size(inner, {}, UNROLL) <= UNROLL:
        return Repeat(inner, item.low, item.high)
    return _in_blocks(inner, item.low, item.high, rules)


def _in_blocks(inner: Expression, low: int, high: int | None, rules: Rules) -> Expression:
    """A long repetition as calls of rules: for ``BLOCK`` items, ``BLOCK`` times as many, and so on.

    ``power(k)`` is the item ``size**k`` times, ``below(k)`` fewer than that often. A count is read by its digits, the
    largest first; on each level one stack more is alive, for the end that may come in this block.
    """
    prefix = f"repeat{len(rules)}_"
    size = max(2, min(BLOCK, UNROLL // expression_size(inner, {}, UNROLL)))
    rules[prefix + "power0"] = inner
    # built in, a block is a chain of which masks are known without following it; called, every character is a frame
    unit = inner if size * expression_size(inner, {}, UNROLL) <= BUILT_IN else Ref(prefix + "power0")

    def power(level: int) -> Expression:
        if level == 0:
            return unit
        name = f"{prefix}power{level}"
        if name not in rules:
            rules[name] = Repeat(power(level - 1), size, size)
        return Ref(name)

    def below(level: int) -> Expression:
        if level == 0:
            return EMPTY
        name = f"{prefix}below{level}"
        if name not in rules:
            rules[name] = seq(Repeat(power(level - 1), 0, size - 1), below(level - 1))
        return Ref(name)

    def digits(count: int) -> list[int]:
        found = []
        while count:
            count, digit = divmod(count, size)
            found.append(digit)
        return found

    def exactly(count: int) -> Expression:
        places = list(enumerate(digits(count)))
        return seq(*(Repeat(power(level), digit, digit) for level, digit in reversed(places) if digit))

    def at_most(count: int) -> Expression:
        level = max(len(digits(count)) - 1, 0)
        times, rest = divmod(count, size**level)
        if level == 0:
            return Repeat(unit, 0, times)
        edges = [(place, power(level), place + 1) for place in range(times)]
        edges += [(place, below(level), times + 1) for place in range(times)]
        edges.append((times, at_most(rest), times + 1))
        return Graph(times + 2, tuple(edges), frozenset({times + 1}))

    return seq(exactly(low), Repeat(unit, 0, None) if high is None else at_most(high - low))


def _productive_only(automata: dict[str, ArrayAutomaton], root: str) -> dict[str, ArrayAutomaton]:
    """Removes rules that can never be completed; every state left can reach an accepted text."""
    called = {name: automaton.called() for name, automaton in automata.items()}
    productive: set[str] = set()
    changed = True
    while changed:
        changed = False
        for name in reversed(automata):  # found from the root on: the last ones call the fewest
            if name in productive:
                continue
            automaton = automata[name]
            if not called[name] <= productive:
                automaton = trim(automaton, productive.__contains__)
            if automaton.opens:
                productive.add(name)
                changed = True
    if root not in productive:
        raise GrammarError(
            "No text at all matches this grammar.", "Some rule can never be completed, or a set is empty."
        )
    kept = {
        name: automata[name] if called[name] <= productive else trim(automata[name], productive.__contains__)
        for name in productive
    }
    reached, pending = {root}, [root]
    while pending:
        for name in kept[pending.pop()].called():
            if name not in reached:
                reached.add(name)
                pending.append(name)
    ordered = {root: kept[root]} | {name: kept[name] for name in automata if name in reached and name != root}
    return _without_left_recursion(ordered)


def _without_left_recursion(automata: dict[str, ArrayAutomaton]) -> dict[str, ArrayAutomaton]:
    """Rewrites rules that call themselves, or each other, before reading anything.

    Raises:
        GrammarError: the way round leads through a rule that matches the empty text.
    """
    nullable = _nullable(automata)
    bare = {name: {called for called, _ in a.calls_of(0)} if not a.regular else set() for name, a in automata.items()}
    hidden: dict[str, set[str]] = {}  # calls behind one that may read nothing
    for name, automaton in automata.items():
        hidden[name] = set()
        seen, pending = {0}, [0]
        while pending and not automaton.regular:
            state = pending.pop()
            for called, to in automaton.calls_of(state):
                if state:
                    hidden[name].add(called)
                if called in nullable and to not in seen:
                    seen.add(to)
                    pending.append(to)
    for members in _cycles({name: bare[name] | hidden[name] for name in automata}):
        if any(hidden[name] & members or name in nullable for name in members):
            shown = " -> ".join(sorted(members))
            raise GrammarError(
                f"The grammar is left-recursive through a rule that may be empty: {shown}.",
                "Write a list as: item (separator item)*, or leave the empty text out of these rules.",
            )
        automata = automata | {name: _by_left_corners(automata, sorted(members), name) for name in sorted(members)}
    return automata


def _by_left_corners(automata: dict[str, ArrayAutomaton], members: list[str], root: str) -> ArrayAutomaton:
    """One of some rules that start with each other, so that none does any more.

    It begins where any of them begins by reading (or calling another rule), and where one of them is finished it goes
    on in each that starts with it; ``root`` finished is the end.
    """
    builder = Builder()
    base: dict[str, int] = {}
    finals = set()
    for name in members:
        automaton = automata[name]
        base[name] = builder.state(len(automaton))
        for state in range(len(automaton)):
            here = [base[name] + state, *([0] if state == 0 else [])]  # what begins a rule begins all of them
            for source in here:
                for low, high, to in automaton.edges[state]:
                    builder.edge(source, low, high, base[name] + to)
            for called, to in automaton.calls[state]:
                builder.call(base[name] + state, called, base[name] + to)
            if automaton.finals[state] and name == root:
                finals.add(base[name] + state)
    for name in members:
        for called, to in automata[name].calls[0]:
            if called not in members:
                builder.call(0, called, base[name] + to)
                continue
            for state, final in enumerate(automata[called].finals):
                if final:
                    builder.empty(base[called] + state, base[name] + to)
    return trim(builder.determinise(-1, finals=finals))


def _nullable(automata: dict[str, ArrayAutomaton]) -> set[str]:
    """Rules that match the empty text."""
    nullable: set[str] = set()
    changed = True
    while changed:
        changed = False
        for name, automaton in automata.items():
            if name in nullable:
                continue
            if automaton.regular:
                found = bool(automaton.ends[0])
            else:
                seen, pending = {0}, [0]
                while pending:
                    for called, to in automaton.calls_of(pending.pop()):
                        if called in nullable and to not in seen:
                            seen.add(to)
                            pending.append(to)
                found = any(bool(automaton.ends[state]) for state in seen)
            if found:
                nullable.add(name)
                changed = True
    return nullable
