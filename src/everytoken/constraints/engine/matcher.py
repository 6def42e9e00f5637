"""Matchers follow texts under a compiled grammar (the algorithm of ``constraints.xgrammar``, which see).

::

    info = TokenizerInfo.from_huggingface(tokenizer, model.config.vocab_size)
    compiled = GrammarCompiler(info).compile_json_schema(schema)
    matcher = GrammarMatcher(compiled)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ...core.errors import BadInputError
from .arena import State
from .compiled import CompiledGrammar
from .run import advance, forced, survives
from .tables import Int32s, Int64s, UInt8s

if TYPE_CHECKING:
    import torch

_BIT = np.left_shift(np.uint32(1), np.arange(32, dtype=np.uint32)).view(np.int32)
_INT32 = np.dtype(np.int32)
_NO_BYTES = np.zeros(0, np.uint8)


class _Step:
    """One accepted token: the state after it, and the step before."""

    __slots__ = ("previous", "state", "stopped")

    def __init__(self, state: State, stopped: bool, previous: _Step | None):
        self.state, self.stopped, self.previous = state, stopped, previous


class GrammarMatcher:
    """Follows one text under a grammar (a ``Matcher``).

    Args:
        compiled: the grammar.
        override_stop_tokens: tokens that end the text, instead of the vocabulary's.
        terminate_without_stop_token: the text counts as finished as soon as it may end.

    A matcher is for one thread at a time; different ones, forks included, may run in different threads.
    """

    START: ClassVar[tuple[int, ...]] = (0, -1)

    def __init__(
        self,
        compiled: CompiledGrammar,
        override_stop_tokens: Sequence[int] | None = None,
        terminate_without_stop_token: bool = False,
    ):
        if not isinstance(compiled, CompiledGrammar):
            raise BadInputError(
                f"GrammarMatcher needs a CompiledGrammar; got {type(compiled).__name__}.", "Use GrammarCompiler."
            )
        self.compiled = compiled
        info = compiled.tokenizer_info
        self.stop_token_ids = list(info.stop_token_ids if override_stop_tokens is None else override_stop_tokens)
        for token in self.stop_token_ids:
            if not 0 <= token < info.vocab_size:
                raise BadInputError(f"The stop token {token} is outside the vocabulary of {info.vocab_size} tokens.")
        self.terminate_without_stop_token = terminate_without_stop_token
        if not self.stop_token_ids and not terminate_without_stop_token:
            raise BadInputError(
                "There is no stop token: the text could never end.",
                "Give TokenizerInfo stop_token_ids, or set terminate_without_stop_token=True.",
            )
        self._arena = compiled.arena()
        self._step = _Step(self._arena.state(self.START), False, None)

    # -- what may come next -------------------------------------------------------------------------------------------
    def _mask(self, state: State) -> Int32s:
        """``[W]`` int32: the tokens that go on with the text (stop tokens aside)."""
        if state.mask is not None:
            return state.mask
        arena, stacks, vocab_size = self._arena, state.stacks, self.compiled.tokenizer_info.vocab_size
        entry = self.compiled.entry(arena, stacks[0], stacks[1])
        words, count = entry.mask(), entry.count
        if len(stacks) > 2:
            words = words.copy()
            for place in range(2, len(stacks), 2):
                words |= self.compiled.entry(arena, stacks[place], stacks[place + 1]).mask()
            count = int(np.bitwise_count(words).sum())
        mask = words.view(np.int32)
        with arena.lock:
            arena.remember(state, mask, count < vocab_size)
        return mask

    def fill_next_token_bitmask(self, bitmask: torch.Tensor | np.ndarray, index: int = 0) -> bool:
        """Writes the allowed tokens into a row of an int32 bitmask (torch on the CPU, or numpy).

        Returns:
            Whether any token is forbidden (if not, applying the mask can be left out).

        Raises:
            BadInputError: the text is finished already, or the bitmask has the wrong shape or type.
        """
        step = self._step
        state = step.state
        ending = state.ending if state.ending is not None else self._can_end(state)
        if step.stopped or (ending and self.terminate_without_stop_token):
            raise BadInputError(
                "The text is finished; there is no next token.", "Check is_terminated() first, or reset()."
            )
        words = state.mask if state.mask is not None else self._mask(state)
        rows = bitmask if isinstance(bitmask, np.ndarray) else self._numpy(bitmask)
        row = rows[index] if rows.ndim == 2 else rows
        size = len(words)
        if (row.dtype is not _INT32 and row.dtype != _INT32) or len(row) < size:
            raise BadInputError(
                f"The bitmask has {len(row)} words of {row.dtype}; {size} of int32 are needed.",
                "Allocate it with allocate_token_bitmask(batch_size, tokenizer_info.vocab_size).",
            )
        if len(row) == size:
            row[:] = words
        else:
            row[:size], row[size:] = words, 0
        if ending:
            for token in self.stop_token_ids:
                row[token >> 5] |= _BIT[token & 31]
        return state.restricted

    @staticmethod
    def _numpy(bitmask: torch.Tensor) -> Int32s:
        try:
            return bitmask.numpy()
        except (AttributeError, TypeError, RuntimeError) as error:
            raise BadInputError(f"The bitmask must be an int32 tensor on the CPU: {error}") from error

    def allowed_tokens(self) -> Int64s:
        """Ids of the tokens that may come next."""
        if self.is_terminated():
            return np.zeros(0, np.int64)
        row = np.zeros(self.compiled.tokenizer_info.words, np.int32)
        self.fill_next_token_bitmask(row)
        return np.flatnonzero(
            np.unpackbits(row.view(np.uint8), bitorder="little")[: self.compiled.tokenizer_info.vocab_size]
        )

    def accepts(self, token_id: int) -> bool:
        """Whether a token may come next; far cheaper than a mask the first time, and nothing is kept."""
        state = self._step.state
        info = self.compiled.tokenizer_info
        if self.is_terminated() or not 0 <= token_id < info.vocab_size:
            return False
        if token_id in self.stop_token_ids:
            return self._can_end(state)
        if state.mask is not None:
            return bool(state.mask.item(token_id >> 5) >> (token_id & 31) & 1)
        if token_id in state.moves:
            return True
        data = info.arrays[token_id] if token_id < len(info.arrays) else _NO_BYTES
        return len(data) > 0 and self._survives(data) == len(data)

    def _survives(self, data: UInt8s) -> int:
        arena = self._arena
        with arena.lock:
            while True:
                count = arena.load(self._step.state.stacks)
                read = survives(
                    self.compiled.packed,
                    data,
                    *arena.frames,
                    arena.stack_node,
                    arena.stack_frame,
                    arena.stack_below,
                    count,
                )
                if read >= 0:
                    return int(read)
                arena.grow(read)

    def _can_end(self, state: State) -> bool:
        if state.ending is None:
            closes, arena, stacks = self.compiled.closes, self._arena, state.stacks
            state.ending = False
            for place in range(0, len(stacks), 2):
                node, frame = stacks[place], stacks[place + 1]
                while closes[node] and frame >= 0:
                    node, frame = arena.frame_node.item(frame), arena.frame_parent.item(frame)
                if closes[node] and frame < 0:
                    state.ending = True
                    break
        return state.ending

    def can_end(self) -> bool:
        """Whether the text so far is a complete one."""
        return self._can_end(self._step.state)

    # -- moving -------------------------------------------------------------------------------------------------------
    def accept_token(self, token_id: int) -> bool:
        """Moves on; False (and no change) if the token is not allowed."""
        token_id = int(token_id)
        step = self._step
        state = step.state
        if step.stopped or (self.terminate_without_stop_token and self._can_end(state)):
            return False
        if token_id in self.stop_token_ids:
            if not self._can_end(state):
                return False
            self._step = _Step(state, True, step)
            return True
        following = state.moves.get(token_id)
        if following is None:
            info = self.compiled.tokenizer_info
            if not 0 <= token_id < len(info.arrays) or not len(info.arrays[token_id]):
                return False
            following = self._read(state, info.arrays[token_id])
            if following is None:
                return False
            state.moves[token_id] = following
            self._arena.moves += 1
        self._step = _Step(following, False, step)
        return True

    def accept_string(self, text: str | bytes) -> bool:
        """Moves over a text (one step for ``rollback``); False (and no change) if it is not allowed."""
        data = text.encode("utf-8") if isinstance(text, str) else bytes(text)
        if not data:
            return True
        if self.is_terminated():
            return False
        following = self._read(self._step.state, np.frombuffer(data, np.uint8))
        if following is None:
            return False
        self._step = _Step(following, False, self._step)
        return True

    def _read(self, state: State, data: UInt8s) -> State | None:
        arena = self._arena
        with arena.lock:
            arena.ensure()
            while True:
                count, top, _ = advance(
                    self.compiled.packed, data, *arena.frames, arena.table, *arena.stacks,
                    arena.load(state.stacks),
                )  # fmt: skip
                arena.top = int(top)
                if count >= 0:
                    break
                arena.grow(count)
            if count == 0:
                return None
            if count == 1:
                return arena.state((arena.stack_node.item(0), arena.stack_frame.item(0)))
            order = np.lexsort((arena.stack_frame[:count], arena.stack_node[:count]))  # a set has one name
            return arena.state(
                tuple(np.stack([arena.stack_node[order], arena.stack_frame[order]], 1).reshape(-1).tolist())
            )

    def longest_prefix(self, text: str | bytes) -> int:
        """How many bytes of a text could be accepted from here."""
        data = np.frombuffer(text.encode("utf-8") if isinstance(text, str) else bytes(text), np.uint8)
        return self._survives(data) if not self.is_terminated() else 0

    def rollback(self, num_tokens: int = 1) -> None:
        """Takes back the last accepted tokens.

        Raises:
            BadInputError: fewer have been accepted.
        """
        step = self._step
        for taken in range(num_tokens):
            if step.previous is None:
                raise BadInputError(f"Cannot take back {num_tokens} tokens: only {taken} have been accepted.")
            step = step.previous
        self._step = step

    def reset(self) -> None:
        """Back to the start."""
        self._arena = self.compiled.arena()
        self._step = _Step(self._arena.state(self.START), False, None)

    def fork(self) -> GrammarMatcher:
        """An independent matcher in the same state; costs the same however long the text is."""
        other = object.__new__(GrammarMatcher)
        other.__dict__.update(self.__dict__)
        return other

    def is_terminated(self) -> bool:
        """Whether the text is finished: a stop token was accepted (or, without stop tokens, the text may end)."""
        if self._step.stopped:
            return True
        return self.terminate_without_stop_token and self._can_end(self._step.state)

    def find_jump_forward_string(self) -> str:
        """The text that must come next because nothing else is possible (up to 4,096 bytes; empty if there is a
        choice)."""
        if self.is_terminated():
            return ""
        arena = self._arena
        output = np.zeros(4096, np.uint8)
        with arena.lock:
            while True:
                count = arena.load(self._step.state.stacks)
                size = forced(
                    self.compiled.packed,
                    *arena.frames,
                    arena.stack_node,
                    arena.stack_frame,
                    arena.stack_below,
                    count,
                    output,
                )
                if size >= 0:
                    break
                arena.grow(size)
        data = output[:size].tobytes()
        for cut in range(min(4, len(data) + 1)):  # not into the middle of a character
            try:
                return data[: len(data) - cut].decode("utf-8")
            except UnicodeDecodeError:
                continue
        return ""
