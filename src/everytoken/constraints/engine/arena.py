"""What all matchers of a grammar share: frames, sets of stacks, and what has been found out about them."""

from __future__ import annotations

import threading
from collections import deque
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ...core.errors import EverytokenError
from .layout import AMBIGUOUS, MAX_STACKS, rehash
from .tables import Int32s, UInt8s

Element = TypeVar("Element", bound=np.generic)
MEMO = 2048
"""Masks of states that are kept."""
RENEW_FRAMES, RENEW_STATES = 1 << 20, 1 << 15
"""New matchers get fresh buffers once the shared ones have grown to this size."""


class State:
    """A set of stacks, and what has been found out about it.

    Together, the states are a deterministic automaton that is built as texts need it.

    Attributes:
        stacks: ``(node, frame, node, frame, ...)``, sorted.
        mask: ``[W]``, the tokens that go on with the text, if known; ``restricted`` says whether any is missing.
        ending: whether the text may end here, if known.
        moves: the state after a token, for tokens that were accepted here.
    """

    __slots__ = ("ending", "mask", "moves", "restricted", "stacks")

    def __init__(self, stacks: tuple[int, ...]):
        self.stacks = stacks
        self.mask: Int32s | None = None
        self.restricted = True
        self.ending: bool | None = None
        self.moves: dict[int, State] = {}


class Arena:
    """Frames, states and buffers that all matchers of a grammar share: what one has seen, the next one knows."""

    def __init__(self, room: int = 1 << 12):
        self.frame_node, self.frame_parent = np.zeros(room, np.int32), np.zeros(room, np.int32)
        self.table = np.empty(4 * room, np.int64)
        rehash(self.table, self.frame_node, self.frame_parent, 0)
        self.stack_node, self.stack_frame = np.zeros(1 << 12, np.int32), np.zeros(1 << 12, np.int32)
        self.stack_below = np.zeros(1 << 12, np.uint8)
        self.top = 0
        self.lock = threading.RLock()
        self.states: dict[tuple[int, ...], State] = {}
        self.masked: deque[State] = deque()
        self.moves = 0

    @property
    def full(self) -> bool:
        """Whether new matchers should start with fresh buffers."""
        return self.top > RENEW_FRAMES or len(self.states) > RENEW_STATES or self.moves > 8 * RENEW_STATES

    def state(self, stacks: tuple[int, ...]) -> State:
        """The one state of these stacks."""
        found = self.states.get(stacks)
        if found is None:
            found = self.states.setdefault(stacks, State(stacks))
        return found

    def remember(self, state: State, mask: Int32s, restricted: bool) -> None:
        """Keeps a state's mask; the oldest of more than ``MEMO`` masks is dropped."""
        state.mask, state.restricted = mask, restricted
        self.masked.append(state)
        if len(self.masked) > MEMO:
            self.masked.popleft().mask = None

    def load(self, state: tuple[int, ...]) -> int:
        """Copies stacks to where the kernels work on them; returns how many they are."""
        count = len(state) // 2
        if count == 1:
            self.stack_node[0], self.stack_frame[0], self.stack_below[0] = state[0], state[1], 0
        else:
            pairs = np.array(state, np.int32).reshape(-1, 2)
            self.stack_node[:count], self.stack_frame[:count], self.stack_below[:count] = pairs[:, 0], pairs[:, 1], 0
        return count

    def ensure(self) -> None:
        """Makes room for a token's frames, as a rule."""
        if self.top + 1024 > len(self.frame_node):
            self.grow()

    def grow(self, code: int = 0) -> None:
        """Twice the room for frames and stacks; ``code`` is the kernel's reason.

        Raises:
            EverytokenError: the state set has grown beyond any use.
        """
        if code == AMBIGUOUS:
            raise too_ambiguous()
        self.frame_node, self.frame_parent = _doubled(self.frame_node), _doubled(self.frame_parent)
        self.table = np.full(4 * len(self.frame_node), -1, np.int64)
        rehash(self.table, self.frame_node, self.frame_parent, self.top)
        self.stack_node, self.stack_frame = _doubled(self.stack_node), _doubled(self.stack_frame)
        self.stack_below = _doubled(self.stack_below)

    @property
    def frames(self) -> tuple[Int32s, Int32s, int]:
        return self.frame_node, self.frame_parent, self.top

    @property
    def stacks(self) -> tuple[Int32s, Int32s, UInt8s]:
        return self.stack_node, self.stack_frame, self.stack_below


def _doubled(array: NDArray[Element]) -> NDArray[Element]:
    return np.concatenate([array, np.zeros_like(array)])


def too_ambiguous() -> EverytokenError:
    """The error of a grammar with too many parses alive."""
    return EverytokenError(
        f"The grammar is so ambiguous here that more than {MAX_STACKS:,} parses are alive.",
        "Make repeated alternatives distinct, or replace nested repetitions such as (a* b*)*.",
    )
