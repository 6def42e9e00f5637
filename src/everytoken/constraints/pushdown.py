"""A grammar as the tables that the kernels run: one pushdown automaton over bytes."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..core.errors import BadInputError
from .grammar.grammar import Grammar, rule_automata

_FIELDS = (
    "edge_ptr", "edge_lo", "edge_hi", "edge_to", "call_ptr", "call_start", "call_to", "final", "node_rule", "follow_ptr",
    "follow_to", "plain", "wide", "run",
)  # fmt: skip
_TYPES = (
    np.int32, np.uint8, np.uint8, np.int32, np.int32, np.int32, np.int32, np.uint8, np.int32, np.int32, np.int32, np.uint64, np.bool_, np.int32,
)  # fmt: skip
BOTTOM = -1
"""In place of a node to return to: nothing is below, the text ends here."""


@dataclass
class Pushdown:
    """All rules' automata in one numbering; node 0 starts the root rule.

    Attributes:
        tables: ``(edge_ptr, edge_lo, edge_hi, edge_to, call_ptr, call_start, call_to, final, node_rule, follow_ptr,
            follow_to, plain, wide, run)``. Edges and calls of node n lie at ``ptr[n] .. ptr[n + 1]``; a call's ``call_to`` is -1 where
            nothing is left to do on return (a tail call); ``follow`` lists the nodes at which the text can go on after a rule;
            ``plain``, ``wide`` and ``run`` tell what goes on in the same way for a while (see ``kernels.steady_runs``).
        rules: names, by number.
    """

    tables: tuple[np.ndarray, ...]
    rules: list[str]

    @property
    def size(self) -> int:
        return len(self.tables[7])  # final

    @classmethod
    def from_grammar(cls, grammar: Grammar) -> Pushdown:
        """Compiles; see ``rule_automata`` for what it raises."""
        from .kernels import steady_runs

        automata = rule_automata(grammar)
        starts, total = {}, 0
        for name, automaton in automata.items():
            starts[name] = total
            total += len(automaton)
        names = list(automata)
        edge_ptr, call_ptr = np.zeros(total + 1, np.int32), np.zeros(total + 1, np.int32)
        final, node_rule = np.zeros(total, np.uint8), np.zeros(total, np.int32)
        edges: list[tuple[int, int, int]] = []
        calls: list[tuple[int, int]] = []
        following: dict[str, dict[int, None]] = {name: {} for name in names}
        node = 0
        for number, (name, automaton) in enumerate(automata.items()):
            base = starts[name]
            for state in range(len(automaton)):
                edges += [(low, high, base + to) for low, high, to in automaton.edges[state]]
                for called, to in automaton.calls[state]:
                    bare = automaton.finals[to] and not automaton.edges[to] and not automaton.calls[to]
                    calls.append((starts[called], -1 if bare else base + to))
                    following[called][base + to] = None
                node += 1
                edge_ptr[node], call_ptr[node] = len(edges), len(calls)
                final[node - 1], node_rule[node - 1] = automaton.finals[state], number
        table = np.array(edges, np.int64).reshape(-1, 3)
        links = np.array(calls, np.int32).reshape(-1, 2)
        follow_ptr = np.cumsum([0, *(len(following[name]) for name in names)]).astype(np.int32)
        follow_to = np.array([node for name in names for node in following[name]], np.int32)
        lows, highs, targets = table[:, 0].astype(np.uint8), table[:, 1].astype(np.uint8), table[:, 2].astype(np.int32)
        plain, wide, run = np.zeros((total, 4), np.uint64), np.zeros(total, np.bool_), np.zeros(total, np.int32)
        steady_runs(edge_ptr, lows, highs, targets, plain, wide, run)
        tables = (
            edge_ptr, lows, highs, targets, call_ptr,
            np.ascontiguousarray(links[:, 0]), np.ascontiguousarray(links[:, 1]), final, node_rule, follow_ptr, follow_to, plain,
            wide, run,
        )  # fmt: skip
        return cls(tables, names)

    def returns(self, node: int) -> list[int]:
        """The nodes that the frame right below a stack's node can return to (BOTTOM: there may be none)."""
        return self._returns[int(self.tables[8][node])]

    @cached_property
    def _returns(self) -> list[list[int]]:
        _, _, _, _, call_ptr, call_start, call_to, _, node_rule, *_ = self.tables
        found: list[dict[int, None]] = [{} for _ in self.rules]
        found[node_rule[0]][BOTTOM] = None
        tails: dict[tuple[int, int], None] = {}
        callers = np.repeat(node_rule, np.diff(call_ptr)).tolist()
        for caller, called, to in zip(callers, node_rule[call_start].tolist(), call_to.tolist(), strict=True):
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
        packed = {
            name: base64.b64encode(array.tobytes()).decode() for name, array in zip(_FIELDS, self.tables, strict=True)
        }
        return json.dumps({"everytoken_pushdown": 1, "rules": self.rules, **packed})

    @classmethod
    def deserialise(cls, data: Any) -> Pushdown:
        """From what ``serialise`` gave.

        Raises:
            BadInputError: it is not that, or damaged.
        """
        try:
            content = json.loads(data)
            if content["everytoken_pushdown"] != 1:
                raise ValueError("another version")
            arrays: list[np.ndarray] = [
                np.frombuffer(base64.b64decode(content[name], validate=True), kind).copy()
                for name, kind in zip(_FIELDS, _TYPES, strict=True)
            ]
            arrays[-3] = arrays[-3].reshape(-1, 4)
            result = cls(tuple(arrays), list(content["rules"]))
            result.check()
            return result
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise BadInputError(
                f"This is no serialised grammar, or it is damaged: {error}", "Compile the grammar again."
            ) from error

    def check(self) -> None:
        """Raises ValueError unless all tables fit together (the kernels do not check bounds)."""
        (
            edge_ptr,
            edge_lo,
            edge_hi,
            edge_to,
            call_ptr,
            call_start,
            call_to,
            _,
            node_rule,
            follow_ptr,
            follow_to,
            plain,
            wide,
            run,
        ) = self.tables
        size = self.size
        sound = (
            size > 0
            and len(edge_ptr) == len(call_ptr) == size + 1
            and len(node_rule) == len(plain) == len(wide) == len(run) == size
            and len(follow_ptr) == len(self.rules) + 1
            and all(
                pointer[0] == 0 and (np.diff(pointer) >= 0).all() and pointer[-1] == len(target) and len(other) == len(target)
                for pointer, target, other in (
                    (edge_ptr, edge_to, edge_lo), (edge_ptr, edge_to, edge_hi), (call_ptr, call_to, call_start),
                    (follow_ptr, follow_to, follow_to),
                )
            )
            and all(((low <= a) & (a < size)).all() for a, low in ((edge_to, 0), (call_start, 0), (call_to, -1), (follow_to, 0)))
            and ((node_rule >= 0) & (node_rule < len(self.rules))).all()
        )  # fmt: skip
        if not sound:
            raise ValueError("its tables do not fit together")
