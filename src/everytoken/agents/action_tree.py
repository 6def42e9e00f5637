"""Plans merged by their common beginnings, and the worlds in which they are carried out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from ..core.errors import BadInputError

END = "[END]"
"""The last action of every plan."""


class Outcome(NamedTuple):
    """What came of an action: whether it could be done, and what the world says."""

    ok: bool
    message: str = ""


class World(Protocol):
    """What a planner acts in."""

    def observe(self) -> str:
        """What can be seen now."""

    def step(self, action: str) -> Outcome:
        """Does an action; one that fails changes nothing."""

    def snapshot(self) -> Any:
        """The state, so that ``restore`` brings it back."""

    def restore(self, snapshot: Any) -> None:
        """Goes back to a state."""

    def goal_met(self) -> bool:
        """Whether the task is done."""

    def actions(self) -> list[str]:
        """The actions that can be done now; empty where the world does not say."""


@dataclass(eq=False)
class Node:
    """An action after those of its parents.

    Attributes:
        action: its text; empty at the root.
        plans: indices of the plans that pass through it.
        valid: whether it may still be tried.
        visited: whether it was done.
        children: next actions in the order in which plans first have them.
    """

    action: str
    parent: Node | None = None
    plans: list[int] = field(default_factory=list)
    valid: bool = True
    visited: bool = False
    children: dict[str, Node] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many plans pass through it."""
        return len(self.plans)

    def options(self) -> list[Node]:
        """The children that may still be tried."""
        return [child for child in self.children.values() if child.valid]

    def path(self) -> list[str]:
        """The actions from the root to here."""
        actions: list[str] = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            actions.append(node.action)
            node = node.parent
        return actions[::-1]

    def walk(self) -> Iterator[Node]:
        """This node and all below it, parents first."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            yield node
            waiting += reversed(node.children.values())


@dataclass
class ActionTree:
    """A trie of plans by the exact text of their actions.

    Attributes:
        root: before any action.
        plans: as they were merged.
    """

    root: Node
    plans: list[tuple[str, ...]]

    @classmethod
    def from_plans(cls, plans: Sequence[Sequence[str]]) -> ActionTree:
        """Merges plans; each gets an end mark, which is a child like any other.

        Raises:
            BadInputError: no plan, or an action that is empty or the end mark.
        """
        if not plans:
            raise BadInputError("An action tree needs one plan at least.")
        root = Node("")
        for number, plan in enumerate(plans):
            if any(not action.strip() or action == END for action in plan):
                raise BadInputError(f"Plan {number} has an action that is empty or {END}.")
            node = root
            node.plans.append(number)
            for action in (*plan, END):
                node = node.children.setdefault(action, Node(action, node))
                node.plans.append(number)
        return cls(root, [tuple(plan) for plan in plans])

    def nodes(self) -> list[Node]:
        """All nodes, the root first."""
        return list(self.root.walk())

    def leaf_depths(self) -> list[int]:
        """How many actions lead to each end, the end mark among them."""
        return [len(node.path()) for node in self.nodes() if not node.children]

    def branching_depths(self) -> list[int]:
        """At which depths there is something to decide."""
        return [len(node.path()) for node in self.nodes() if len(node.children) > 1]
