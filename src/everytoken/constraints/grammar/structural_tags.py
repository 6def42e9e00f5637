"""Structural tags: free text until a trigger, then a grammar, then free text again (tool calls in chat formats).

The free part is the Aho-Corasick automaton of the triggers: it follows any text and notices, byte by byte, when one
of them
has just been completed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from .expressions import Bytes, ByteSet, Expression, GrammarError, Graph, Seq, alt, invert_ranges, merge_ranges


def aho_corasick(words: Sequence[bytes]) -> tuple[list[dict[int, int]], dict[int, bytes]]:
    """``(goto, completed)``: full transitions but those to the start state, and the word completed on entering a
    state."""
    goto: list[dict[int, int]] = [{}]
    completed: dict[int, bytes] = {}
    for word in words:
        state = 0
        for byte in word:
            if byte not in goto[state]:
                goto.append({})
                goto[state][byte] = len(goto) - 1
            state = goto[state][byte]
        completed[state] = word
    fail = [0] * len(goto)
    queue = deque(goto[0].values())
    while queue:
        state = queue.popleft()
        if state not in completed and fail[state] in completed:
            completed[state] = completed[fail[state]]
        for byte, child in list(goto[state].items()):
            fail[child] = goto[fail[state]].get(byte, 0)
            queue.append(child)
        for byte, to in goto[fail[state]].items():
            goto[state].setdefault(byte, to)
    return goto, completed


def structural_expression(
    triggers: Sequence[str],
    bodies: Sequence[tuple[str, Expression, str]],
    at_least_one: bool = False,
    stop_after_first: bool = False,
) -> Expression:
    """Free text with tags, as an expression; ``bodies`` are ``(begin, expression, end)``.

    Raises:
        GrammarError: no tags or triggers, an empty trigger, one trigger inside another, a begin that no trigger starts,
            a trigger that starts no begin.
    """
    if not bodies or not triggers:
        raise GrammarError(
            "Structural tags need at least one tag and one trigger.", "Give StructuralTag(begin, schema, end)."
        )
    words = [trigger.encode("utf-8") for trigger in triggers]
    if not all(words):
        raise GrammarError("A trigger is empty.", "A trigger is the text that announces a tag, such as '<tool'.")
    for word in words:
        if any(word != other and word in other for other in words) or words.count(word) > 1:
            raise GrammarError(f"The trigger {word.decode()!r} is part of another one.", "Keep the shorter of the two.")
    goto, completed = aho_corasick(words)
    plain = [state for state in range(len(goto)) if state not in completed]
    number = {state: index for index, state in enumerate(plain)}
    after = len(plain)  # where a tag ends, when free text must not follow
    edges: list[tuple[int, Expression, int]] = []
    for state in plain:
        taken = [(byte, byte) for byte in goto[state]]
        edges.append((number[state], ByteSet(invert_ranges(merge_ranges(taken), 255)), 0))
        by_target: dict[int, list[int]] = {}
        for byte, to in goto[state].items():
            by_target.setdefault(to, []).append(byte)
        for to, some in by_target.items():
            step = ByteSet(merge_ranges((byte, byte) for byte in some))
            if to not in completed:
                edges.append((number[state], step, number[to]))
                continue
            trigger = completed[to]
            options = [
                Seq((Bytes(begin.encode("utf-8")[len(trigger) :]), body, Bytes(end.encode("utf-8"))))
                for begin, body, end in bodies
                if begin.encode("utf-8").startswith(trigger)
            ]
            if not options:
                raise GrammarError(
                    f"The trigger {trigger.decode()!r} starts no tag.",
                    "Every trigger must be the start of some tag's begin.",
                )
            edges.append((number[state], Seq((step, alt(*options))), after))
    for begin, _, _ in bodies:
        if not any(begin.encode("utf-8").startswith(word) for word in words):
            raise GrammarError(
                f"No trigger starts the tag {begin!r}.", "Add a trigger: the first characters of the tag."
            )
    # with at_least_one the text before the first tag may not be the whole; a copy of the free part follows the tag
    if stop_after_first:
        finals = {after} if at_least_one else {after, *number.values()}
        return Graph(len(plain) + 1, tuple(edges), frozenset(finals))
    if not at_least_one:
        looped = tuple((source, label, 0 if target == after else target) for source, label, target in edges)
        return Graph(len(plain), looped, frozenset(number.values()))
    shift = len(plain)
    second = tuple(
        (source + shift, label, shift if target == after else target + shift) for source, label, target in edges
    )
    first = tuple((source, label, shift if target == after else target) for source, label, target in edges)
    return Graph(2 * len(plain), first + second, frozenset(value + shift for value in number.values()))
