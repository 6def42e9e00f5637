"""From a grammar's rules to one automaton a rule: what is built in, unrolled, dropped and refused on the way."""

from __future__ import annotations

from .automata import Automaton, build, trim
from .expressions import (
    Alt,
    Expression,
    GrammarError,
    Graph,
    Ref,
    Repeat,
    Rules,
    Seq,
    alt,
    expression_size,
    references,
    seq,
)
from .grammar import Grammar

INLINE_ONCE, INLINE_ALWAYS = 2_000, 16
"""Rules up to these sizes are built into the rules that mention them: those mentioned once, and all."""
UNROLL = 800_000
"""A bounded repetition is unrolled up to so many states; beyond, it becomes rules that double their length."""


def rule_automata(grammar: Grammar) -> dict[str, Automaton]:
    """One automaton a rule, root first; small rules are built in, useless ones dropped.

    Raises:
        GrammarError: no text matches the grammar, or a rule calls itself before reading anything (left recursion).
    """
    rules = dict(grammar.rules)
    unrolled = {name: _bound_repeats(body, rules) for name, body in list(rules.items())}
    rules |= unrolled
    counts: dict[str, int] = {}
    for body in rules.values():
        for name in references(body):
            counts[name] = counts.get(name, 0) + 1
    recursive = _recursive(rules)
    sizes: dict[str, int] = {}
    for name in _bottom_up(rules):
        sizes[name] = expression_size(rules[name], sizes, INLINE_ONCE + 1)
    inlined = {
        name
        for name in rules
        if name not in recursive
        and name != grammar.root
        and (sizes[name] <= INLINE_ALWAYS or (counts.get(name, 0) == 1 and sizes[name] <= INLINE_ONCE))
    }

    def inline(name: str) -> Expression | None:
        return rules[name] if name in inlined else None

    automata: dict[str, Automaton] = {}
    pending = [grammar.root]
    while pending:
        name = pending.pop()
        if name in automata:
            continue
        automata[name] = build(rules[name], inline)
        for calls in automata[name].calls:
            pending += [called for called, _ in calls]
    return _productive_only(automata, grammar.root)


def _bottom_up(rules: Rules) -> list[str]:
    """Rule names, those mentioned before those that mention them (cycles cut anywhere)."""
    order: list[str] = []
    state: dict[str, int] = {}
    for start in rules:
        stack = [(start, False)]
        while stack:
            name, done = stack.pop()
            if done:
                order.append(name)
            elif name not in state:
                state[name] = 1
                stack.append((name, True))
                stack += [(other, False) for other in set(references(rules[name])) if other not in state]
    return order


def _recursive(rules: Rules) -> set[str]:
    """Rules on a cycle, and rules nested so deep that building them in would exhaust Python's stack."""
    mentions = {name: set(references(body)) for name, body in rules.items()}
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    on_stack: set[str] = set()
    stack: list[str] = []
    found: set[str] = set()
    for start in rules:  # Tarjan, without recursion
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
                    members = []
                    while True:
                        member = stack.pop()
                        on_stack.discard(member)
                        members.append(member)
                        if member == name:
                            break
                    if len(members) > 1 or name in mentions[name]:
                        found.update(members)
    height: dict[str, int] = {}
    for name in _bottom_up(rules):
        height[name] = 1 + max((height.get(other, 0) for other in mentions[name] if other not in found), default=0)
        if height[name] > 12:  # cut the chain here
            found.add(name)
    return found


def _bound_repeats(item: Expression, rules: Rules) -> Expression:
    if isinstance(item, (Seq, Alt)):
        return type(item)(tuple(_bound_repeats(part, rules) for part in item.parts))
    if isinstance(item, Graph):
        return Graph(item.size, tuple((a, _bound_repeats(label, rules), b) for a, label, b in item.edges), item.finals)
    if not isinstance(item, Repeat):
        return item
    inner = _bound_repeats(item.item, rules)
    count = item.low if item.high is None else item.high
    if count * expression_size(inner, {}, UNROLL) <= UNROLL:
        return Repeat(inner, item.low, item.high)
    prefix = f"repeat{len(rules)}_"
    doubled = [prefix + "1"]  # doubled[k] is inner, 2^k times
    rules[doubled[0]] = inner

    def power(k: int) -> Ref:
        while len(doubled) <= k:
            name = f"{prefix}{1 << len(doubled)}"
            rules[name] = seq(Ref(doubled[-1]), Ref(doubled[-1]))
            doubled.append(name)
        return Ref(doubled[k])

    def exactly(n: int) -> Expression:
        return seq(*(power(k) for k in range(n.bit_length()) if n >> k & 1))

    def at_most(n: int) -> Expression:
        """Up to n times, every count in one way only: below the top bit any bits, or the top bit and at most the
        rest."""
        if n == 0:
            return seq()
        top = n.bit_length() - 1
        free = seq(*(alt(power(k), seq()) for k in reversed(range(top))))
        return alt(free, seq(power(top), at_most(n - (1 << top))))

    start = exactly(item.low)
    return seq(start, Repeat(inner, 0, None)) if item.high is None else seq(start, at_most(item.high - item.low))


def _productive_only(automata: dict[str, Automaton], root: str) -> dict[str, Automaton]:
    """Removes rules that can never be completed; every state left can reach an accepted text."""
    called = {name: {other for calls in automaton.calls for other, _ in calls} for name, automaton in automata.items()}
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
            if automaton.finals[0] or any(automaton.edges[0]) or any(automaton.calls[0]):
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
        for calls in kept[pending.pop()].calls:
            for name, _ in calls:
                if name not in reached:
                    reached.add(name)
                    pending.append(name)
    ordered = {root: kept[root]} | {name: kept[name] for name in automata if name in reached and name != root}
    _refuse_left_recursion(ordered)
    return ordered


def _refuse_left_recursion(automata: dict[str, Automaton]) -> None:
    nullable: set[str] = set()
    first: dict[str, set[str]] = {}
    changed = True
    while changed:
        changed = False
        for name, automaton in automata.items():
            seen, pending, corner = {0}, [0], set()
            while pending:
                for called, to in automaton.calls[pending.pop()]:
                    corner.add(called)
                    if called in nullable and to not in seen:
                        seen.add(to)
                        pending.append(to)
            first[name] = corner
            if name not in nullable and any(automaton.finals[state] for state in seen):
                nullable.add(name)
                changed = True
    state: dict[str, int] = {}
    for start in automata:  # depth first; a rule met again while it is open closes a cycle
        stack = [(start, iter(first[start]))] if start not in state else []
        state.setdefault(start, 1)
        while stack:
            name, following = stack[-1]
            for other in following:
                if state.get(other) == 1:
                    cycle = [item for item, _ in stack]
                    cycle = [*cycle[cycle.index(other) :], other] if other in cycle else [other]
                    raise GrammarError(
                        f"The grammar is left-recursive: {' -> '.join(cycle)} without reading anything in between.",
                        "Write a list as: item (separator item)*. Only direct left recursion (a ::= a x | y) is "
                        "rewritten for you.",
                    )
                if other not in state:
                    state[other] = 1
                    stack.append((other, iter(first[other])))
                    break
            else:
                state[name] = 2
                stack.pop()
