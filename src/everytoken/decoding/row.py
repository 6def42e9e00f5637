"""One row of a batch while it is decoded token by token, for decoders with a loop of their own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from ..core.errors import BadInputError
from ..core.trace import Value
from .matcher import Matcher, fill_mask
from .processors import stateless
from .row_cache import RowCache


class DecodingRow:
    """The text of one prompt, its new tokens, and how ``generate``'s settings apply to them.

    Args:
        ids: the prompt ``[T]``.
        padding: what precedes it in the batch; stopping criteria count padded length, as in ``generate``.
        processors, criteria: of the call.
        config: the call's generation configuration: whether to sample, and what to remember of every token.
        streamer: gets every token, or None.
        matcher: a ``Matcher`` in the state of the prompt's end, or None.
        columns: names of trace columns; None keeps no trace.

    Attributes:
        text: the prompt without its padding, and the new tokens.
        new: the new tokens.
        stateless: those of the processors that may be asked about any number of texts, in any order.
        scores, logits: ``[V]`` of every new token where the call asked for them, else None.
        columns: trace columns, one value a new token, or None.
        cache: the model's cache for this row; None where the decoder keeps it elsewhere.
    """

    def __init__(
        self,
        ids: torch.Tensor,
        padding: torch.Tensor,
        processors: Iterable[LogitsProcessor],
        criteria: Iterable[StoppingCriteria],
        config: GenerationConfig,
        streamer: BaseStreamer | None = None,
        matcher: Matcher | None = None,
        columns: tuple[str, ...] | None = None,
    ):
        self.device, self.do_sample, self.streamer = ids.device, bool(config.do_sample), streamer
        self.processors = LogitsProcessorList(processors or [])
        self.stateless = stateless(self.processors)
        self.criteria = StoppingCriteriaList(criteria or [])
        self.text: list[int] = ids.tolist()
        self.padding: list[int] = padding.tolist()
        self.matcher = matcher.fork() if matcher is not None else None
        self.new: list[int] = []
        self.cache: Cache | None = None
        keep = bool(config.return_dict_in_generate)
        self.scores: list[torch.Tensor] | None = [] if keep and config.output_scores else None
        self.logits: list[torch.Tensor] | None = [] if keep and config.output_logits else None
        self.columns: dict[str, list[Value]] | None = None if columns is None else {name: [] for name in columns}
        self._shown: tuple[torch.Tensor, ...] = ()
        self._buffer = torch.cat([padding, ids])[None]  # grows by half: a text is not copied at every token

    @property
    def ids(self) -> torch.Tensor:
        """The text so far as transformers would show it, padding included: ``[1, N]``."""
        return self._buffer[:, : len(self.padding) + len(self.text)]

    def processed(self, logits: torch.Tensor, masked: bool = False) -> torch.Tensor:
        """Raw logits ``[V]`` as scores: the matcher's mask, then the call's processors.

        Args:
            masked: the matcher's mask is on these logits already, and they may be changed in place.
        """
        if not masked and self.matcher is None and not self.processors:
            return logits
        scores = logits if masked else logits.clone()
        if self.matcher is not None and not masked:
            fill_mask(self.matcher, scores)
        return self.processors(self.ids, scores[None])[0]

    def choose(self, scores: torch.Tensor) -> int:
        """A token from scores ``[V]``."""
        return int(torch.multinomial(torch.softmax(scores, -1), 1)) if self.do_sample else int(scores.argmax())

    def append(
        self, token: int, scores: torch.Tensor | None = None, logits: torch.Tensor | None = None, **entries: Value
    ) -> bool:
        """Adds a token with its scores and trace entries; returns whether the row ends here.

        Args:
            scores, logits: ``[V]``; needed where the call asked for them.

        Raises:
            BadInputError: a processor forced a token that the matcher forbids.
        """
        if self.matcher is not None and not self.matcher.accept_token(token):
            raise BadInputError(
                f"A logits processor chose token {token}, which the matcher forbids.",
                "Drop forced tokens, or the processor.",
            )
        self.text.append(token)
        self.new.append(token)
        self._write(token)
        if self.streamer is not None:
            self.streamer.put(torch.tensor([token]))
        if self.scores is not None:
            assert scores is not None
            self.scores.append(scores)
            self._shown += (scores[None],)
        if self.logits is not None:
            assert logits is not None
            self.logits.append(logits)
        if self.columns is not None:
            for name, column in self.columns.items():
                column.append(entries.get(name))
        finished = self.matcher is not None and self.matcher.is_terminated()
        shown = None if self.scores is None else self._shown
        return bool(self.criteria(self.ids, shown).all()) or finished

    def _write(self, token: int) -> None:
        place = len(self.padding) + len(self.text) - 1
        if place >= self._buffer.shape[1]:
            room = self._buffer.new_empty(1, max(place * 3 // 2, place + 64))
            room[:, :place] = self._buffer[:, :place]
            self._buffer = room
        self._buffer[0, place] = token

    def fork(self) -> DecodingRow:
        """An independent row in the same state (scores are shared, not copied); the streamer stays with both."""
        other: DecodingRow = object.__new__(DecodingRow)
        other.__dict__.update(self.__dict__)
        other.text, other.new = list(self.text), list(self.new)
        other.matcher = None if self.matcher is None else self.matcher.fork()
        other.scores = None if self.scores is None else list(self.scores)
        other.logits = None if self.logits is None else list(self.logits)
        if self.columns is not None:
            other.columns = {name: list(column) for name, column in self.columns.items()}
        other._buffer = self._buffer.clone()
        return other

    def adopt(self, other: DecodingRow) -> None:
        """Goes on as ``other``, a fork of this row: decoders that carry several texts keep one in the end."""
        self.__dict__.update(other.__dict__)


# -- forwards of decoders with a loop of their own ---------------------------------------------------------------------
def fit(logits: torch.Tensor, vocab: int) -> torch.Tensor:
    """A helper's logits over ``vocab`` tokens: it proposes none that it lacks, and none that the target lacks."""
    missing = vocab - logits.shape[-1]
    if missing <= 0:
        return logits[..., :vocab]
    return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)


def known_tokens(text: list[int], helper: PreTrainedModel) -> list[int]:
    """Tokens as a helper with a smaller vocabulary can read them: another token stands in for those that it lacks.

    That changes what it proposes and never what the target accepts.
    """
    size = helper.get_input_embeddings().weight.shape[0]
    if not text or max(text) < size:
        return text
    config = helper.config.get_text_config()
    names = ("unk_token_id", "eos_token_id", "bos_token_id")
    special = [getattr(config, name, None) for name in names]
    stand_in = next((item for item in special if isinstance(item, int) and 0 <= item < size), 0)
    return [token if token < size else stand_in for token in text]


def read_on(model: PreTrainedModel, cache: Cache, text: list[int], vocab: int) -> torch.Tensor:
    """Runs a model over what its cache does not hold of ``text`` yet, in one forward: logits ``[V]`` of the next
    token."""
    held = RowCache(model, cache)
    held.prompt = held.length or None
    output = held.read(text)
    logits: torch.Tensor = output["logits"]
    return logits[0, -1, :vocab].float()
