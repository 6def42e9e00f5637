"""One row of a batch while it is decoded token by token, for decoders with a loop of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..core.errors import BadInputError
from .base import Decoder, join_rows
from .matcher import fill_mask


@dataclass
class DecodingOutput(GenerateDecoderOnlyOutput):
    """``generate``'s usual output plus ``stats`` (DecodingStats) and ``trace`` (a TokenTrace per row, or None)."""

    stats: Any = None
    trace: Any = None


class Row:
    """The text of one prompt, its new tokens, and how ``generate``'s settings apply to them.

    Args:
        ids: the prompt ``[T]``.
        padding: what precedes it in the batch; stopping criteria count padded length, as in ``generate``.
        processors, criteria: of the call.
        config: the call's generation configuration: whether to sample, and what to remember of every token.
        streamer: gets every token, or None.
        matcher: a ``Matcher`` in the state of the prompt's end, or None.
        columns: names of trace columns; None keeps no trace.
    """

    def __init__(
        self,
        ids: torch.Tensor,
        padding: torch.Tensor,
        processors: Any,
        criteria: Any,
        config: Any,
        streamer: Any = None,
        matcher: Any = None,
        columns: tuple[str, ...] | None = None,
    ):
        self.device, self.do_sample, self.streamer = ids.device, bool(config.do_sample), streamer
        self.processors = LogitsProcessorList(processors or [])
        self.criteria = StoppingCriteriaList(criteria or [])
        self.text, self.padding = ids.tolist(), padding.tolist()
        self.matcher = matcher.fork() if matcher is not None else None
        self.new: list[int] = []
        keep = bool(config.return_dict_in_generate)
        self.scores: list[torch.Tensor] | None = [] if keep and config.output_scores else None
        self.logits: list[torch.Tensor] | None = [] if keep and config.output_logits else None
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


def read_on(model: Any, cache: Any, text: list[int], vocab: int) -> torch.Tensor:
    """Runs a model over what its cache does not hold of ``text`` yet, in one forward: logits ``[V]`` of the next token."""
    past = cache.get_seq_length()
    ids = torch.tensor([text[past:]], device=model.device)
    positions = torch.arange(past, len(text), device=ids.device)[None]
    output = model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits[0, -1, :vocab].float()


def collect(decoder: Decoder, rows: Sequence[Row], input_ids: torch.Tensor, config: Any, cache: Any) -> Any:
    """What ``generate`` returns: rows padded to one tensor, wrapped with what was asked for. Counts the new tokens."""
    decoder.stats.new_tokens = sum(len(row.new) for row in rows)
    sequences = join_rows(input_ids, [row.new for row in rows], config)
    if not config.return_dict_in_generate:
        return sequences
    return DecodingOutput(
        sequences=sequences,
        scores=stacked([row.scores for row in rows]),
        logits=stacked([row.logits for row in rows]),
        past_key_values=cache if len(rows) == 1 else None,
        stats=decoder.stats,
        trace=decoder.trace or None,
    )


def stacked(columns: list[list[torch.Tensor] | None]) -> tuple[torch.Tensor, ...] | None:
    """Rows' scores as ``generate`` returns them: one ``[B, V]`` a step; a finished row repeats its last."""
    if not columns or columns[0] is None:
        return None
    rows = [column for column in columns if column is not None]
    longest = range(max(map(len, rows)))
    return tuple(torch.stack([column[min(step, len(column) - 1)] for column in rows]) for step in longest)
