"""A grammar as the tables that the kernels run: one pushdown automaton over bytes."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ...core.errors import BadInputError
from ..grammar.automata import ArrayAutomaton, Automaton
from ..grammar.grammar import Grammar
from ..grammar.rule_automata import rule_automata
from .tables import BOTTOM, TABLE_TYPES, Int64s, Tables


def _edges(automaton: Automaton, base: int) -> tuple[Int64s, Int64s]:
    """``(counts, edges)``: how many edges each state has, and ``[E, 3]`` ``(low, high, target)``."""
    if isinstance(automaton, ArrayAutomaton):
        return np.diff(automaton.ptr), np.stack([automaton.low, automaton.high, automaton.to + base], 1)
    counts = np.array([len(edges) for edges in automaton.edges], np.int64)
    table = np.array([edge for edges in automaton.edges for edge in edges], np.int64).reshape(-1, 3)
    table[:, 2] += base
    return counts, table


@dataclass
class Pushdown:
    """All rules' automata in one numbering; node 0 starts the root rule.

    Attributes:
        tables: the automaton as arrays.
        rules: names, by number.
    """

    tables: Tables
    rules: list[str]

    @property
    def size(self) -> int:
        """How many nodes there are."""
        return len(self.tables.final)

    @classmethod
    def from_grammar(cls, grammar: Grammar) -> Pushdown:
        """Compiles; see ``rule_automata`` for what it raises."""
        from .analysis import steady_runs

        automata = rule_automata(grammar)
        starts, total = {}, 0
        for name, automaton in automata.items():
            starts[name] = total
            total += len(automaton)
        names = list(automata)
        tables_of = [_edges(automaton, starts[name]) for name, automaton in automata.items()]
        edge_ptr = np.concatenate([[0], np.cumsum(np.concatenate([counts for counts, _ in tables_of]))]).astype(
            np.int32
        )
        table = np.concatenate([edges for _, edges in tables_of])
        call_ptr = np.zeros(total + 1, np.int32)
        final, node_rule = np.zeros(total, np.uint8), np.zeros(total, np.int32)
        calls: list[tuple[int, int]] = []
        following: dict[str, dict[int, None]] = {name: {} for name in names}
        for number, (name, automaton) in enumerate(automata.items()):
            base = starts[name]
            node_rule[base : base + len(automaton)] = number
            if isinstance(automaton, ArrayAutomaton):
                final[base : base + len(automaton)] = automaton.ends
                call_ptr[base + 1 : base + len(automaton) + 1] = len(calls)
                continue
            final[base : base + len(automaton)] = automaton.finals
            for state, called_here in enumerate(automaton.calls):
                for called, to in called_here:
                    bare = automaton.finals[to] and not automaton.edges[to] and not automaton.calls[to]
                    calls.append((starts[called], -1 if bare else base + to))
                    following[called][base + to] = None
                call_ptr[base + state + 1] = len(calls)
        links = np.array(calls, np.int32).reshape(-1, 2)
        lows, highs, targets = table[:, 0].astype(np.uint8), table[:, 1].astype(np.uint8), table[:, 2].astype(np.int32)
        plain, wide, run = np.zeros((total, 4), np.uint64), np.zeros(total, np.bool_), np.zeros(total, np.int32)
        steady_runs(edge_ptr, lows, highs, targets, plain, wide, run)
        tables = Tables(
            edge_ptr=edge_ptr,
            edge_lo=lows,
            edge_hi=highs,
            edge_to=targets,
            call_ptr=call_ptr,
            call_start=np.ascontiguousarray(links[:, 0]),
            call_to=np.ascontiguousarray(links[:, 1]),
            final=final,
            node_rule=node_rule,
            follow_ptr=np.cumsum([0, *(len(following[name]) for name in names)]).astype(np.int32),
            follow_to=np.array([node for name in names for node in following[name]], np.int32),
            plain=plain,
            wide=wide,
            run=run,
        )
        return cls(tables, names)

    def returns(self, node: int) -> list[int]:
        """The nodes that the frame right below a stack's node can return to (BOTTOM: there may be none)."""
        return self._returns[int(self.tables.node_rule[node])]

    @cached_property
    def _returns(self) -> list[list[int]]:
        tables, node_rule = self.tables, self.tables.node_rule
        found: list[dict[int, None]] = [{} for _ in self.rules]
        found[node_rule[0]][BOTTOM] = None
        tails: dict[tuple[int, int], None] = {}
        callers = np.repeat(node_rule, np.diff(tables.call_ptr)).tolist()
        rules_called = node_rule[tables.call_start].tolist()
        for caller, called, to in zip(callers, rules_called, tables.call_to.tolist(), strict=True):
            if to >= 0:
                found[called][to] = None
            elif caller != called:
                tails[caller, called] = None
        changed = True
        while changed:  # a tail call returns to wherever its caller does
            changed = False
            for caller, called in tails:
                size = len(found[called])
                found[called] |= found[caller]
                changed = changed or len(found[called]) > size
        return [list(sites) for sites in found]

    def serialise(self) -> str:
        """As JSON text."""
        packed = {name: base64.b64encode(array.tobytes()).decode() for name, array in self.tables._asdict().items()}
        return json.dumps({"everytoken_pushdown": 1, "rules": self.rules, **packed})

    @classmethod
    def deserialise(cls, data: str) -> Pushdown:
        """From what ``serialise`` gave.

        Raises:
            BadInputError: it is not that, or damaged.
        """
        try:
            content = json.loads(data)
            if content["everytoken_pushdown"] != 1:
                raise ValueError("another version")
            arrays: dict[str, np.ndarray] = {
                name: np.frombuffer(base64.b64decode(content[name], validate=True), kind).copy()
                for name, kind in TABLE_TYPES.items()
            }
            arrays["plain"] = arrays["plain"].reshape(-1, 4)
            result = cls(Tables(**arrays), list(content["rules"]))
            result.check()
            return result
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise BadInputError(
                f"This is no serialised grammar, or it is damaged: {error}", "Compile the grammar again."
            ) from error

    def check(self) -> None:
        """Raises ValueError unless all tables fit together (the kernels do not check bounds)."""
        tables, size = self.tables, self.size
        pointers = (
            (tables.edge_ptr, tables.edge_to, tables.edge_lo),
            (tables.edge_ptr, tables.edge_to, tables.edge_hi),
            (tables.call_ptr, tables.call_to, tables.call_start),
            (tables.follow_ptr, tables.follow_to, tables.follow_to),
        )
        nodes = ((tables.edge_to, 0), (tables.call_start, 0), (tables.call_to, -1), (tables.follow_to, 0))
        node_rule = tables.node_rule
        sound = (
            size > 0
            and len(tables.edge_ptr) == len(tables.call_ptr) == size + 1
            and len(node_rule) == len(tables.plain) == len(tables.wide) == len(tables.run) == size
            and len(tables.follow_ptr) == len(self.rules) + 1
            and all(
                pointer[0] == 0
                and (np.diff(pointer) >= 0).all()
                and pointer[-1] == len(target)
                and len(other) == len(target)
                for pointer, target, other in pointers
            )
            and all(((low <= array) & (array < size)).all() for array, low in nodes)
            and ((node_rule >= 0) & (node_rule < len(self.rules))).all()
        )
        if not sound:
            raise ValueError("its tables do not fit together")
