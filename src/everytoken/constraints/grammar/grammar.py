"""A grammar: named rules and the one to start from, made from EBNF, a regular expression, a JSON Schema, tags or choices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .automata import Automaton, build, trim
from .ebnf import parse_ebnf
from .expressions import Alt, Bytes, GrammarError, Graph, Ref, Repeat, Seq, alt, expression_size, references, seq
from .regex import regex_automaton
from .structural_tags import StructuralTag, structural_expression

INLINE_ONCE, INLINE_ALWAYS = 2_000, 16
"""Rules up to these sizes are built into the rules that mention them: those mentioned once, and all."""


@dataclass
class Grammar:
    """Rules by name, and the name of the root.

    Grammars are data: combine them with ``union`` and ``concat``, compile them with ``GrammarCompiler``.
    """

    rules: dict[str, Any]
    root: str = "root"

    # -- ways to make one ------------------------------------------------------------------------------------------------
    @classmethod
    def from_ebnf(cls, source: str, root_rule_name: str = "root") -> Grammar:
        """From EBNF text (see ``grammar.ebnf``).

        Raises:
            GrammarError: with line and column.
        """
        return cls(parse_ebnf(source, root_rule_name), root_rule_name)

    @classmethod
    def from_regex(cls, pattern: str, search: bool = False) -> Grammar:
        """Texts that the pattern matches as a whole, or (``search``) contain a match of it.

        Raises:
            GrammarError: with the position in the pattern.
        """
        return cls({"root": regex_automaton(pattern, search)})

    @classmethod
    def from_choices(cls, choices: Sequence[str]) -> Grammar:
        """One of these texts.

        Raises:
            GrammarError: the list is empty.
        """
        if not choices:
            raise GrammarError("The list of choices is empty.", "Give at least one text.")
        return cls({"root": alt(*(Bytes(choice.encode("utf-8")) for choice in choices))})

    @classmethod
    def from_json_schema(cls, schema: Any, **options: Any) -> Grammar:
        """JSON documents that a schema allows; options as for ``schema_sets.SchemaOptions``.

        Args:
            schema: a dict, a bool, or JSON text.

        Raises:
            GrammarError: an invalid, unsatisfiable or (unless ``strict=False``) unsupported schema, with a JSON pointer.
        """
        from .json_schema import schema_rules

        return cls(schema_rules(schema, **options))

    @classmethod
    def builtin_json_grammar(cls, **options: Any) -> Grammar:
        """Any JSON value; whitespace options as for ``from_json_schema``."""
        return cls.from_json_schema(True, **options)

    @classmethod
    def from_structural_tag(
        cls,
        tags: Sequence[StructuralTag],
        triggers: Sequence[str],
        at_least_one: bool = False,
        stop_after_first: bool = False,
        **options: Any,
    ) -> Grammar:
        """Free text in which every trigger starts one of the tags; see ``grammar.structural_tags``.

        Args:
            at_least_one: the text must contain a tag.
            stop_after_first: nothing may follow the first tag.
            options: for the tags' JSON schemas.
        """
        rules: dict[str, Any] = {}
        bodies = []
        for index, tag in enumerate(tags):
            content = tag.content if isinstance(tag.content, Grammar) else cls.from_json_schema(tag.content, **options)
            root = _adopt(rules, content, f"tag{index}_")
            bodies.append((tag.begin, Ref(root), tag.end))
        rules["root"] = structural_expression(triggers, bodies, at_least_one, stop_after_first)
        return cls(rules)

    @staticmethod
    def union(*grammars: Grammar) -> Grammar:
        """Texts of any of the grammars."""
        return _joined(alt, grammars)

    @staticmethod
    def concat(*grammars: Grammar) -> Grammar:
        """A text of the first, then one of the second, and so on."""
        return _joined(seq, grammars)


def _adopt(rules: dict[str, Any], grammar: Grammar, prefix: str) -> str:
    """Copies a grammar's rules under a prefix; returns the new name of its root."""
    names = {name: prefix + name for name in grammar.rules}
    for name, body in grammar.rules.items():
        rules[names[name]] = rename(body, names)
    return names[grammar.root]


def _joined(how: Callable[..., Any], grammars: Sequence[Grammar]) -> Grammar:
    if not grammars:
        raise GrammarError("There is no grammar to combine.", "Give at least one.")
    rules: dict[str, Any] = {}
    roots = [Ref(_adopt(rules, grammar, f"g{index}_")) for index, grammar in enumerate(grammars)]
    rules["root"] = how(*roots)
    return Grammar(rules)


def rename(item: Any, names: dict[str, str]) -> Any:
    """The expression with its references renamed."""
    if isinstance(item, Ref):
        return Ref(names[item.name])
    if isinstance(item, (Seq, Alt)):
        return type(item)(tuple(rename(part, names) for part in item.parts))
    if isinstance(item, Repeat):
        return Repeat(rename(item.item, names), item.low, item.high)
    if isinstance(item, Graph):
        return Graph(item.size, tuple((a, rename(label, names), b) for a, label, b in item.edges), item.finals)
    return item


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

    def inline(name: str) -> Any | None:
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


def _bottom_up(rules: dict[str, Any]) -> list[str]:
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


def _recursive(rules: dict[str, Any]) -> set[str]:
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


UNROLL = 800_000
"""A bounded repetition is unrolled up to so many states; beyond, it becomes rules that double their length."""


def _bound_repeats(item: Any, rules: dict[str, Any]) -> Any:
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

    def exactly(n: int) -> Any:
        return seq(*(power(k) for k in range(n.bit_length()) if n >> k & 1))

    def at_most(n: int) -> Any:
        """Up to n times, every count in one way only: below the top bit any bits, or the top bit and at most the rest."""
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
                        "Write a list as: item (separator item)*. Only direct left recursion (a ::= a x | y) is rewritten for you.",
                    )
                if other not in state:
                    state[other] = 1
                    stack.append((other, iter(first[other])))
                    break
            else:
                state[name] = 2
                stack.pop()
