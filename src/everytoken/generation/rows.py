"""One row of a batch while it is decoded token by token, for decoders with a loop of their own."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from ..core.errors import BadInputError
from .base import fill_mask


class Row:
    """The text of one prompt, its new tokens, and how ``generate``'s settings apply to them.

    Args:
        ids: the prompt ``[T]``.
        padding: what precedes it in the batch; stopping criteria count padded length, as in ``generate``.
        processors, criteria: of the call.
        do_sample: sample, or take the largest score.
        streamer: gets every token, or None.
        matcher: a ``Matcher`` in the state of the prompt's end, or None.
        keep_scores, keep_logits: remember processed and raw scores of every token.
        columns: names of trace columns; None keeps no trace.
    """

    def __init__(
        self,
        ids: torch.Tensor,
        padding: torch.Tensor,
        processors: Any,
        criteria: Any,
        do_sample: bool,
        streamer: Any = None,
        matcher: Any = None,
        keep_scores: bool = False,
        keep_logits: bool = False,
        columns: tuple[str, ...] | None = None,
    ):
        self.device, self.do_sample, self.streamer = ids.device, do_sample, streamer
        self.processors = LogitsProcessorList(processors or [])
        self.criteria = StoppingCriteriaList(criteria or [])
        self.text, self.padding = ids.tolist(), padding.tolist()
        self.matcher = matcher.fork() if matcher is not None else None
        self.new: list[int] = []
        self.scores: list[torch.Tensor] | None = [] if keep_scores else None
        self.logits: list[torch.Tensor] | None = [] if keep_logits else None
        self.columns: dict[str, list[Any]] | None = None if columns is None else {name: [] for name in columns}

    def processed(self, logits: torch.Tensor) -> torch.Tensor:
        """Raw logits ``[V]`` as scores: the matcher's mask, then the call's processors."""
        if self.matcher is None and not self.processors:
            return logits
        scores = logits.clone()
        if self.matcher is not None:
            fill_mask(self.matcher, scores)
        ids = torch.tensor([self.padding + self.text], device=self.device)
        return self.processors(ids, scores[None])[0]

    def choose(self, scores: torch.Tensor) -> int:
        """A token from scores ``[V]``."""
        return int(torch.multinomial(torch.softmax(scores, -1), 1)) if self.do_sample else int(scores.argmax())

    def append(self, token: int, scores: torch.Tensor, logits: torch.Tensor, **entries: Any) -> bool:
        """Adds a token with its scores and trace entries; returns whether the row ends here.

        Raises:
            BadInputError: a processor forced a token that the matcher forbids.
        """
        if self.matcher is not None and not self.matcher.accept_token(token):
            raise BadInputError(
                f"A logits processor chose token {token}, which the matcher forbids.", "Drop forced tokens."
            )
        self.text.append(token)
        self.new.append(token)
        if self.streamer is not None:
            self.streamer.put(torch.tensor([token]))
        if self.scores is not None:
            self.scores.append(scores)
        if self.logits is not None:
            self.logits.append(logits)
        if self.columns is not None:
            for name, column in self.columns.items():
                column.append(entries.get(name))
        ids = torch.tensor([self.padding + self.text], device=self.device)
        finished = self.matcher is not None and self.matcher.is_terminated()
        return finished or bool(self.criteria(ids, None).all())


def stacked(columns: list[list[torch.Tensor] | None]) -> tuple[torch.Tensor, ...] | None:
    """Rows' scores as ``generate`` returns them: one ``[B, V]`` a step; a finished row repeats its last."""
    if not columns or columns[0] is None:
        return None
    rows = [column for column in columns if column is not None]
    longest = range(max(map(len, rows)))
    return tuple(torch.stack([column[min(step, len(column) - 1)] for column in rows]) for step in longest)
