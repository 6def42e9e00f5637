"""The engine in plain Python: what the kernels compute, without what makes them fast. It is their oracle in the tests.

A stack is a tuple of nodes: where the text stands in the innermost rule, then where each calling rule goes on. A
state is the set
of all stacks that the text so far allows.

    close(S)      S, and what is reached without reading: a call pushes the called rule's first node, a finished rule
    pops
    read(S, b)    the stacks after byte b: one edge from each closed stack
    allowed(S)    the tokens all of whose bytes can be read

No tries, no shared frames, no masks kept, no tokens settled ahead: every token is run by itself.
"""

from __future__ import annotations

from collections.abc import Iterable

from .pushdown import Pushdown
from .tables import Tables
from .vocabulary import TokenizerInfo

Stack = tuple[int, ...]
State = frozenset[Stack]
START: State = frozenset({(0,)})


def close(tables: Tables, stacks: Iterable[Stack]) -> State:
    """The stacks, and all that they reach without reading."""
    found = set(stacks)
    pending = list(found)
    while pending:
        node, *below = pending.pop()
        reached = []
        for call in range(tables.call_ptr[node], tables.call_ptr[node + 1]):
            back = [int(tables.call_to[call])] if tables.call_to[call] >= 0 else []  # a tail call leaves nothing to do
            reached.append((int(tables.call_start[call]), *back, *below))
        if tables.final[node] and below:
            reached.append(tuple(below))
        for stack in reached:
            if stack not in found:
                found.add(stack)
                pending.append(stack)
    return frozenset(found)


def read(tables: Tables, state: State, data: Iterable[int]) -> State:
    """The state after some bytes; empty if they cannot be read."""
    for byte in data:
        state = frozenset(
            (int(tables.edge_to[edge]), *below)
            for node, *below in close(tables, state)
            for edge in range(tables.edge_ptr[node], tables.edge_ptr[node + 1])
            if tables.edge_lo[edge] <= byte <= tables.edge_hi[edge]
        )
    return state


def can_end(tables: Tables, state: State) -> bool:
    """Whether the text may end: some stack has nothing below, and its rule is finished."""
    return any(len(stack) == 1 and tables.final[stack[0]] for stack in close(tables, state))


def next_bytes(tables: Tables, state: State) -> set[int]:
    """All bytes that can be read next."""
    return {
        byte
        for node, *_ in close(tables, state)
        for edge in range(tables.edge_ptr[node], tables.edge_ptr[node + 1])
        for byte in range(tables.edge_lo[edge], int(tables.edge_hi[edge]) + 1)
    }


class ReferenceMatcher:
    """Follows one text, as ``GrammarMatcher`` does.

    Args:
        pushdown: the compiled grammar.
        info: the vocabulary; its stop tokens end the text.
    """

    def __init__(self, pushdown: Pushdown, info: TokenizerInfo):
        self.tables, self.info = pushdown.tables, info
        self.history: list[tuple[State, bool]] = [(START, False)]

    @property
    def state(self) -> State:
        return self.history[-1][0]

    def is_terminated(self) -> bool:
        """Whether a stop token was accepted."""
        return self.history[-1][1]

    def can_end(self) -> bool:
        """Whether the text so far is a complete one."""
        return can_end(self.tables, self.state)

    def accepts(self, token_id: int) -> bool:
        """Whether a token may come next."""
        if self.is_terminated() or not 0 <= token_id < self.info.vocab_size:
            return False
        if token_id in self.info.stop_token_ids:
            return self.can_end()
        token = self.info.vocabulary[token_id] if token_id < len(self.info.vocabulary) else None
        return bool(token) and bool(read(self.tables, self.state, token or b""))

    def allowed_tokens(self) -> list[int]:
        """Ids of the tokens that may come next."""
        return [token_id for token_id in range(self.info.vocab_size) if self.accepts(token_id)]

    def accept_token(self, token_id: int) -> bool:
        """Moves on; False (and no change) if the token is not allowed."""
        if not self.accepts(token_id):
            return False
        if token_id in self.info.stop_token_ids:
            self.history.append((self.state, True))
        else:
            self.history.append((read(self.tables, self.state, self.info.vocabulary[token_id] or b""), False))
        return True

    def accept_string(self, text: bytes) -> bool:
        """Moves over a text in one step; False (and no change) if it is not allowed."""
        if not text:
            return True
        following = read(self.tables, self.state, text) if not self.is_terminated() else frozenset()
        if following:
            self.history.append((following, False))
        return bool(following)

    def rollback(self, num_tokens: int = 1) -> None:
        """Takes back the last steps."""
        del self.history[len(self.history) - num_tokens :]

    def fork(self) -> ReferenceMatcher:
        """An independent matcher in the same state."""
        other = object.__new__(ReferenceMatcher)
        other.tables, other.info, other.history = self.tables, self.info, list(self.history)
        return other

    def longest_prefix(self, text: bytes) -> int:
        """How many bytes of a text could be accepted from here."""
        if self.is_terminated():
            return 0
        return next(
            (size for size in range(len(text)) if not read(self.tables, self.state, text[: size + 1])), len(text)
        )

    def find_jump_forward_string(self) -> str:
        """The text that must come next because nothing else is possible."""
        state, output = self.state, bytearray()
        while not self.is_terminated() and len(output) < 4096 and not can_end(self.tables, state):
            options = next_bytes(self.tables, state)
            if len(options) != 1:
                break
            output += bytes(options)
            state = read(self.tables, state, options)
        try:
            return output.decode("utf-8")
        except UnicodeDecodeError as error:  # up to the last whole character; nothing if the text stands inside one
            return output[: error.start].decode("utf-8") if error.reason == "unexpected end of data" else ""
