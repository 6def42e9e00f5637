"""The action tree drawn: what was done, what failed, what was left, in a terminal and as one piece of HTML."""

from __future__ import annotations

from html import escape

from .action_tree import ActionTree, Node

STATES = {"visited": ("+", "#007a5a"), "failed": ("x", "#b3003c"), "left": ("-", "#5b6770"), "chosen": ("*", "#0072b2")}
"""State -> mark and colour."""


def state_of(node: Node, chosen: set[int]) -> str:
    """``chosen`` (on the path at the end), ``visited``, ``failed`` or ``left``."""
    if id(node) in chosen:
        return "chosen"
    if node.visited:
        return "visited"
    return "left" if node.valid else "failed"


def chosen_nodes(tree: ActionTree, actions: list[str]) -> set[int]:
    """The nodes on a path from the root."""
    found, node = set(), tree.root
    for action in actions:
        if action not in node.children:
            break
        node = node.children[action]
        found.add(id(node))
    return found


def rows(tree: ActionTree, actions: list[str]) -> list[tuple[int, str, str, int]]:
    """``(depth, action, state, plans)`` of every node below the root, parents first."""
    chosen = chosen_nodes(tree, actions)
    return [
        (len(node.path()), node.action, state_of(node, chosen), node.count)
        for node in tree.nodes()
        if node.parent is not None
    ]


def tree_text(tree: ActionTree, actions: list[str]) -> str:
    """One line a node, indented: a mark, the action and how many plans pass."""
    lines = [
        f"{'  ' * (depth - 1)}{STATES[state][0]} {text} ({count})" for depth, text, state, count in rows(tree, actions)
    ]
    return "\n".join(["* chosen  + done and left again  x failed  - not tried", *lines])


def tree_picture(tree: ActionTree, actions: list[str], title: str) -> str:
    """As HTML with inline styles; every text is escaped."""
    items = [
        f'<div style="margin-left:{1.4 * (depth - 1):.1f}rem;border-left:4px solid {STATES[state][1]};'
        'padding-left:.4rem">'
        f"{escape(text)} <small>{state}, {count} of {len(tree.plans)} plans</small></div>"
        for depth, text, state, count in rows(tree, actions)
    ]
    return f"<section><h3>{escape(title)}</h3>{''.join(items)}</section>"
