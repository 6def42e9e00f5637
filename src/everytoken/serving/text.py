"""Text as it is written: pieces of whole characters, and stop texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARTIAL = "\ufffd"


class Pieces:
    """The text that each token adds. A token that ends inside a character adds nothing, and the next adds all of it.

    A piece is what a window of tokens reads with it less what it reads without it, so that spaces stay as the whole
    text has them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self._begin, self._said = tokenizer, 0, 0
        self.ids: list[int] = []

    def _read(self, first: int, last: int | None = None) -> str:
        return str(self.tokenizer.decode(self.ids[first:last], skip_special_tokens=True))

    def add(self, tokens: Sequence[int], last: bool = False) -> str:
        """The text that these tokens add; with ``last`` also what is no whole character."""
        self.ids.extend(tokens)
        before, now = self._read(self._begin, self._said), self._read(self._begin)
        if now.endswith(PARTIAL) and not last:
            return ""
        self._begin, self._said = self._said, len(self.ids)
        return now[len(before) :]


class StopCutter:
    """Passes text on up to the first stop text; keeps back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str], say: Callable[[str], None]):
        self.stops, self.say, self._held, self.ended = stops, say, "", False

    def add(self, text: str, last: bool = False) -> None:
        if self.ended:
            return
        self._held += text
        places = [place for stop in self.stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.ended, keep = True, min(places)
        elif last:
            keep = len(self._held)
        else:
            keep = len(self._held) - max((self._overlap(stop) for stop in self.stops), default=0)
        if self._held[:keep]:
            self.say(self._held[:keep])
        self._held = self._held[keep:]

    def _overlap(self, stop: str) -> int:
        """Characters at the end that begin ``stop``."""
        return next((size for size in range(len(stop) - 1, 0, -1) if self._held.endswith(stop[:size])), 0)


class PieceStreamer(BaseStreamer):  # type: ignore[misc]
    """A streamer of one row that leaves out the prompt and the tokens that end a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, cutter: StopCutter, ends: Sequence[int] = ()):
        self.pieces, self.cutter, self.ends, self._prompt = Pieces(tokenizer), cutter, set(ends), True

    def put(self, value: torch.Tensor) -> None:
        if self._prompt:
            self._prompt = False
            return
        self.cutter.add(self.pieces.add([token for token in value.flatten().tolist() if token not in self.ends]))

    def end(self) -> None:
        self.cutter.add(self.pieces.add([], last=True), last=True)
        self._prompt = True


class StopTexts(StoppingCriteria):  # type: ignore[misc]
    """Ends a row where its answer has a stop text; the prompt does not count, and special tokens are text here.

    Args:
        prompt: tokens of the prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], prompt: int):
        self.tokenizer, self.stops, self.prompt = tokenizer, stops, prompt
        self.window = max(len(stop.encode()) for stop in stops) + 16  # a token is a byte at least; some come at once

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        tails = input_ids[:, self.prompt :][:, -self.window :].tolist()
        texts = [self.tokenizer.decode(tail, skip_special_tokens=False) for tail in tails]
        found = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(found, dtype=torch.bool, device=input_ids.device)
