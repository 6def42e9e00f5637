"""The contract of everything that writes text in any order: a canvas sampler.

A sampler is a dataclass of its settings. It is called on any model whose attention looks both ways::

    trajectory = DenoisingSampler(gen_length=32, steps=16)(model, input_ids, attention_mask=attention_mask)

and returns a ``Trajectory``. Where the model can generate, it is a ``custom_generate`` too, and ``generate`` returns
what it always does::

    ids = model.generate(input_ids, max_new_tokens=32, custom_generate=DenoisingSampler(steps=16))

``__call__`` is written here once: it checks the call, makes the canvas, shows drafts to a streamer and keeps counters
and traces. A method implements ``fill(call)``.

A canvas is the prompt with ``gen_length`` open positions behind it. With ``editable`` the caller names the open
positions of a whole text instead; nothing else is ever written.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
from transformers.utils import ModelOutput

from ...core.errors import BadInputError
from ...core.modes import evaluating
from ...core.noise import open_uniform, row_generators
from ...core.trace import TokenTrace
from ..base import ended_on_errors
from ..call import DecodingStats
from ..checks import check_not_empty, refuse_unsupported
from ..inputs import callers_arguments
from .model import CanvasModel, mask_token
from .trajectory import Trajectory

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

PREPARED = frozenset({
    "attention_mask", "position_ids", "past_key_values", "cache_params", "use_cache", "logits_to_keep",
    "cache_position", "token_type_ids",
})  # fmt: skip
"""Model inputs that ``generate`` or a tokenizer prepares; others are refused by name."""
CRITERIA = frozenset({"MaxLengthCriteria", "EosTokenCriteria"})
"""What ``generate`` adds by itself: a canvas has its length, and writes what stands behind an end token too."""


@dataclass
class CanvasStats(DecodingStats):
    """Counters of a call.

    Attributes:
        revised: tokens that were taken back.
    """

    revised: int = 0

    @property
    def tokens_per_forward(self) -> float:
        """Tokens of all rows by forward passes of the batch."""
        return self.new_tokens / self.target_forwards if self.target_forwards else 0.0


@dataclass
class CanvasOutput(ModelOutput):  # type: ignore[misc]
    """What ``generate`` returns with ``return_dict_in_generate``."""

    sequences: torch.Tensor | None = None
    trajectory: Trajectory | None = None
    stats: CanvasStats | None = None
    trace: list[TokenTrace] | None = None


@dataclass
class CanvasCall:
    """One call while a sampler answers it.

    Attributes:
        model: the model, with its forwards counted.
        canvas: ``[B, T]``, the mask id at every editable position.
        attention, editable: ``[B, T]`` bool.
        mask_id: of open positions.
        generators: one a row, so that a row does not depend on its batch.
        length: how many tokens were asked for; None where ``editable`` says it.
        streamer: shown a draft after every step, or None.
    """

    model: CanvasModel
    canvas: torch.Tensor
    attention: torch.Tensor
    editable: torch.Tensor
    mask_id: int
    generators: list[torch.Generator]
    length: int | None = None
    streamer: Any = None

    def uniform(self, rows: torch.Tensor, *width: int) -> torch.Tensor:
        """Float64 numbers in (0, 1), ``[N, *width]``, each row's drawn by its own generator.

        Args:
            rows: ``[N]``, the rows that they are for, in ascending order.
        """
        counts = torch.bincount(rows, minlength=len(self.generators)).tolist()
        parts = [
            open_uniform(count, *width, generator=generator, device=self.canvas.device)
            for count, generator in zip(counts, self.generators, strict=True)
        ]
        return torch.cat(parts)

    def draft(self, canvas: torch.Tensor) -> None:
        """Shows the first row's canvas to a streamer that takes drafts."""
        if self.streamer is not None and hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(canvas[0][self.editable[0]].cpu())


@dataclass
class CanvasSampler:
    """Base of every sampler.

    Args:
        gen_length: open positions behind the prompt; None takes ``max_new_tokens`` of ``generate``, or ``editable``.
        mask_id: None takes the model's ``mask_token_id``.
        shift_logits: whether row i of the logits predicts position i + 1; None asks the model's configuration.
        check: find out, once a model, that its attention looks both ways.
        trace_enabled: keep a TokenTrace of every row, for ``sampler.trace``.
    """

    gen_length: int | None = field(default=None, kw_only=True)
    mask_id: int | None = field(default=None, kw_only=True)
    shift_logits: bool | None = field(default=None, kw_only=True)
    check: bool = field(default=True, kw_only=True)
    trace_enabled: bool = field(default=False, kw_only=True)

    weights: ClassVar[str] = "sudoku-any-order"
    """The shipped network that it is tried on without ``--model``."""
    writes_masks: ClassVar[bool] = True
    """Whether the canvas begins as masks that are filled; the battery of ``everytoken.testing.canvas`` is for those."""
    trace_columns: ClassVar[tuple[str, ...]] = ("step", "confidence", "revisions")
    colour: ClassVar[str] = "step"
    station: ClassVar[str] = "decoding"

    def __post_init__(self) -> None:
        if self.gen_length is not None and self.gen_length < 1:
            raise BadInputError(f"gen_length is at least 1; got {self.gen_length}.")

    # -- what a method implements --------------------------------------------------------------------------------------
    def check_call(self, editable: torch.Tensor) -> None:
        """Refuses what this sampler cannot honour, before any forward.

        Args:
            editable: ``[B, T]`` bool.
        """

    def fill(self, call: CanvasCall) -> Trajectory:
        """Writes the canvas."""
        raise NotImplementedError(f"{type(self).__name__} does not implement fill.")

    def open_positions(self, ids: torch.Tensor, editable: torch.Tensor, mask_id: int) -> torch.Tensor:
        """The canvas at the start."""
        return ids.masked_fill(editable, mask_id)

    def baseline(self) -> tuple[str, CanvasSampler]:
        """What a trial runs beside it, with a name: the plain way of writing with the same settings."""
        raise NotImplementedError(f"{type(self).__name__} names no baseline.")

    @classmethod
    def examples(cls) -> dict[str, CanvasSampler]:
        """Samplers of this class for rows of 12 open positions; ``everytoken.testing.canvas`` tries them."""
        raise NotImplementedError(f"{cls.__name__} gives no examples of itself.")

    # -- a call --------------------------------------------------------------------------------------------------------
    @final
    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generation_config: GenerationConfig | None = None,
        synced_gpus: bool = False,
        streamer: Any = None,
        *,
        editable: torch.Tensor | None = None,
        seeds: Sequence[int] | torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Writes a canvas.

        Args:
            model: any model with ``.logits [B, T, V]`` whose attention looks both ways.
            input_ids: ``[B, P]`` prompts, padded on the left; or, with ``editable``, whole texts ``[B, T]``.
            logits_processor, stopping_criteria, generation_config, synced_gpus: as ``generate`` prepares them.
            streamer: shown every draft (``put_draft``) and the final text; for one row only.
            editable: ``[B, T]`` bool, the positions to write; for a sampler that inserts, the tokens right behind which
                it may.
            seeds: one a row; the same seed gives the same row in any batch.
            generator: draws the seeds; None takes torch's own.
            model_kwargs: ``attention_mask [B, P]``; what else ``generate`` prepares is not needed.

        Returns:
            A ``Trajectory``; called by ``generate``, ids ``[B, P + gen_length]``, or a ``CanvasOutput`` with
            ``return_dict_in_generate``.

        Raises:
            BadInputError: no mask id, a mask id in the prompt, an empty or too long text, shapes that do not fit, or an
                argument that a canvas cannot honour. Before any forward.
            UnsupportedModelError: a causal model, or padded rows for a model that does not leave padding out.
        """
        asked = callers_arguments(("streamer",)) if generation_config is not None else {}
        shown = asked.get("streamer") if streamer is None else streamer
        with ended_on_errors(shown):
            began = time.perf_counter()
            if generation_config is not None:
                self._check_generate(generation_config, logits_processor, stopping_criteria, synced_gpus)
            ids, attention, open_ = self._canvas(input_ids, editable, generation_config, model_kwargs)
            mask_id = mask_token(model, self.mask_id)
            self._check_ids(model, ids, attention, open_, mask_id, shown)
            self.check_call(open_)
            generators = self._generators(len(ids), seeds, generator, ids.device)
            wrapped = CanvasModel(model, mask_id, self.shift_logits)
            padded = not bool(attention.all())
            if self.check:
                wrapped.check(padded)
            canvas = self.open_positions(ids, open_, mask_id)
            if shown is not None and generation_config is None:
                shown.put(canvas[0][attention[0] & (canvas[0] != mask_id)].cpu())
            length = self._length(generation_config, input_ids.shape[1])
            call = CanvasCall(wrapped, canvas, attention, open_, mask_id, generators, length, shown)
            with evaluating(model):
                found = self.fill(call)
            found.forwards = wrapped.forwards
            stats = CanvasStats(
                new_tokens=int(found.editable.sum()),
                target_forwards=wrapped.forwards,
                rounds=found.steps,
                revised=int(found.revisions.sum()),
            )
            if shown is not None:
                shown.put(torch.tensor(found.new_ids(0)))
                shown.end()
        trace = self.traces(found) if self.trace_enabled else []
        stats.seconds = time.perf_counter() - began
        self._calls_().last = (stats, trace)
        if generation_config is None:
            return found
        if generation_config.return_dict_in_generate:
            return CanvasOutput(sequences=found.final_ids, trajectory=found, stats=stats, trace=trace)
        return found.final_ids

    def _check_generate(
        self, config: GenerationConfig, processors: Iterable[Any] | None, criteria: Iterable[Any] | None, synced: bool
    ) -> None:
        """What ``generate`` may ask of a sampler."""
        name = type(self).__name__
        refuse_unsupported(name, config, synced)
        if odd := sorted({type(item).__name__ for item in processors or ()}):
            raise BadInputError(
                f"{name} takes no logits processors; got {', '.join(odd)}.",
                "They read a text from left to right. The sampler has settings of its own: temperature, remasking.",
            )
        if odd := sorted({type(item).__name__ for item in criteria or ()} - CRITERIA):
            raise BadInputError(
                f"{name} takes no stopping criteria; got {', '.join(odd)}.", "A canvas ends when it is full."
            )

    def _canvas(
        self,
        ids: torch.Tensor,
        editable: torch.Tensor | None,
        config: GenerationConfig | None,
        model_kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids, attention and editable positions, ``[B, T]`` each."""
        attention = self._attention(ids, model_kwargs)
        name, length = type(self).__name__, self.gen_length
        if editable is not None:
            if length is not None:
                raise BadInputError("editable names the open positions already.", "Leave gen_length out.")
            return ids, attention, self._named(ids, attention, editable)
        length = self._length(config, ids.shape[1])
        if length is None:
            raise BadInputError(f"{name} does not know how long the text shall be.", "Give gen_length, or editable.")
        check_not_empty(ids.shape[1])
        if bool((attention.int().diff(dim=1) < 0).any()):
            raise BadInputError("Padding must be on the left.", "Set padding_side='left' on the tokenizer.")
        behind = ids.new_zeros(len(ids), length)
        kept = torch.ones_like(behind, dtype=torch.bool)
        open_ = torch.cat([torch.zeros_like(attention), kept], 1)
        return torch.cat([ids, behind], 1), torch.cat([attention, kept], 1), open_

    def _length(self, config: GenerationConfig | None, prompt: int) -> int | None:
        """How many tokens the sampler or ``generate`` was asked for, behind a prompt of so many."""
        if self.gen_length is not None or config is None:
            return self.gen_length
        return int(config.max_length) - prompt

    @staticmethod
    def _named(ids: torch.Tensor, attention: torch.Tensor, editable: torch.Tensor) -> torch.Tensor:
        """The positions that the caller named, ``[B, T]`` bool."""
        if editable.shape != ids.shape:
            raise BadInputError(
                f"editable must be as input_ids, {list(ids.shape)}; got {list(editable.shape)}.",
                "A record or a mask of another text does not fit.",
            )
        editable = editable.bool()
        if bool((editable & ~attention).any()):
            raise BadInputError("editable names positions of padding.")
        return editable

    def _attention(self, ids: torch.Tensor, model_kwargs: dict[str, Any]) -> torch.Tensor:
        """Where there are tokens, ``[B, T]`` bool; refuses what a canvas does not pass on."""
        name = type(self).__name__
        if odd := sorted(key for key, value in model_kwargs.items() if key not in PREPARED and value is not None):
            raise BadInputError(f"{name} does not pass {', '.join(odd)} on to the model.", "Leave it out.")
        kinds = model_kwargs.get("token_type_ids")
        if kinds is not None and bool(kinds.any()):
            raise BadInputError(f"{name} reads one segment of text; these token_type_ids name several.")
        cache = model_kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            raise BadInputError(f"{name} reads the whole canvas at every step and continues no cache.", "Leave it out.")
        if ids.dim() != 2:
            raise BadInputError(f"input_ids must be [B, T]; got {list(ids.shape)}.")
        given = model_kwargs.get("attention_mask")
        attention = torch.ones_like(ids, dtype=torch.bool) if given is None else given.bool()
        if attention.shape != ids.shape:
            raise BadInputError(f"attention_mask must be as input_ids, {list(ids.shape)}; got {list(attention.shape)}.")
        return attention

    def _check_ids(
        self,
        model: Any,
        ids: torch.Tensor,
        attention: torch.Tensor,
        editable: torch.Tensor,
        mask_id: int,
        streamer: Any,
    ) -> None:
        config = model.config.get_text_config()
        self._check_fixed(config, ids[attention & ~editable], mask_id)
        counts = editable.sum(1)
        if bool((counts == 0).any()):
            raise BadInputError(f"Row {int((counts == 0).nonzero()[0])} has no position to write.")
        self._check_room(config, ids.shape[1], len(ids), streamer)

    @staticmethod
    def _check_fixed(config: Any, fixed: torch.Tensor, mask_id: int) -> None:
        """What stands in the prompt, ``[N]`` ids."""
        if bool((fixed == mask_id).any()):
            raise BadInputError(
                f"The prompt holds the mask token {mask_id}, which stands for open positions.",
                "Name the positions to write: editable=(input_ids == mask_id).",
            )
        size = getattr(config, "vocab_size", None)
        if size is not None and fixed.numel() and not 0 <= int(fixed.min()) <= int(fixed.max()) < size:
            raise BadInputError(f"The prompt has ids outside of the vocabulary of {size}.")

    @staticmethod
    def _check_room(config: Any, length: int, rows: int, streamer: Any) -> None:
        """How long the text may become, and who watches."""
        longest = getattr(config, "max_position_embeddings", None)
        if isinstance(longest, int) and 0 < longest < length:  # XLNet says -1 and has no limit
            raise BadInputError(
                f"The canvas has {length} positions, and the model {longest}.",
                "Shorten the prompt or gen_length.",
            )
        if streamer is not None and rows > 1:
            raise BadInputError("A streamer follows one row only.", "Write one prompt at a time.")

    @staticmethod
    def _generators(
        rows: int, seeds: Any, generator: torch.Generator | None, device: torch.device
    ) -> list[torch.Generator]:
        if seeds is None:
            own = None if generator is None else generator.device
            seeds = torch.randint(2**62, (rows,), generator=generator, device=own)
        elif generator is not None:
            raise BadInputError("seeds and generator both decide what is drawn.", "Give one of them.")
        return row_generators(seeds, rows, device)

    # -- the last call -------------------------------------------------------------------------------------------------
    def traces(self, found: Trajectory) -> list[TokenTrace]:
        """A trace a row of the positions that were written."""
        revisions = found.revisions
        traces = []
        for row in range(len(found)):
            kept = found.editable[row]
            columns = {
                "step": found.fix_step[row][kept].tolist(),
                "confidence": found.choice_prob[row][kept].tolist(),
                "revisions": revisions[row][kept].tolist(),
            }
            traces.append(TokenTrace(found.new_ids(row), columns, station=self.station))
        return traces

    @property
    def stats(self) -> CanvasStats:
        """Counters of this thread's last call; zeros before the first."""
        found = getattr(self._calls_(), "last", None)
        return CanvasStats() if found is None else found[0]

    @property
    def trace(self) -> list[TokenTrace]:
        """A TokenTrace for each row of this thread's last call; empty unless ``trace_enabled``."""
        found = getattr(self._calls_(), "last", None)
        return [] if found is None else found[1]

    def _calls_(self) -> threading.local:
        found: threading.local = self.__dict__.setdefault("_calls", threading.local())
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_calls"}
